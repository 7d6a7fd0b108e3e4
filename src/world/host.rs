//! Rank 0's side of the rendezvous: let everybody in, compare, and give all the same answer.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::door::{
    Arrival, Door, Rules, listen_at, listen_everywhere, listen_for_data, listen_here,
};
use super::handshake::{Greeting, Known, Trust};
use super::hello::{self, Failure, Hello, list_ranks};
use super::meet::{
    ANSWER_TIME, Card, GRACE, Met, Roster, Seat, Verdict, connect, encode, has_closed, resolve,
    seal_roster,
};
use super::spawn::Stopped;
use super::wire::{self, Kind};
use super::{LOCALHOST, Rendezvous, World, owner, secret};
use crate::comm::Segment;
use crate::{Error, Result};

/// How long rank 0 stays to tell the ranks that come after an error.
const LATE: Duration = Duration::from_secs(3);
/// Rank 0's side.
pub(super) struct Host<'a> {
    world: &'a World,
    door: Door,
    data: TcpListener,
    timeout: Duration,
    seats: BTreeMap<usize, Seat>,
    streams: BTreeMap<usize, (TcpStream, Known)>,
    /// Connections that belong to no seat, but wait for the verdict all the same.
    surplus: Vec<TcpStream>,
    /// Whether those who are missing have had their time.
    waited: bool,
    /// Processes that this one has started and that do not move.
    stopped: Vec<Stopped>,
}

impl<'a> Host<'a> {
    pub fn new(world: &'a World, hello: Hello, timeout: Duration) -> Result<Self> {
        let own_error = hello.error.clone();
        // Its own earlier error matters more than a port that cannot be had.
        let or_own = |e: Error| match &own_error {
            Some((code, line)) => hello::with_code(*code, line.clone()),
            None => e,
        };
        let listeners = control_listeners(world).map_err(or_own)?;
        let io_error = |e: io::Error| or_own(Error::failed(format!("cannot listen: {e}")));
        let ip = match listeners.as_slice() {
            [one] => one.local_addr().map_err(io_error)?.ip(),
            _ => Ipv6Addr::UNSPECIFIED.into(),
        };
        let data = listen_for_data(ip, world.stays_here()).map_err(io_error)?;
        let seat = Seat {
            hello,
            data_port: data.local_addr().map_err(io_error)?.port(),
            ip: None,
        };
        let rules = Rules {
            token: world.token,
            trust: Trust {
                secret: world.secret.clone(),
                owner: true,
            },
            with_hello: true,
        };
        Ok(Host {
            world,
            door: Door::new(listeners, rules).map_err(io_error)?,
            data,
            timeout,
            seats: BTreeMap::from([(0, seat)]),
            streams: BTreeMap::new(),
            surplus: Vec::new(),
            waited: false,
            stopped: Stopped::children_of(world),
        })
    }

    pub fn run(mut self) -> Result<Met> {
        match self.gather() {
            Ok(()) => self.seat_all(),
            Err(error) => {
                if !self.waited {
                    self.let_the_late_in();
                }
                let verdict = Verdict::of(&error);
                let seated = self.streams.values().map(|(stream, _)| stream);
                let streams = seated.chain(&self.surplus);
                verdict.tell(&streams.collect::<Vec<_>>());
                Err(error)
            }
        }
    }

    fn gather(&mut self) -> Result<()> {
        let start = Instant::now();
        let mut failed_at = None;
        while self.seats.len() < self.world.size {
            if self.failures().is_empty() {
                if start.elapsed() >= self.timeout {
                    self.waited = true;
                    return Err(self.missing());
                }
            } else {
                let since = *failed_at.get_or_insert_with(Instant::now);
                if since.elapsed() >= GRACE.min(self.timeout) {
                    self.waited = true;
                    break;
                }
            }
            if let Some(arrival) = self.door.next(Duration::from_millis(20)) {
                self.welcome(arrival)?;
            }
            self.notice_the_lost()?;
        }
        if let Some(error) = hello::root_cause(&self.failures(), self.world.size) {
            return Err(error);
        }
        let hellos: Vec<Hello> = self.seats.values().map(|s| s.hello.clone()).collect();
        hello::check(&hellos)
    }

    fn welcome(&mut self, arrival: Arrival) -> Result<()> {
        let Arrival {
            greeting,
            known,
            stream,
            hello,
        } = arrival;
        let (rank, size) = (greeting.rank as usize, greeting.size as usize);
        let ip = stream.peer_addr().ok().map(|a| a.ip().to_canonical());
        let from = ip.map(|ip| ip.to_string()).unwrap_or_default();
        let ours = Greeting::new(0, 0, 0).version();
        if greeting.version() != ours {
            self.surplus.push(stream);
            return Err(hello::versions_differ(
                rank,
                &from,
                &greeting.version(),
                &ours,
            ));
        }
        // One version, one layout: what does not decode comes from no rank of ours.
        let Ok(card) = postcard::from_bytes::<Card>(&hello) else {
            tracing::debug!("a hello from {from} that does not decode was dropped");
            return Ok(());
        };
        let host = card.hello.host.clone();
        if size != self.world.size || rank >= size || card.hello.rank != rank {
            self.surplus.push(stream);
            return Err(Error::failed(format!(
                "rank {rank} ({host}) counts {size} ranks, rank 0 counts {}: start all ranks with one command",
                self.world.size
            )));
        }
        if let Some(other) = self.seats.get(&rank) {
            let (other, pid) = (&other.hello.host, other.hello.pid);
            self.surplus.push(stream);
            return Err(Error::failed(format!(
                "two processes say that they are rank {rank}: one on {other} (process {pid}), one on {host} (process {}); \
                 start one run at a time, or give each its own --rendezvous",
                card.hello.pid
            )));
        }
        let seat = Seat {
            hello: card.hello,
            data_port: card.data_port,
            ip: ip.filter(|ip| !ip.is_loopback()),
        };
        self.seats.insert(rank, seat);
        self.streams.insert(rank, (stream, known));
        Ok(())
    }

    /// After an early end, those still on their way get the verdict too, instead of waiting for a rank 0 that is gone.
    fn let_the_late_in(&mut self) {
        let until = Instant::now() + LATE;
        while 1 + self.streams.len() + self.surplus.len() < self.world.size {
            let left = until.saturating_duration_since(Instant::now());
            match self.door.next(left) {
                Some(arrival) => self.surplus.push(arrival.stream),
                None => break,
            }
        }
    }

    fn failures(&self) -> Vec<Failure> {
        let seats = self.seats.iter();
        seats
            .filter_map(|(&rank, seat)| {
                let (code, line) = seat.hello.error.clone()?;
                Some(Failure {
                    rank,
                    host: seat.hello.host.clone(),
                    code,
                    line,
                })
            })
            .collect()
    }

    /// A rank that ends while the others are still waited for.
    fn notice_the_lost(&mut self) -> Result<()> {
        let children = self.world.children.as_ref();
        if let Some((rank, how)) = children.and_then(|c| c.ended()) {
            return Err(Error::failed(format!(
                "rank {rank} {how} before the ranks had met"
            )));
        }
        self.stopped.iter_mut().try_for_each(Stopped::check)?;
        for (&rank, (stream, _)) in &self.streams {
            if self.seats[&rank].hello.error.is_none() && has_closed(stream) {
                return Err(Error::failed(format!(
                    "rank {rank} ({}) ended before the ranks had met (killed?)",
                    self.seats[&rank].hello.host
                )));
            }
        }
        Ok(())
    }

    fn missing(&self) -> Error {
        let size = self.world.size;
        let missing: Vec<usize> = (0..size).filter(|r| !self.seats.contains_key(r)).collect();
        let mut by_host: Vec<(&str, Vec<usize>)> = Vec::new();
        for (&rank, seat) in &self.seats {
            let host = seat.hello.host.as_str();
            match by_host.iter_mut().find(|(h, _)| *h == host) {
                Some((_, ranks)) => ranks.push(rank),
                None => by_host.push((host, vec![rank])),
            }
        }
        let here: Vec<String> = by_host
            .iter()
            .map(|(host, ranks)| format!("{} on {host}", list_ranks(ranks)))
            .collect();
        let unproved = match self.door.unproved() {
            0 => String::new(),
            n => format!(
                "; {n} that came did not prove to be of this run: set {} to the same random text on every rank",
                secret::VARIABLE
            ),
        };
        Error::failed(format!(
            "rank{} {} never arrived within {} s ({} of {size} are here: {}){unproved}",
            if missing.len() == 1 { "" } else { "s" },
            list_ranks(&missing),
            self.timeout.as_secs_f64(),
            self.seats.len(),
            here.join(", ")
        ))
    }

    fn seat_all(self) -> Result<Met> {
        let session = u64::from_le_bytes(secret::random()?);
        let key = secret::random()?;
        let seats: Vec<Seat> = self.seats.into_values().collect();
        let one_machine = seats.iter().all(|s| s.hello.host == seats[0].hello.host);
        let segment = one_machine
            .then(|| Segment::create(seats.len(), session).ok())
            .flatten();
        let roster = Roster {
            session,
            seats,
            segment: segment.as_ref().map(Segment::descriptor),
        };
        let body = encode(&roster)?;
        let mut controls: Vec<_> = (0..roster.seats.len()).map(|_| None).collect();
        for (rank, (stream, known)) in self.streams {
            let sealed = seal_roster(&key, &known, &body);
            // A rank that is gone by now shows as a closed connection to whoever watches it next.
            if let Err(e) = wire::write_frame(&stream, Kind::Roster, &sealed) {
                tracing::debug!("rank {rank} did not get the list of ranks: {e}");
            }
            controls[rank] = Some(stream);
        }
        Ok(Met {
            roster,
            key,
            controls,
            listener: self.data,
            // Nobody is before rank 0: it connects to no one.
            rank_0_ip: IpAddr::from(Ipv6Addr::LOCALHOST),
            segment,
        })
    }
}

fn control_listeners(world: &World) -> Result<Arc<Vec<TcpListener>>> {
    let (host, ports) = match &world.rendezvous {
        Rendezvous::Listening(listeners) => return Ok(listeners.clone()),
        Rendezvous::At { host, ports } => (host, ports),
        Rendezvous::None | Rendezvous::Unknown(_) => {
            return Err(Error::failed("there is no address to meet at"));
        }
    };
    let mut reasons = Vec::new();
    for &port in ports {
        match listen(world, host, port) {
            Ok(listeners) => {
                tracing::debug!("rank 0 listens at {host}:{port}");
                return Ok(Arc::new(listeners));
            }
            Err(e) => {
                if e.kind() == io::ErrorKind::AddrInUse && another_rank_0(world, host, port) {
                    return Err(Error::failed(format!(
                        "two processes say that they are rank 0, the other one listens at {host}:{port}: \
                         start one run at a time, or give each its own --rendezvous"
                    )));
                }
                reasons.push((port, e.to_string()));
            }
        }
    }
    Err(Error::failed(format!(
        "rank 0 cannot listen on any of its ports on {host} ({}): give --rendezvous HOST:PORT with a free port",
        list_reasons(&reasons)
    )))
}

/// `20001 and 7 others: Address already in use` where all say the same.
fn list_reasons(reasons: &[(u16, String)]) -> String {
    match reasons {
        [(port, why), rest @ ..] if !rest.is_empty() && rest.iter().all(|(_, w)| w == why) => {
            format!("{port} and {} others: {why}", rest.len())
        }
        _ => {
            let each = reasons.iter().map(|(port, why)| format!("{port}: {why}"));
            each.collect::<Vec<_>>().join("; ")
        }
    }
}

/// Listens where `host` leads to, and nowhere else.
fn listen(world: &World, host: &str, port: u16) -> io::Result<Vec<TcpListener>> {
    if host == LOCALHOST {
        return Ok(vec![listen_here(port)?]);
    }
    let addresses = resolve(host, port).unwrap_or_default();
    let only_here = addresses.iter().all(|a| a.ip().is_loopback());
    let is_a_name = host.parse::<IpAddr>().is_err();
    // On the machine itself its name may lead to 127.0.1.1, as Debian has it, while the others reach it by an address
    // of the network.
    if only_here && is_a_name && world.one_machine() != Some(true) {
        return Ok(vec![listen_everywhere(port)?]);
    }
    let mut listeners = Vec::new();
    for address in addresses {
        if address.ip().is_loopback() && !only_here {
            continue;
        }
        match listen_at(address) {
            Ok(listener) => listeners.push(listener),
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(e) => return Err(e),
        }
    }
    // None of them is this machine's own: they lead here by a translation, or not at all.
    if listeners.is_empty() {
        listeners.push(listen_everywhere(port)?);
    }
    Ok(listeners)
}

/// Whether the listener on a port that should be ours is a rank 0 of the same run.
fn another_rank_0(world: &World, host: &str, port: u16) -> bool {
    let Ok(addresses) = resolve(host, port) else {
        return false;
    };
    let ours: Vec<SocketAddr> = addresses
        .into_iter()
        .filter(|&address| !owner::a_stranger_listens_at(address))
        .collect();
    connect(&ours, world, ANSWER_TIME).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Source;

    fn addresses(host: &str, local_size: Option<usize>) -> Vec<IpAddr> {
        let world = World {
            size: 2,
            local_size,
            source: Source::Flags,
            ..World::alone()
        };
        let listeners = listen(&world, host, 0).unwrap();
        let ip = |l: &TcpListener| l.local_addr().unwrap().ip();
        listeners.iter().map(ip).collect()
    }

    #[test]
    fn rank_0_listens_where_its_name_leads_to() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for local_size in [None, Some(1), Some(2)] {
            assert_eq!(addresses("127.0.1.1", local_size), [ip("127.0.1.1")]);
            assert!(addresses(LOCALHOST, local_size)[0].is_loopback());
        }
        if TcpListener::bind("[::1]:0").is_ok() {
            assert_eq!(addresses("::1", None), [ip("::1")]);
        }
        // None of this machine's own addresses (kept for documents), or no name at all.
        for host in ["192.0.2.1", "no-such-name.invalid"] {
            assert!(addresses(host, Some(1))[0].is_unspecified(), "{host}");
        }
    }

    #[test]
    fn equal_reasons_are_told_once() {
        let reasons = |list: &[(u16, &str)]| {
            let list: Vec<_> = list.iter().map(|(p, w)| (*p, (*w).to_owned())).collect();
            list_reasons(&list)
        };
        assert_eq!(reasons(&[(7, "in use")]), "7: in use");
        assert_eq!(
            reasons(&[(7, "in use"), (8, "in use"), (9, "in use")]),
            "7 and 2 others: in use"
        );
        assert_eq!(
            reasons(&[(7, "in use"), (8, "denied")]),
            "7: in use; 8: denied"
        );
    }
}
