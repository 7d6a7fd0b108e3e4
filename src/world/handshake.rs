//! How two ranks know each other before either believes a word of the other.
//!
//! On one machine the kernel says whose process is at the other end ([`owner`]), and that decides: another user's
//! is turned away, whatever it knows. Between machines each side proves that it has the run's secret, over both
//! sides' random numbers, all that was said, and the two ends of the connection. So the proof of one connection
//! serves in no other, and a relay has nothing to pass on. (Behind a translation of addresses the two sides see
//! different ends: ranks must reach each other directly, as the data connections need it anyway.)

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::owner::{self, Owner};
use super::secret::{self, Proof, Secret};
use super::wire::By;

/// The last byte counts the layouts. What follows it up to the random number stays as it is: another version must
/// be able to prove itself before its version is held against it.
const ASK: &[u8; 8] = b"tandem?\x02";
const ANSWER: &[u8; 8] = b"tandem!\x02";
const NONCE: usize = 32;
const GREETING: usize = 8 + 8 + 16 + 4 + 4 + NONCE;
const REPLY: usize = 8 + 8 + 1 + NONCE + secret::SIZE;

/// The greeting of the connecting side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Greeting {
    /// Names the run (or, between data sockets, the session).
    pub token: u64,
    /// Crate version, up to 16 bytes: known before anything whose layout may differ between versions.
    pub version: [u8; 16],
    pub rank: u32,
    pub size: u32,
}

/// What a side knows the other by.
#[derive(Clone)]
pub(super) struct Trust {
    pub secret: Secret,
    /// Whether a process of the same user on this machine needs no secret.
    pub owner: bool,
}

/// Why a connection came to nothing.
#[derive(Debug)]
pub(super) enum Refused {
    Io(io::Error),
    /// Nothing there that speaks as a rank of this run does.
    NotOurs,
    /// Another user's process on this machine.
    Stranger,
    /// It speaks as a rank of this run, but does not prove that it is one, or does not believe us; and why.
    Unproved(String),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        Refused::Io(e)
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refused::Io(e) => write!(f, "{e}"),
            Refused::NotOurs => f.write_str("not a rank of this run"),
            Refused::Stranger => f.write_str("a process of another user"),
            Refused::Unproved(why) => f.write_str(why),
        }
    }
}

/// A connection whose other side is known; the pad hides what only that side should read.
pub(super) struct Known {
    pub pad: [u8; secret::SIZE],
}

impl Greeting {
    pub fn new(token: u64, rank: usize, size: usize) -> Self {
        let mut version = [0; 16];
        for (to, from) in version.iter_mut().zip(env!("CARGO_PKG_VERSION").bytes()) {
            *to = from;
        }
        Greeting {
            token,
            version,
            rank: rank as u32,
            size: size as u32,
        }
    }

    /// The version as text.
    pub fn version(&self) -> String {
        String::from_utf8_lossy(&self.version)
            .trim_end_matches('\0')
            .to_owned()
    }

    pub fn to_bytes(&self, nonce: [u8; NONCE]) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        bytes[..8].copy_from_slice(ASK);
        bytes[8..16].copy_from_slice(&self.token.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.version);
        bytes[32..36].copy_from_slice(&self.rank.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.size.to_le_bytes());
        bytes[40..].copy_from_slice(&nonce);
        bytes
    }

    fn from_bytes(bytes: &[u8; GREETING]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let token = u64::from(word(8)) | u64::from(word(12)) << 32;
        let mut version = [0; 16];
        version.copy_from_slice(&bytes[16..32]);
        (&bytes[..8] == ASK).then(|| Greeting {
            token,
            version,
            rank: word(32),
            size: word(36),
        })
    }
}

/// What a connection's proofs are about.
struct Transcript<'a> {
    greeting: &'a [u8; GREETING],
    /// The listener's reply up to its proof.
    reply: &'a [u8],
    ends: Vec<u8>,
}

impl Transcript<'_> {
    fn parts(&self) -> [&[u8]; 3] {
        [self.greeting, self.reply, &self.ends]
    }

    fn proof(&self, secret: &Secret, side: &[u8]) -> Proof {
        // Without a secret there is nothing to show; zeros prove nothing to anybody.
        secret.proof(side, &self.parts()).unwrap_or_default()
    }

    fn is_proved(&self, secret: &Secret, side: &[u8], proof: &Proof) -> bool {
        secret.is_proved_by(proof, side, &self.parts())
    }

    /// Nothing on this machine, where the kernel carries the bytes; a key that both can make elsewhere.
    fn known(&self, secret: &Secret, by_owner: bool) -> Known {
        let pad = if by_owner {
            None
        } else {
            secret.proof(PAD, &self.parts())
        };
        Known {
            pad: pad.unwrap_or_default(),
        }
    }
}

const LISTENER: &[u8] = b"tandem: the listening side";
const CONNECTOR: &[u8] = b"tandem: the connecting side";
const PAD: &[u8] = b"tandem: the pad";

/// Both ends of a connection, the connecting one first.
fn ends(connecting: SocketAddr, listening: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::new();
    for end in [connecting, listening].map(owner::canonical) {
        match end.ip() {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
        bytes.extend(end.port().to_le_bytes());
    }
    bytes
}

/// The connecting side: greets, and makes sure of who answers before it proves anything itself.
pub(super) fn greet(
    stream: &TcpStream,
    greeting: &Greeting,
    trust: &Trust,
    patience: Duration,
) -> Result<Known, Refused> {
    let deadline = Instant::now() + patience;
    if trust.owner && owner::of_peer(stream) == Owner::Stranger {
        return Err(Refused::Stranger);
    }
    let nonce = secret::random().map_err(io::Error::other)?;
    let greeting = greeting.to_bytes(nonce);
    stream.set_write_timeout(Some(patience))?;
    (&mut &*stream).write_all(&greeting)?;
    let mut reply = [0; REPLY];
    read_by(stream, &mut reply[..8], deadline)?;
    if &reply[..8] != ANSWER {
        return Err(Refused::NotOurs);
    }
    read_by(stream, &mut reply[8..], deadline)?;
    if reply[8..16] != greeting[8..16] {
        return Err(Refused::NotOurs);
    }
    let they_know_us = reply[16] == 1;
    // Whoever has answered has taken the connection: now the kernel knows whose it is.
    let owner = match trust.owner {
        true => owner::of_peer(stream),
        false => Owner::Unknown,
    };
    let (said, theirs) = reply.split_at(REPLY - secret::SIZE);
    let transcript = Transcript {
        greeting: &greeting,
        reply: said,
        ends: ends(stream.local_addr()?, stream.peer_addr()?),
    };
    let proved = Proof::try_from(theirs)
        .is_ok_and(|theirs| transcript.is_proved(&trust.secret, LISTENER, &theirs));
    match owner {
        Owner::Stranger => return Err(Refused::Stranger),
        Owner::Us if they_know_us => {}
        _ if proved => {}
        _ => return Err(unproved(&trust.secret)),
    }
    let proof = transcript.proof(&trust.secret, CONNECTOR);
    (&mut &*stream).write_all(&proof)?;
    Ok(transcript.known(&trust.secret, they_know_us))
}

fn unproved(secret: &Secret) -> Refused {
    Refused::Unproved(match secret.missing() {
        Some(why) => format!("no secret to know it by: {why}"),
        None => "it has another secret, or something stands between".to_owned(),
    })
}

/// The listening side: reads a greeting, answers it if its token is ours, and makes sure of who it is.
pub(super) fn answer(
    stream: &TcpStream,
    token: u64,
    trust: &Trust,
    deadline: Instant,
) -> Result<(Greeting, Known), Refused> {
    let owner = match trust.owner {
        true => owner::of_peer(stream),
        false => Owner::Unknown,
    };
    if owner == Owner::Stranger {
        return Err(Refused::Stranger);
    }
    let mut bytes = [0; GREETING];
    // What is no rank shows in its first bytes; it is not waited for.
    read_by(stream, &mut bytes[..8], deadline)?;
    if &bytes[..8] != ASK {
        return Err(Refused::NotOurs);
    }
    read_by(stream, &mut bytes[8..], deadline)?;
    let greeting = Greeting::from_bytes(&bytes).filter(|g| g.token == token);
    let greeting = greeting.ok_or(Refused::NotOurs)?;
    let nonce: [u8; NONCE] = secret::random().map_err(io::Error::other)?;
    let known = owner == Owner::Us;
    let mut reply = Vec::with_capacity(REPLY);
    reply.extend(ANSWER);
    reply.extend(token.to_le_bytes());
    reply.push(u8::from(known));
    reply.extend(nonce);
    let transcript = Transcript {
        greeting: &bytes,
        reply: &reply.clone(),
        ends: ends(stream.peer_addr()?, stream.local_addr()?),
    };
    reply.extend(transcript.proof(&trust.secret, LISTENER));
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    (&mut &*stream).write_all(&reply)?;
    let mut theirs = Proof::default();
    // A rank that does not believe our proof goes without giving its own.
    let read = read_by(stream, &mut theirs, deadline);
    if !known && (read.is_err() || !transcript.is_proved(&trust.secret, CONNECTOR, &theirs)) {
        return Err(unproved(&trust.secret));
    }
    read?;
    Ok((greeting, transcript.known(&trust.secret, known)))
}

/// Fills `buffer` before `deadline`, however slowly the bytes drip.
fn read_by(stream: &TcpStream, buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    (&mut By { stream, deadline }).read_exact(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const TOKEN: u64 = 0x0123_4567_89ab_cdef;

    #[test]
    fn a_greeting_survives_the_wire() {
        let greeting = Greeting::new(TOKEN, 3, 4);
        assert_eq!(
            Greeting::from_bytes(&greeting.to_bytes([7; NONCE])),
            Some(greeting.clone())
        );
        assert_eq!(greeting.version(), env!("CARGO_PKG_VERSION"));
    }

    fn trust(text: &str, owner: bool) -> Trust {
        let secret = match text {
            "" => Secret::none("none given"),
            text => {
                let mut key = [0; secret::SIZE];
                key[..text.len()].copy_from_slice(text.as_bytes());
                Secret::of_key(key)
            }
        };
        Trust { secret, owner }
    }

    /// Both sides' outcomes.
    fn meet(connector: Trust, listener: Trust) -> (Result<Known, Refused>, Result<Known, Refused>) {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        std::thread::scope(|scope| {
            let there = scope.spawn(move || {
                let (stream, _) = socket.accept().unwrap();
                let deadline = Instant::now() + Duration::from_secs(20);
                answer(&stream, TOKEN, &listener, deadline).map(|(greeting, known)| {
                    assert_eq!(greeting, Greeting::new(TOKEN, 1, 2));
                    known
                })
            });
            let stream = TcpStream::connect(address).unwrap();
            let greeting = Greeting::new(TOKEN, 1, 2);
            let here = greet(&stream, &greeting, &connector, Duration::from_secs(20));
            drop(stream);
            (here, there.join().unwrap())
        })
    }

    #[test]
    fn the_same_user_or_the_same_secret_is_let_in() {
        // On one machine the owner is enough, and nothing is hidden.
        for (a, b) in [("", ""), ("one", ""), ("", "two"), ("one", "two")] {
            let (here, there) = meet(trust(a, true), trust(b, true));
            assert_eq!((here.unwrap().pad, there.unwrap().pad), ([0; 32], [0; 32]));
        }
        // As between machines: the secret decides, and both sides make the same pad of it.
        for (a, b) in [(false, false), (true, false), (false, true)] {
            let (here, there) = meet(trust("one", a), trust("one", b));
            assert_eq!(here.unwrap().pad, there.unwrap().pad);
        }
    }

    #[test]
    fn without_the_secret_nobody_is_let_in_on_either_side() {
        for (a, b) in [("", ""), ("one", ""), ("", "one"), ("one", "two")] {
            let (here, there) = meet(trust(a, false), trust(b, false));
            assert!(matches!(here, Err(Refused::Unproved(_))), "{a} {b}");
            assert!(there.is_err(), "{a} {b}");
        }
    }

    #[test]
    fn a_relay_has_nothing_to_pass_on() {
        let real = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = TcpListener::bind("127.0.0.1:0").unwrap();
        let (to, front) = (real.local_addr().unwrap(), relay.local_addr().unwrap());
        std::thread::scope(|scope| {
            let rank_0 = scope.spawn(move || {
                let (stream, _) = real.accept().unwrap();
                let deadline = Instant::now() + Duration::from_secs(20);
                answer(&stream, TOKEN, &trust("one", false), deadline).is_ok()
            });
            scope.spawn(move || {
                let (near, _) = relay.accept().unwrap();
                let far = TcpStream::connect(to).unwrap();
                let back = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let copy = |mut from: TcpStream, mut to: TcpStream| {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                };
                std::thread::spawn(move || copy(back.1, back.0));
                copy(near, far);
            });
            let stream = TcpStream::connect(front).unwrap();
            let greeting = Greeting::new(TOKEN, 1, 2);
            let here = greet(
                &stream,
                &greeting,
                &trust("one", false),
                Duration::from_secs(20),
            );
            assert!(matches!(here, Err(Refused::Unproved(_))));
            drop(stream);
            assert!(!rank_0.join().unwrap());
        });
    }
}
