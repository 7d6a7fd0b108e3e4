//! Collectives over TCP: one connection between every two ranks, nothing in the middle.
//!
//! A small message goes to all peers at once (one exchange, the least latency); a large one is cut into one
//! chunk a rank, reduced by its owner and sent back (reduce-scatter, all-gather: the least bytes). Either way
//! each sum is formed in rank order, so the results agree bit for bit on all ranks and between both ways.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::HostCollective;
use crate::{Error, Result};

/// Elements reduced at a time: bounds the buffers, whatever the message.
pub(super) const BLOCK: usize = 1 << 18;
/// Up to this many elements three and more ranks exchange directly.
pub(super) const DIRECT: usize = 8 << 10;
/// How long to look before sleeping: about the spread of the ranks' arrival times within a layer.
const SPIN: Duration = Duration::from_micros(200);
/// What a lost peer leaves to the group's monitor, which knows why and ends the process.
const PATIENCE: Duration = Duration::from_secs(4);
const HEADER: usize = 8;

/// [`HostCollective`] over one TCP connection to each other rank.
pub struct TcpCollective {
    rank: usize,
    peers: Vec<Peer>,
    spin: bool,
    /// Counts the exchanges; both ends of each message must agree on it.
    sequence: u32,
    /// What came from each rank, in rank order.
    inbox: Vec<f32>,
    /// This rank's reduced chunk, on its way to the others.
    reduced: Vec<f32>,
    pollfds: Vec<libc::pollfd>,
}

/// The connection to one rank and the state of the exchange in progress.
struct Peer {
    rank: usize,
    host: String,
    stream: TcpStream,
    /// Bytes of the outgoing buffer that go to this peer, and of the incoming one that come from it.
    send: Range<usize>,
    receive: Range<usize>,
    /// Bytes done, header included.
    sent: usize,
    received: usize,
    header_in: [u8; HEADER],
}

impl TcpCollective {
    /// `streams[r]` leads to rank `r` (`None` for this one), `hosts[r]` names it in errors.
    ///
    /// `spin`: look for data without sleeping for a moment; only where every rank has a CPU to itself.
    pub fn new(
        rank: usize,
        streams: Vec<Option<TcpStream>>,
        hosts: &[String],
        spin: bool,
    ) -> Result<Self> {
        let mut peers = Vec::with_capacity(streams.len());
        for (other, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else { continue };
            stream
                .set_nonblocking(true)
                .map_err(|e| Error::failed(format!("the connection to rank {other}: {e}")))?;
            peers.push(Peer {
                rank: other,
                host: hosts.get(other).cloned().unwrap_or_default(),
                stream,
                send: 0..0,
                receive: 0..0,
                sent: 0,
                received: 0,
                header_in: [0; HEADER],
            });
        }
        Ok(TcpCollective {
            rank,
            pollfds: Vec::with_capacity(peers.len()),
            peers,
            spin,
            sequence: 0,
            inbox: Vec::new(),
            reduced: Vec::new(),
        })
    }

    pub(super) fn spins(&self) -> bool {
        self.spin
    }

    /// An error when a peer has closed its connection.
    pub(super) fn are_there(&self) -> Result<()> {
        for peer in &self.peers {
            let seen = match peer.stream.peek(&mut [0]) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                other => other,
            };
            peer.progress(seen)?;
        }
        Ok(())
    }

    /// The error for a rank whose message is not the one that this rank waits for.
    pub(super) fn elsewhere(&self, rank: usize) -> Error {
        let host = self.peers.iter().find(|p| p.rank == rank);
        Error::failed(format!(
            "rank {rank} ({}) is at another point of the forward pass",
            host.map_or("", |p| &p.host)
        ))
    }

    /// Everybody's `x` to everybody: `x` becomes the sum.
    fn reduce_directly(&mut self, x: &mut [f32]) -> Result<()> {
        let size = self.size();
        let mut inbox = std::mem::take(&mut self.inbox);
        inbox.resize(inbox.len().max(size * x.len()), 0.0);
        for peer in &mut self.peers {
            peer.send = bytes(0..x.len());
            peer.receive = bytes(peer.rank * x.len()..(peer.rank + 1) * x.len());
        }
        let done = self.exchange(
            bytemuck::cast_slice(x),
            bytemuck::cast_slice_mut(&mut inbox),
        );
        add_in_rank_order(x, &inbox, self.rank, size);
        self.inbox = inbox;
        done
    }

    /// Each rank sums one chunk of `x` and gives it to the others.
    fn reduce_by_chunks(&mut self, x: &mut [f32]) -> Result<()> {
        let (rank, size) = (self.rank, self.size());
        let own = chunk(x.len(), size, rank);
        let mut inbox = std::mem::take(&mut self.inbox);
        let mut reduced = std::mem::take(&mut self.reduced);
        inbox.resize(inbox.len().max(size * own.len()), 0.0);
        for peer in &mut self.peers {
            peer.send = bytes(chunk(x.len(), size, peer.rank));
            peer.receive = bytes(peer.rank * own.len()..(peer.rank + 1) * own.len());
        }
        let mut done = self.exchange(
            bytemuck::cast_slice(x),
            bytemuck::cast_slice_mut(&mut inbox),
        );
        if done.is_ok() {
            add_in_rank_order(&mut x[own.clone()], &inbox, rank, size);
            reduced.clear();
            reduced.extend_from_slice(&x[own.clone()]);
            for peer in &mut self.peers {
                peer.send = bytes(0..own.len());
                peer.receive = bytes(chunk(x.len(), size, peer.rank));
            }
            done = self.exchange(bytemuck::cast_slice(&reduced), bytemuck::cast_slice_mut(x));
        }
        (self.inbox, self.reduced) = (inbox, reduced);
        done
    }

    /// Sends every peer its range of `outgoing` and fills its range of `incoming`, all at once.
    fn exchange(&mut self, outgoing: &[u8], incoming: &mut [u8]) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        for peer in &mut self.peers {
            (peer.sent, peer.received) = (0, 0);
        }
        let mut idle_since: Option<Instant> = None;
        loop {
            let (mut progress, mut done) = (false, true);
            for peer in &mut self.peers {
                let before = peer.sent + peer.received;
                peer.advance(self.sequence, outgoing, incoming)?;
                progress |= peer.sent + peer.received > before;
                done &= peer.is_done();
            }
            if done {
                return Ok(());
            }
            if progress {
                idle_since = None;
            } else if self.spin && idle_since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                std::thread::yield_now();
            } else {
                self.sleep();
            }
        }
    }

    /// Waits until a peer can go on.
    fn sleep(&mut self) {
        self.pollfds.clear();
        for peer in self.peers.iter().filter(|p| !p.is_done()) {
            let mut events = 0;
            if !peer.has_sent() {
                events |= libc::POLLOUT;
            }
            if !peer.has_received() {
                events |= libc::POLLIN;
            }
            self.pollfds.push(libc::pollfd {
                fd: peer.stream.as_raw_fd(),
                events,
                revents: 0,
            });
        }
        // SAFETY: the pointer and the count are those of one live vector; the result only ends a wait.
        unsafe {
            libc::poll(
                self.pollfds.as_mut_ptr(),
                self.pollfds.len() as libc::nfds_t,
                1000,
            )
        };
    }
}

impl Peer {
    fn has_sent(&self) -> bool {
        self.sent == HEADER + self.send.len()
    }

    fn has_received(&self) -> bool {
        self.received == HEADER + self.receive.len()
    }

    fn is_done(&self) -> bool {
        self.has_sent() && self.has_received()
    }

    /// Writes and reads what goes without waiting.
    fn advance(&mut self, sequence: u32, outgoing: &[u8], incoming: &mut [u8]) -> Result<()> {
        if !self.has_sent() {
            let header = header(sequence, self.send.len());
            let parts = [&header[..], &outgoing[self.send.clone()]];
            let written = self
                .stream
                .write_vectored(&rest(parts, self.sent).map(IoSlice::new));
            self.sent += self.progress(written)?;
        }
        if !self.has_received() {
            let before = self.received;
            let skip = self.received.min(HEADER);
            let body = &mut incoming[self.receive.clone()][self.received - skip..];
            let mut parts = [
                IoSliceMut::new(&mut self.header_in[skip..]),
                IoSliceMut::new(body),
            ];
            let read = match self.stream.read_vectored(&mut parts) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                other => other,
            };
            self.received += self.progress(read)?;
            let header_is_new = before < HEADER && self.received >= HEADER;
            if header_is_new && self.header_in != header(sequence, self.receive.len()) {
                return Err(Error::failed(format!(
                    "rank {} ({}) is at another point of the forward pass",
                    self.rank, self.host
                )));
            }
        }
        Ok(())
    }

    fn progress(&self, done: io::Result<usize>) -> Result<usize> {
        match done {
            Ok(n) => Ok(n),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(0)
            }
            Err(e) => {
                std::thread::sleep(PATIENCE);
                Err(Error::failed(format!(
                    "the connection to rank {} ({}) is lost: {e}",
                    self.rank, self.host
                )))
            }
        }
    }
}

/// What is left of two parts after `done` bytes.
fn rest(parts: [&[u8]; 2], done: usize) -> [&[u8]; 2] {
    let first = done.min(parts[0].len());
    [&parts[0][first..], &parts[1][done - first..]]
}

fn header(sequence: u32, length: usize) -> [u8; HEADER] {
    (u64::from(sequence) << 32 | length as u64 & 0xffff_ffff).to_le_bytes()
}

fn bytes(elements: Range<usize>) -> Range<usize> {
    elements.start * 4..elements.end * 4
}

/// The elements of rank `rank`'s chunk of `n`.
fn chunk(n: usize, size: usize, rank: usize) -> Range<usize> {
    n * rank / size..n * (rank + 1) / size
}

/// `x` is this rank's part, `parts` has the others' at their rank's place: `x[i] = parts[0][i] + parts[1][i] + …`.
fn add_in_rank_order(x: &mut [f32], parts: &[f32], rank: usize, size: usize) {
    let n = x.len();
    if n == 0 {
        return;
    }
    let part = |r: usize| &parts[r * n..(r + 1) * n];
    // IEEE addition commutes, so rank 1 may add its part from the left.
    match rank {
        0 => {}
        1 => add(x, part(0)),
        _ => {
            // More ranks before this one: their sum first, a block at a time on the stack.
            let mut block = [0f32; 256];
            for start in (0..n).step_by(block.len()) {
                let range = start..n.min(start + block.len());
                let sum = &mut block[..range.len()];
                sum.copy_from_slice(&part(0)[range.clone()]);
                for r in 1..rank {
                    add(sum, &part(r)[range.clone()]);
                }
                add(&mut x[range], sum);
            }
        }
    }
    for r in rank + 1..size {
        add(x, part(r));
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

impl HostCollective for TcpCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len() + 1
    }

    fn name(&self) -> &'static str {
        "TCP"
    }

    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        for block in x.chunks_mut(BLOCK) {
            // Between two ranks both ways move the same bytes, and the direct one waits once.
            if self.size() == 2 || block.len() <= DIRECT {
                self.reduce_directly(block)?;
            } else {
                self.reduce_by_chunks(block)?;
            }
        }
        Ok(())
    }

    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()> {
        super::check_counts(self, local, counts, out)?;
        let start: usize = counts[..self.rank].iter().sum();
        out[start..start + local.len()].copy_from_slice(local);
        for peer in &mut self.peers {
            let start: usize = counts[..peer.rank].iter().sum();
            peer.send = bytes(0..local.len());
            peer.receive = bytes(start..start + counts[peer.rank]);
        }
        self.exchange(bytemuck::cast_slice(local), bytemuck::cast_slice_mut(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_allocated_after_the_first_call() {
        for seen in crate::comm::tests::on_all(crate::comm::tests::tcp(3), |c| {
            let mut x = vec![1.0; 2 * DIRECT];
            [(); 3].map(|()| {
                c.all_reduce(&mut x).unwrap();
                let inbox = (c.inbox.as_ptr() as usize, c.inbox.capacity());
                (inbox, c.reduced.capacity(), c.pollfds.capacity())
            })
        }) {
            assert!(seen.iter().all(|s| *s == seen[0]), "{seen:?}");
        }
    }
}
