//! A control connection: frames both ways, and when the other side was last heard from.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use socket2::SockRef;

use super::wire::{self, Kind};

/// A control connection.
pub(super) struct Link {
    pub stream: TcpStream,
    /// One frame at a time.
    writing: Mutex<()>,
    /// The turn in which the other side was last heard from.
    pub heard: AtomicU32,
}

/// Reads from a link; whatever comes is a sign of life.
pub(super) struct Listening<'a> {
    pub link: &'a Link,
    /// This rank's turns.
    pub turns: &'a AtomicU32,
}

impl Read for Listening<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = (&self.link.stream).read(buffer)?;
        let turn = self.turns.load(Ordering::Relaxed);
        self.link.heard.store(turn, Ordering::Relaxed);
        Ok(read)
    }
}

impl Link {
    pub fn new(stream: TcpStream) -> Self {
        Link {
            stream,
            writing: Mutex::new(()),
            heard: AtomicU32::new(0),
        }
    }

    pub fn send(&self, kind: Kind, body: &[u8]) -> io::Result<()> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_frame(&self.stream, kind, body)
    }

    /// Sends what waits for nobody: where something else is being sent or nothing is read, it is left out.
    pub fn offer(&self, kind: Kind, body: &[u8]) {
        let Ok(_one_at_a_time) = self.writing.try_lock() else {
            return;
        };
        let mut frame = Vec::new();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = wire::write_frame(&mut frame, kind, body)
            .and_then(|()| SockRef::from(&self.stream).send_with_flags(&frame, flags));
        if let Ok(sent @ 1..) = sent {
            // A frame is never left half sent.
            let _ = io::Write::write_all(&mut &self.stream, &frame[sent..]);
        }
    }
}
