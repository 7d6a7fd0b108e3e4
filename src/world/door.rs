//! A listening socket that lets in the ranks of this run, and nobody else, without ever waiting for a stranger.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::wire::{self, By, Greeting, Kind};

/// Time from a connection to its complete greeting; a rank sends it in one go.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Connections that may be greeting at once; more are dropped, and a rank among them tries again.
const MAX_GREETING: usize = 256;
const POLL: Duration = Duration::from_millis(2);

/// A connection whose peer has shown that it belongs to the run.
pub(super) struct Arrival {
    pub greeting: Greeting,
    pub stream: TcpStream,
    /// Body of the hello frame, where the door asks for one.
    pub hello: Vec<u8>,
}

pub(super) struct Door {
    listener: Arc<TcpListener>,
    token: u64,
    with_hello: bool,
    greeting: Arc<AtomicUsize>,
    sender: Sender<Arrival>,
    arrivals: Receiver<Arrival>,
}

impl Door {
    pub fn new(listener: Arc<TcpListener>, token: u64, with_hello: bool) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, arrivals) = channel();
        Ok(Door {
            listener,
            token,
            with_hello,
            greeting: Arc::default(),
            sender,
            arrivals,
        })
    }

    /// The next rank to come in, or `None` when there was none for `patience`.
    pub fn next(&self, patience: Duration) -> Option<Arrival> {
        let until = Instant::now() + patience;
        loop {
            while let Ok((stream, _)) = self.listener.accept() {
                self.greet(stream);
            }
            match self.arrivals.recv_timeout(POLL) {
                Ok(arrival) => return Some(arrival),
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => {}
                Err(_) => return None,
            }
        }
    }

    /// Each caller greets on a thread of its own, so that a silent one holds up nobody.
    fn greet(&self, stream: TcpStream) {
        if self.greeting.fetch_add(1, Ordering::Relaxed) >= MAX_GREETING {
            self.greeting.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let (token, with_hello) = (self.token, self.with_hello);
        let (greeting, sender) = (self.greeting.clone(), self.sender.clone());
        let thread = std::thread::Builder::new().name("greeter".into());
        let started = thread.spawn(move || {
            match receive(stream, token, with_hello) {
                // The door may be closed by now; then nobody waits for this rank either.
                Ok(arrival) => drop(sender.send(arrival)),
                Err(e) => tracing::debug!("a connection was turned away: {e}"),
            }
            greeting.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            self.greeting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn receive(stream: TcpStream, token: u64, with_hello: bool) -> io::Result<Arrival> {
    stream.set_nonblocking(false)?;
    let deadline = Instant::now() + GREETING_TIME;
    let greeting = wire::answer(&stream, token, deadline)?;
    let mut hello = Vec::new();
    if with_hello {
        let mut reader = By {
            stream: &stream,
            deadline,
        };
        let (kind, body) = wire::read_frame(&mut &mut reader, wire::MAX_HELLO)?;
        if kind != Kind::Hello {
            return Err(io::Error::other("not a hello"));
        }
        hello = body;
    }
    wire::tune(&stream)?;
    Ok(Arrival {
        greeting,
        stream,
        hello,
    })
}

/// Listens on this machine only, or for all.
pub(super) fn listen(loopback: bool, port: u16) -> io::Result<TcpListener> {
    if loopback {
        return TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    }
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        }
        bound => bound,
    }
}
