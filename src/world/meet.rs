//! The rendezvous: all ranks come to rank 0, say what they found, and get the list of all, or one error.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::door::{Door, listen};
use super::hello::{self, Hello, list_ranks};
use super::host::Host;
use super::wire::{self, By, Greeting, Kind};
use super::{Rendezvous, World};
use crate::comm::Segment;
use crate::{Error, Result};

/// How long the other ranks are waited for when one has already failed: long enough to hear whether all fail alike.
pub(super) const GRACE: Duration = Duration::from_secs(8);
/// How long a listener on one of several candidate ports may take to show that it is rank 0.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(1);
const CONNECT_TIME: Duration = Duration::from_secs(2);
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

/// All ranks are here and agree; the data connections are still to be made.
pub(super) struct Met {
    pub roster: Roster,
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
    if world.rank == 0 {
        Host::new(world, hello, timeout)?.run()
    } else {
        join(world, hello, timeout)
    }
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
    let stream = find_rank_0(world, timeout).map_err(speak_for_itself)?;
    let address = stream.peer_addr().map_err(lost)?;
    let rank_0_ip = address.ip().to_canonical();
    let Rendezvous::At { host, .. } = &world.rendezvous else {
        return Err(Error::failed("there is no address to meet at"));
    };
    let listener = listen(is_loopback(host), 0).map_err(lost)?;
    let card = Card {
        data_port: listener.local_addr().map_err(lost)?.port(),
        hello: hello.clone(),
    };
    wire::tune(&stream).map_err(lost)?;
    wire::write_frame(&stream, Kind::Hello, &encode(&card)?).map_err(lost)?;
    // Rank 0 may have come last, and gives the others its whole time-out.
    let mut reader = By {
        stream: &stream,
        deadline: Instant::now() + timeout + GRACE,
    };
    let (kind, body) = wire::read_frame(&mut &mut reader, wire::MAX_FRAME).map_err(lost)?;
    let roster = match kind {
        Kind::Fail => {
            let verdict: Verdict = decode(&body)?;
            tracing::debug!("rank 0 says: {}", verdict.line);
            return Err(Error::Told(verdict.code));
        }
        Kind::Roster => decode::<Roster>(&body)?,
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
        controls,
        listener,
        rank_0_ip,
        segment: None,
    })
}

fn find_rank_0(world: &World, timeout: Duration) -> Result<TcpStream> {
    let Rendezvous::At { host, ports } = &world.rendezvous else {
        return Err(Error::failed("there is no address to meet at"));
    };
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(10);
    let mut reason = String::new();
    while Instant::now() < deadline {
        for &port in ports {
            let left = deadline.saturating_duration_since(Instant::now());
            // With one port, whoever listens may just be slow; with several, the next one may be right.
            let patience = if ports.len() == 1 {
                left
            } else {
                left.min(ANSWER_TIME)
            };
            let tried = resolve(host, port).and_then(|a| connect(&a, world, patience));
            match tried {
                Ok(stream) => return Ok(stream),
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(e) => reason = format!(" (port {port}: {e})"),
            }
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

pub(super) fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    // IPv4 first: a cluster's IPv6 names often lead nowhere.
    addresses.sort_by_key(|a| a.is_ipv6());
    Ok(addresses)
}

pub(super) fn connect(
    addresses: &[SocketAddr],
    world: &World,
    patience: Duration,
) -> io::Result<TcpStream> {
    let greeting = Greeting::new(world.token, world.rank, world.size);
    let mut last = io::Error::other("no address");
    for address in addresses {
        let limit = patience.clamp(Duration::from_millis(1), CONNECT_TIME);
        let tried = TcpStream::connect_timeout(address, limit).and_then(|stream| {
            wire::greet(&stream, &greeting, patience.max(Duration::from_millis(1)))?;
            Ok(stream)
        });
        match tried {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
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
        let listener = Arc::new(self.listener);
        let door = Door::new(listener, session, false)
            .map_err(|e| Error::failed(format!("cannot listen: {e}")))?;
        for (other, seat) in seats.iter().enumerate().take(rank) {
            let address = SocketAddr::new(seat.ip.unwrap_or(self.rank_0_ip), seat.data_port);
            let stream = TcpStream::connect_timeout(&address, left().max(CONNECT_TIME))
                .and_then(|s| {
                    wire::greet(
                        &s,
                        &Greeting::new(session, rank, size),
                        left().max(ANSWER_TIME),
                    )?;
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

pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
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

/// Random enough to tell sessions apart; no secret hangs on it.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value).map_err(|e| Error::failed(format!("cannot encode a message: {e}")))
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    postcard::from_bytes(bytes)
        .map_err(|e| Error::failed(format!("a message from rank 0 does not decode: {e}")))
}
