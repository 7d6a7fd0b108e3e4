//! What goes over a socket once both sides have shown that they belong to the run: frames.
//!
//! Nothing that arrives is believed: every length is bounded, memory grows only with the bytes that are really
//! there, and every read has a deadline until the ranks have met.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

/// Longest frame between ranks; a batch of prompts of 32k tokens is a hundredth of it.
pub(super) const MAX_FRAME: u32 = 64 << 20;
/// Longest hello, with the list of CPUs of a large machine.
pub(super) const MAX_HELLO: u32 = 256 << 10;

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
    /// A sign of life.
    Beat = 6,
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
        6 => Kind::Beat,
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

/// How long sent bytes may stay unread: a rank that is stopped for a moment keeps its connections, and longer ones
/// are the monitor's to judge.
const UNREAD: Duration = Duration::from_secs(60);

/// A connection between ranks: no delay, and a lost machine shows within 8 s when nothing is under way to it.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(3))
        .with_interval(Duration::from_secs(1))
        .with_retries(4);
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(UNREAD))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
