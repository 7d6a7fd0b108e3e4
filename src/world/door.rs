//! A listening socket that lets in the ranks of this run, and nobody else, without ever waiting for a stranger.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::handshake::{self, Greeting, Known, Refused, Trust};
use super::wire::{self, By, Kind};

/// Time from a connection to its complete greeting; a rank sends it in one go.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Connections that may be greeting at once; more are dropped, and a rank among them tries again.
const MAX_GREETING: usize = 256;
const POLL: Duration = Duration::from_millis(2);

/// A connection whose peer has shown that it belongs to the run.
pub(super) struct Arrival {
    pub greeting: Greeting,
    pub known: Known,
    pub stream: TcpStream,
    /// Body of the hello frame, where the door asks for one.
    pub hello: Vec<u8>,
}

pub(super) struct Door {
    listeners: Arc<Vec<TcpListener>>,
    rules: Rules,
    greeting: Arc<AtomicUsize>,
    unproved: Arc<AtomicUsize>,
    sender: Sender<Arrival>,
    arrivals: Receiver<Arrival>,
}

/// Who is let in.
#[derive(Clone)]
pub(super) struct Rules {
    pub token: u64,
    pub trust: Trust,
    /// Whether a hello frame follows the greeting.
    pub with_hello: bool,
}

impl Door {
    pub fn new(listeners: Arc<Vec<TcpListener>>, rules: Rules) -> io::Result<Self> {
        for listener in listeners.iter() {
            listener.set_nonblocking(true)?;
        }
        let (sender, arrivals) = channel();
        Ok(Door {
            listeners,
            rules,
            greeting: Arc::default(),
            unproved: Arc::default(),
            sender,
            arrivals,
        })
    }

    /// The next rank to come in, or `None` when there was none for `patience`.
    pub fn next(&self, patience: Duration) -> Option<Arrival> {
        let until = Instant::now() + patience;
        loop {
            for listener in self.listeners.iter() {
                while let Ok((stream, _)) = listener.accept() {
                    self.greet(stream);
                }
            }
            match self.arrivals.recv_timeout(POLL) {
                Ok(arrival) => return Some(arrival),
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => {}
                Err(_) => return None,
            }
        }
    }

    /// How many have called themselves ranks of this run and did not prove it.
    pub fn unproved(&self) -> usize {
        self.unproved.load(Ordering::Relaxed)
    }

    /// Each caller greets on a thread of its own, so that a silent one holds up nobody.
    fn greet(&self, stream: TcpStream) {
        if self.greeting.fetch_add(1, Ordering::Relaxed) >= MAX_GREETING {
            self.greeting.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let rules = self.rules.clone();
        let (greeting, sender) = (self.greeting.clone(), self.sender.clone());
        let unproved = self.unproved.clone();
        let thread = std::thread::Builder::new().name("greeter".into());
        let started = thread.spawn(move || {
            let from = stream.peer_addr();
            match receive(stream, &rules) {
                // The door may be closed by now; then nobody waits for this rank either.
                Ok(arrival) => drop(sender.send(arrival)),
                Err(why) => {
                    if let Refused::Unproved(_) = why {
                        unproved.fetch_add(1, Ordering::Relaxed);
                    }
                    tracing::debug!("a connection from {from:?} was turned away: {why}");
                }
            }
            greeting.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            self.greeting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn receive(stream: TcpStream, rules: &Rules) -> Result<Arrival, Refused> {
    stream.set_nonblocking(false)?;
    let deadline = Instant::now() + GREETING_TIME;
    let (greeting, known) = handshake::answer(&stream, rules.token, &rules.trust, deadline)?;
    let mut hello = Vec::new();
    if rules.with_hello {
        let mut reader = By {
            stream: &stream,
            deadline,
        };
        let (kind, body) = wire::read_frame(&mut &mut reader, wire::MAX_HELLO)?;
        if kind != Kind::Hello {
            return Err(Refused::NotOurs);
        }
        hello = body;
    }
    wire::tune(&stream)?;
    Ok(Arrival {
        greeting,
        known,
        stream,
        hello,
    })
}

/// Listens at `address`.
pub(super) fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
}

/// Listens for this machine alone.
pub(super) fn listen_here(port: u16) -> io::Result<TcpListener> {
    let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    listen_at(v4).or_else(|e| match e.kind() {
        io::ErrorKind::AddrInUse => Err(e),
        _ => listen_at(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)).map_err(|_| e),
    })
}

/// Listens at all addresses.
pub(super) fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    match listen_at(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
        Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
            listen_at(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
        }
        bound => bound,
    }
}

/// Listens at a port of the system's choice where the other ranks can reach this one: at `ip`, by which it reached
/// rank 0, or everywhere if that is an address that only its own machine knows and the others may be elsewhere.
pub(super) fn listen_for_data(ip: IpAddr, one_machine: bool) -> io::Result<TcpListener> {
    let ip = ip.to_canonical();
    if ip.is_unspecified() || (ip.is_loopback() && !one_machine) {
        listen_everywhere(0)
    } else {
        listen_at(SocketAddr::new(ip, 0))
    }
}
