//! Rank 0's side of the rendezvous: let everybody in, compare, and give all the same answer.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::door::{Arrival, Door, listen};
use super::hello::{self, Failure, Hello, list_ranks};
use super::meet::{
    ANSWER_TIME, Card, GRACE, Met, Roster, Seat, Verdict, connect, encode, has_closed, is_loopback,
    random, resolve,
};
use super::wire::{self, Greeting, Kind};
use super::{Rendezvous, World};
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
    streams: BTreeMap<usize, TcpStream>,
    /// Connections that belong to no seat, but wait for the verdict all the same.
    surplus: Vec<TcpStream>,
    /// Whether those who are missing have had their time.
    waited: bool,
}

impl<'a> Host<'a> {
    pub fn new(world: &'a World, hello: Hello, timeout: Duration) -> Result<Self> {
        let own_error = hello.error.clone();
        // Its own earlier error matters more than a port that cannot be had.
        let or_own = |e: Error| match &own_error {
            Some((code, line)) => hello::with_code(*code, line.clone()),
            None => e,
        };
        let listener = control_listener(world).map_err(or_own)?;
        let io_error = |e: io::Error| or_own(Error::failed(format!("cannot listen: {e}")));
        let loopback = listener.local_addr().map_err(io_error)?.ip().is_loopback();
        let data = listen(loopback, 0).map_err(io_error)?;
        let seat = Seat {
            hello,
            data_port: data.local_addr().map_err(io_error)?.port(),
            ip: None,
        };
        Ok(Host {
            world,
            door: Door::new(listener, world.token, true).map_err(io_error)?,
            data,
            timeout,
            seats: BTreeMap::from([(0, seat)]),
            streams: BTreeMap::new(),
            surplus: Vec::new(),
            waited: false,
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
                let streams = self.streams.values().chain(&self.surplus);
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
        self.streams.insert(rank, stream);
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
    fn notice_the_lost(&self) -> Result<()> {
        let children = self.world.children.as_ref();
        if let Some((rank, how)) = children.and_then(|c| c.ended()) {
            return Err(Error::failed(format!(
                "rank {rank} {how} before the ranks had met"
            )));
        }
        for (&rank, stream) in &self.streams {
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
        Error::failed(format!(
            "rank{} {} never arrived within {} s ({} of {size} are here: {})",
            if missing.len() == 1 { "" } else { "s" },
            list_ranks(&missing),
            self.timeout.as_secs_f64(),
            self.seats.len(),
            here.join(", ")
        ))
    }

    fn seat_all(self) -> Result<Met> {
        let session = random();
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
        for (rank, stream) in self.streams {
            // A rank that is gone by now shows as a closed connection to whoever watches it next.
            if let Err(e) = wire::write_frame(&stream, Kind::Roster, &body) {
                tracing::debug!("rank {rank} did not get the list of ranks: {e}");
            }
            controls[rank] = Some(stream);
        }
        Ok(Met {
            roster,
            controls,
            listener: self.data,
            rank_0_ip: IpAddr::from([127, 0, 0, 1]),
            segment,
        })
    }
}

fn control_listener(world: &World) -> Result<Arc<TcpListener>> {
    let (host, ports) = match &world.rendezvous {
        Rendezvous::Listening(listener) => return Ok(listener.clone()),
        Rendezvous::At { host, ports } => (host, ports),
        Rendezvous::None | Rendezvous::Unknown(_) => {
            return Err(Error::failed("there is no address to meet at"));
        }
    };
    let mut reasons = Vec::new();
    for &port in ports {
        match listen(is_loopback(host), port) {
            Ok(listener) => {
                tracing::debug!("rank 0 listens at {host}:{port}");
                return Ok(Arc::new(listener));
            }
            Err(e) => {
                if e.kind() == io::ErrorKind::AddrInUse && another_rank_0(world, host, port) {
                    return Err(Error::failed(format!(
                        "two processes say that they are rank 0, the other one listens at {host}:{port}: \
                         start one run at a time, or give each its own --rendezvous"
                    )));
                }
                reasons.push(format!("{port}: {e}"));
            }
        }
    }
    Err(Error::failed(format!(
        "rank 0 cannot listen on any of its ports on {host} ({}): give --rendezvous HOST:PORT with a free port",
        reasons.join("; ")
    )))
}

/// Whether the listener on a port that should be ours is a rank 0 of the same run.
fn another_rank_0(world: &World, host: &str, port: u16) -> bool {
    let Ok(address) = resolve(host, port) else {
        return false;
    };
    connect(&address, world, ANSWER_TIME).is_ok()
}
