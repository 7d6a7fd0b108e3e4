//! The rendezvous: all ranks come to rank 0, say what they found, and get the list of all, or one error.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::door::{Door, Rules, listen_for_data};
use super::handshake::{self, Greeting, Known, Refused, Trust};
use super::hello::{self, Hello, list_ranks};
use super::host::Host;
use super::secret::{self, Secret};
use super::spawn::Stopped;
use super::wire::{self, By, Kind};
use super::{LOCALHOST, Rendezvous, Source, World};
use crate::comm::Segment;
use crate::{Error, Result};

/// How long the other ranks are waited for when one has already failed: long enough to hear whether all fail alike.
pub(super) const GRACE: Duration = Duration::from_secs(8);
/// How long a listener on one of several candidate ports may take to show that it is rank 0.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(1);
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How long a rank goes on that has reached something at rank 0's place but can prove nothing to it.
const HOPELESS: Duration = Duration::from_secs(3);
/// How long the data connections may take once all ranks are here.
const MESH_TIME: Duration = Duration::from_secs(10);

/// What a rank brings to rank 0.
#[derive(Serialize, Deserialize)]
pub(super) struct Card {
    pub hello: Hello,
    pub data_port: u16,
}

/// What rank 0 knows of a rank, for the others to connect.
#[derive(Serialize, Deserialize)]
pub(super) struct Seat {
    pub hello: Hello,
    pub data_port: u16,
    /// As rank 0 sees it; `None` on rank 0's own machine, which each rank reaches as it reached rank 0.
    pub ip: Option<IpAddr>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Roster {
    pub session: u64,
    pub seats: Vec<Seat>,
    /// All ranks are on one machine: rank 0's descriptor of the memory that they may share.
    pub segment: Option<i32>,
}

/// What the ranks' data connections know each other by; rank 0 makes it for this run and sends it under each pad.
pub(super) type SessionKey = [u8; secret::SIZE];

/// All ranks are here and agree; the data connections are still to be made.
pub(super) struct Met {
    pub roster: Roster,
    pub key: SessionKey,
    /// On rank 0 one connection to each other rank, on the others one to rank 0; by rank.
    pub controls: Vec<Option<TcpStream>>,
    pub listener: TcpListener,
    pub rank_0_ip: IpAddr,
    /// On rank 0: what it has made for all.
    pub segment: Option<Segment>,
}

/// Brings `world`'s ranks together; `hello.rank` is this one.
pub(super) fn meet(world: &World, hello: Hello, timeout: Duration) -> Result<Met> {
    if let Rendezvous::Unknown(what) = &world.rendezvous {
        // Every rank knows the same variables: one of them saying it is enough.
        let error = Error::failed(what);
        return Err(if world.rank == 0 {
            error
        } else {
            Error::Told(error.exit_code())
        });
    }
    let without_secret = world.one_machine() == Some(false) && world.secret.missing().is_some();
    match (world.rank, without_secret) {
        (0, false) => Host::new(world, hello, timeout)?.run(),
        (0, true) => Err(no_secret(&world.secret)),
        // Rank 0 of a local run is there as long as this rank is, and has the terminal.
        (_, false) if world.source == Source::Local && hello.error.is_none() => {
            join(world, hello, timeout).map_err(|e| {
                tracing::debug!("{e}");
                Error::Told(e.exit_code())
            })
        }
        (_, false) => join(world, hello, timeout),
        // Rank 0 most likely says it for all; if it has a secret all the same, this rank has to say it.
        (_, true) => match join(world, hello, timeout.min(HOPELESS)) {
            Err(Error::Failed(line)) if !line.contains(secret::VARIABLE) => Err(Error::Told(1)),
            other => other,
        },
    }
}

/// The ranks are on several machines, and have nothing to know each other by.
fn no_secret(secret: &Secret) -> Error {
    Error::failed(format!(
        "ranks on several machines need a secret to know each other by ({}): \
         set {} to the same random text on every rank, or let them share a home",
        secret.missing().unwrap_or_default(),
        secret::VARIABLE
    ))
}

/// The last word of rank 0: exit code and line.
#[derive(Serialize, Deserialize)]
pub(super) struct Verdict {
    pub code: u8,
    pub line: String,
}

impl Verdict {
    pub fn of(error: &Error) -> Self {
        Verdict {
            code: error.exit_code(),
            line: error.to_string(),
        }
    }

    /// Sends it to all, and waits a moment until they have gone: ending first could take the word back.
    pub fn tell(&self, streams: &[&TcpStream]) {
        let Ok(body) = postcard::to_allocvec(self) else {
            return;
        };
        for stream in streams {
            let _ = stream.set_nonblocking(false);
            let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
            if let Err(e) = wire::write_frame(*stream, Kind::Fail, &body) {
                tracing::debug!("a rank could not be told: {e}");
            }
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until && !streams.iter().all(|s| has_closed(s)) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The side of every other rank.
fn join(world: &World, hello: Hello, timeout: Duration) -> Result<Met> {
    let speak_for_itself = |error: Error| match &hello.error {
        Some((code, line)) => hello::with_code(*code, line.clone()),
        None => error,
    };
    let lost = |e: io::Error| {
        speak_for_itself(Error::failed(format!(
            "rank 0 ended before the ranks had met ({})",
            end_of_stream(&e)
        )))
    };
    let (stream, known) = find_rank_0(world, timeout).map_err(speak_for_itself)?;
    let address = stream.peer_addr().map_err(lost)?;
    let rank_0_ip = address.ip().to_canonical();
    let ip = stream.local_addr().map_err(lost)?.ip();
    let listener = listen_for_data(ip, world.stays_here()).map_err(lost)?;
    let card = Card {
        data_port: listener.local_addr().map_err(lost)?.port(),
        hello: hello.clone(),
    };
    wire::tune(&stream).map_err(lost)?;
    wire::write_frame(&stream, Kind::Hello, &encode(&card)?).map_err(lost)?;
    // Rank 0 may have come last, and gives the others its whole time-out.
    let deadline = Instant::now() + timeout + GRACE;
    wait_for_answer(world, &stream, deadline)?;
    let mut reader = By {
        stream: &stream,
        deadline,
    };
    let (kind, body) = wire::read_frame(&mut &mut reader, wire::MAX_FRAME).map_err(lost)?;
    let (key, roster) = match kind {
        Kind::Fail => {
            let verdict: Verdict = decode(&body)?;
            tracing::debug!("rank 0 says: {}", verdict.line);
            return Err(Error::Told(verdict.code));
        }
        Kind::Roster => open_roster(&body, &known)?,
        _ => {
            return Err(Error::failed(
                "rank 0 sent something else than the list of ranks",
            ));
        }
    };
    if roster.seats.len() != world.size {
        return Err(Error::failed(
            "rank 0 sent a list of ranks that is not ours",
        ));
    }
    let mut controls: Vec<_> = (0..world.size).map(|_| None).collect();
    controls[0] = Some(stream);
    Ok(Met {
        roster,
        key,
        controls,
        listener,
        rank_0_ip,
        segment: None,
    })
}

/// Rank 0's answer to all: the session's key under the receiver's pad, and the list of ranks.
pub(super) fn seal_roster(key: &SessionKey, known: &Known, roster: &[u8]) -> Vec<u8> {
    let hidden = key.iter().zip(&known.pad).map(|(key, pad)| key ^ pad);
    hidden.chain(roster.iter().copied()).collect()
}

fn open_roster(body: &[u8], known: &Known) -> Result<(SessionKey, Roster)> {
    let (hidden, roster) = body
        .split_first_chunk::<{ secret::SIZE }>()
        .ok_or_else(|| Error::failed("rank 0 sent a list of ranks without a key"))?;
    let mut key = *hidden;
    key.iter_mut().zip(&known.pad).for_each(|(k, p)| *k ^= p);
    Ok((key, decode(roster)?))
}

/// Looks after rank 0's process meanwhile, where this rank is its child.
fn wait_for_answer(world: &World, stream: &TcpStream, deadline: Instant) -> Result<()> {
    let Some(mut rank_0) = Stopped::parent_of(world) else {
        return Ok(());
    };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
    while Instant::now() < deadline {
        match stream.peek(&mut [0]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => break,
        }
        rank_0.check()?;
    }
    Ok(())
}

fn find_rank_0(world: &World, timeout: Duration) -> Result<(TcpStream, Known)> {
    let Rendezvous::At { host, ports } = &world.rendezvous else {
        return Err(Error::failed("there is no address to meet at"));
    };
    let mut deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(10);
    let mut reason = String::new();
    let mut parent = Stopped::parent_of(world);
    while Instant::now() < deadline {
        for &port in ports {
            let left = deadline.saturating_duration_since(Instant::now());
            // With one port, whoever listens may just be slow; with several, the next one may be right.
            let patience = match (ports.len(), &parent) {
                (1, None) => left,
                _ => left.min(ANSWER_TIME),
            };
            match resolve(host, port)
                .map_err(Refused::Io)
                .and_then(|a| connect(&a, world, patience))
            {
                Ok(met) => return Ok(met),
                Err(Refused::Io(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(why) => {
                    if matches!(why, Refused::Unproved(_)) && world.secret.missing().is_some() {
                        deadline = deadline.min(Instant::now() + HOPELESS);
                    }
                    reason = reason_of(port, &why);
                }
            }
        }
        if let Some(parent) = &mut parent {
            parent.check()?;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
    let ports = match ports.as_slice() {
        [one] => one.to_string(),
        [first, ..] => format!("{first} or the ports that follow it"),
        [] => String::new(),
    };
    Err(Error::failed(format!(
        "rank 0 never arrived at {host}:{ports} within {} s{reason}",
        timeout.as_secs_f64()
    )))
}

fn reason_of(port: u16, why: &Refused) -> String {
    match why {
        Refused::Unproved(why) => format!(
            " (what listens at port {port} could not be known: {why}): set {} to the same random text on every rank",
            secret::VARIABLE
        ),
        other => format!(" (port {port}: {other})"),
    }
}

/// Where `host` is, IPv4 first: a cluster's IPv6 names often lead nowhere.
pub(super) fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if host == LOCALHOST {
        let both = [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            Ipv6Addr::LOCALHOST.into(),
        ];
        return Ok(both.map(|ip| SocketAddr::new(ip, port)).to_vec());
    }
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    addresses.sort_by_key(|a| a.is_ipv6());
    Ok(addresses)
}

pub(super) fn connect(
    addresses: &[SocketAddr],
    world: &World,
    patience: Duration,
) -> Result<(TcpStream, Known), Refused> {
    let greeting = Greeting::new(world.token, world.rank, world.size);
    let trust = Trust {
        secret: world.secret.clone(),
        owner: true,
    };
    let mut last = Refused::Io(io::ErrorKind::ConnectionRefused.into());
    for address in addresses {
        let limit = patience.clamp(Duration::from_millis(1), CONNECT_TIME);
        let tried = TcpStream::connect_timeout(address, limit)
            .map_err(Refused::Io)
            .and_then(|stream| {
                let patience = patience.max(Duration::from_millis(1));
                let known = handshake::greet(&stream, &greeting, &trust, patience)?;
                Ok((stream, known))
            });
        match tried {
            Ok(met) => return Ok(met),
            // Of several addresses, what was found at one says more than that another is silent.
            Err(Refused::Io(_)) if !matches!(last, Refused::Io(_)) => {}
            Err(why) => last = why,
        }
    }
    Err(last)
}

impl Met {
    pub fn hellos(&self) -> Vec<Hello> {
        self.roster.seats.iter().map(|s| s.hello.clone()).collect()
    }

    /// The memory that the ranks of one machine share, if this rank can have it; the outer `None` where no rank can.
    pub fn segment(&mut self, rank: usize) -> Option<io::Result<Segment>> {
        let descriptor = self.roster.segment?;
        let pid = self.roster.seats[0].hello.pid;
        let size = self.roster.seats.len();
        Some(match self.segment.take() {
            Some(segment) if rank == 0 => Ok(segment),
            _ => Segment::open(pid, descriptor, size, self.roster.session),
        })
    }

    /// One data connection between every two ranks, by rank: each connects to those below it.
    pub fn mesh(self, rank: usize) -> Result<Vec<Option<TcpStream>>> {
        let Roster { session, seats, .. } = self.roster;
        let size = seats.len();
        let deadline = Instant::now() + MESH_TIME;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut peers: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
        // The session's key is known to its ranks alone, wherever they are.
        let trust = Trust {
            secret: Secret::of_key(self.key),
            owner: false,
        };
        let rules = Rules {
            token: session,
            trust: trust.clone(),
            with_hello: false,
        };
        let door = Door::new(Arc::new(vec![self.listener]), rules)
            .map_err(|e| Error::failed(format!("cannot listen: {e}")))?;
        for (other, seat) in seats.iter().enumerate().take(rank) {
            let address = SocketAddr::new(seat.ip.unwrap_or(self.rank_0_ip), seat.data_port);
            let greeting = Greeting::new(session, rank, size);
            let stream = TcpStream::connect_timeout(&address, left().max(CONNECT_TIME))
                .map_err(Refused::Io)
                .and_then(|s| {
                    handshake::greet(&s, &greeting, &trust, left().max(ANSWER_TIME))?;
                    wire::tune(&s)?;
                    Ok(s)
                })
                .map_err(|e| {
                    Error::failed(format!(
                        "cannot reach rank {other} ({}) at {address}: {e}",
                        seat.hello.host
                    ))
                })?;
            peers[other] = Some(stream);
        }
        while peers.iter().skip(rank + 1).any(Option::is_none) {
            let Some(arrival) = door.next(left()) else {
                let missing: Vec<usize> =
                    (rank + 1..size).filter(|&r| peers[r].is_none()).collect();
                return Err(Error::failed(format!(
                    "no data connection from rank {} within {} s",
                    list_ranks(&missing),
                    MESH_TIME.as_secs()
                )));
            };
            let other = arrival.greeting.rank as usize;
            if other > rank && other < size && peers[other].is_none() {
                peers[other] = Some(arrival.stream);
            }
        }
        Ok(peers)
    }
}

/// Whether the peer is gone; leaves the stream as it was.
pub(super) fn has_closed(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let closed = match stream.peek(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() != io::ErrorKind::WouldBlock,
    };
    let _ = stream.set_nonblocking(false);
    closed
}

fn end_of_stream(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => "its connection closed".into(),
        _ => e.to_string(),
    }
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|e| Error::failed(format!("cannot encode a message: {e}")))
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    postcard::from_bytes(bytes)
        .map_err(|e| Error::failed(format!("a message from rank 0 does not decode: {e}")))
}
