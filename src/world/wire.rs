//! What goes over a socket: a fixed greeting that tells ranks of this run from everybody else, then frames.
//!
//! Nothing that arrives is believed: every length is bounded, memory grows only with the bytes that are really
//! there, and every read has a deadline until the peer has shown that it belongs to the run.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

/// Longest frame between ranks; a batch of prompts of 32k tokens is a hundredth of it.
pub(super) const MAX_FRAME: u32 = 64 << 20;
/// Longest frame from a peer that has only greeted.
pub(super) const MAX_HELLO: u32 = 256 << 10;

const ASK: &[u8; 8] = b"tandem?\x01";
const ANSWER: &[u8; 8] = b"tandem!\x01";
const GREETING: usize = 8 + 8 + 16 + 4 + 4;

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

    fn to_bytes(&self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        bytes[..8].copy_from_slice(ASK);
        bytes[8..16].copy_from_slice(&self.token.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.version);
        bytes[32..36].copy_from_slice(&self.rank.to_le_bytes());
        bytes[36..].copy_from_slice(&self.size.to_le_bytes());
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

/// Greets and waits for the answer: an error means that whoever listens there is not of this run.
pub(super) fn greet(stream: &TcpStream, greeting: &Greeting, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    stream.set_write_timeout(Some(patience))?;
    (&mut &*stream).write_all(&greeting.to_bytes())?;
    let mut answer = [0; 16];
    read_by(stream, &mut answer, deadline)?;
    if &answer[..8] != ANSWER || answer[8..] != greeting.token.to_le_bytes() {
        return Err(io::Error::other("not a rank of this run"));
    }
    Ok(())
}

/// Reads a greeting and answers it if its token is ours.
pub(super) fn answer(stream: &TcpStream, token: u64, deadline: Instant) -> io::Result<Greeting> {
    let mut bytes = [0; GREETING];
    // A stranger's first bytes give it away; it is not waited for.
    read_by(stream, &mut bytes[..8], deadline)?;
    if &bytes[..8] != ASK {
        return Err(io::Error::other("not a rank of this run"));
    }
    read_by(stream, &mut bytes[8..], deadline)?;
    let greeting = Greeting::from_bytes(&bytes).filter(|g| g.token == token);
    let greeting = greeting.ok_or_else(|| io::Error::other("not a rank of this run"))?;
    let mut answer = [0; 16];
    answer[..8].copy_from_slice(ANSWER);
    answer[8..].copy_from_slice(&token.to_le_bytes());
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    (&mut &*stream).write_all(&answer)?;
    Ok(greeting)
}

/// Fills `buffer` before `deadline`, however slowly the bytes drip.
fn read_by(stream: &TcpStream, buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    (&mut By { stream, deadline }).read_exact(buffer)
}

/// A reader that gives up at a deadline.
pub(super) struct By<'a> {
    pub stream: &'a TcpStream,
    pub deadline: Instant,
}

impl Read for &mut By<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        match stream.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            other => other,
        }
    }
}

/// Kinds of frames on a control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// What a rank found, after its greeting.
    Hello = 1,
    /// Rank 0's answer to all hellos.
    Roster = 2,
    /// Rank 0's word to all.
    Data = 3,
    /// A rank's own error on its way to rank 0, or rank 0's verdict on its way to all.
    Fail = 4,
    /// An orderly end.
    Bye = 5,
}

/// Writes one frame: kind, length, body.
pub(super) fn write_frame(mut stream: impl Write, kind: Kind, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).ok().filter(|&n| n <= MAX_FRAME);
    let length = length.ok_or_else(|| io::Error::other("the message is too long"))?;
    let mut frame = Vec::with_capacity(5 + body.len());
    frame.push(kind as u8);
    frame.extend(length.to_le_bytes());
    frame.extend(body);
    stream.write_all(&frame)
}

/// Reads one frame of at most `limit` bytes; `UnexpectedEof` when the peer has closed.
pub(super) fn read_frame(mut stream: impl Read, limit: u32) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let kind = match head[0] {
        1 => Kind::Hello,
        2 => Kind::Roster,
        3 => Kind::Data,
        4 => Kind::Fail,
        5 => Kind::Bye,
        _ => return Err(io::Error::other("not a frame")),
    };
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    if length > limit {
        return Err(io::Error::other("a frame longer than any"));
    }
    // `read_to_end` grows with what has come, not with what was announced.
    let mut body = Vec::new();
    stream.take(u64::from(length)).read_to_end(&mut body)?;
    if body.len() < length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, body))
}

/// A connection between ranks: no delay, and a lost machine shows within 8 s even when nothing is sent.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(3))
        .with_interval(Duration::from_secs(1))
        .with_retries(4);
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(8)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_survives_the_wire() {
        let greeting = Greeting::new(0x0123_4567_89ab_cdef, 3, 4);
        assert_eq!(
            Greeting::from_bytes(&greeting.to_bytes()),
            Some(greeting.clone())
        );
        assert_eq!(greeting.version(), env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn frames_have_a_bound() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Data, b"step").unwrap();
        assert_eq!(
            read_frame(&bytes[..], 4).unwrap(),
            (Kind::Data, b"step".to_vec())
        );
        assert!(read_frame(&bytes[..], 3).is_err());
        assert_eq!(
            read_frame(&bytes[..7], 4).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok((kind, body)) = read_frame(&bytes[..], MAX_FRAME) {
                let mut again = Vec::new();
                write_frame(&mut again, kind, &body).unwrap();
                prop_assert_eq!(&bytes[..again.len()], &again[..]);
            }
        }
    }
}
