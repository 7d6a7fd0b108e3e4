//! Collectives between ranks of one machine, through memory that all of them map.
//!
//! Each rank has two buffers in the segment, used in turn, and a counter. A round is: copy my part into my
//! buffer, count up, wait for everybody's counter, read everybody's part. Two buffers are enough: a rank counts
//! up for the next round only when it has read all parts of this one, so whoever is two rounds on knows that
//! nobody still reads.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::PermissionsExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{HostCollective, TcpCollective};
use crate::Result;

/// Elements of a buffer: larger messages go in several rounds, each of which stays in a core's cache.
const BUFFER: usize = 1 << 16;
/// How long to look at a counter before sleeping on it.
const SPIN: Duration = Duration::from_micros(200);
/// How often a sleeping rank makes sure that the others are still there.
const NAP: Duration = Duration::from_millis(100);
const PAGE: usize = 4096;

/// The memory that the ranks of one machine share; it goes with the last of them.
pub struct Segment {
    file: File,
    start: NonNull<u8>,
    size: usize,
}

/// A rank's counter, on cache lines of its own.
#[repr(C, align(128))]
struct Cell {
    /// Rounds that this rank has published.
    round: AtomicU32,
    /// Ranks that sleep until `round` changes.
    sleepers: AtomicU32,
    /// Elements in each buffer: the ranks must agree on what they are doing.
    lengths: [AtomicU32; 2],
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Segment {}

impl Segment {
    /// Memory for `size` ranks, marked with `session`; only processes of this user can open it.
    pub fn create(size: usize, session: u64) -> io::Result<Self> {
        // SAFETY: the name is a C string that outlives the call; a fresh descriptor is ours to own.
        let file = unsafe {
            let fd = libc::memfd_create(c"tandem".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        // Another user cannot follow the way to it in `/proc`; should the file get about, it is closed all the same.
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.set_len(bytes(size) as u64)?;
        let segment = Segment::map(file, size)?;
        segment.session().store(session, Ordering::Release);
        Ok(segment)
    }

    /// The number under which the process that created it has it open.
    pub fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// The segment that process `pid` has created for `session` and holds as `descriptor`.
    pub fn open(pid: u32, descriptor: i32, size: usize, session: u64) -> io::Result<Self> {
        let path = format!("/proc/{pid}/fd/{descriptor}");
        let file = File::options().read(true).write(true).open(path)?;
        // In another container the same number may be another process.
        if file.metadata()?.len() != bytes(size) as u64 {
            return Err(io::Error::other("not the segment of this run"));
        }
        let segment = Segment::map(file, size)?;
        if segment.session().load(Ordering::Acquire) != session {
            return Err(io::Error::other("not the segment of this run"));
        }
        Ok(segment)
    }

    fn map(file: File, size: usize) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel likes, of a file of at least this length.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes(size),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        let start = NonNull::new(start.cast()).filter(|_| start != libc::MAP_FAILED);
        let start = start.ok_or_else(io::Error::last_os_error)?;
        Ok(Segment { file, start, size })
    }

    fn session(&self) -> &AtomicU64 {
        // SAFETY: the first page starts with it, mapped as long as `self` and aligned to a page.
        unsafe { self.start.cast().as_ref() }
    }

    fn cell(&self, rank: usize) -> &Cell {
        assert!(rank < self.size);
        // SAFETY: the cells follow the first page, one a rank; all their fields are atomics, and zero is valid.
        unsafe { self.start.byte_add(PAGE).cast::<Cell>().add(rank).as_ref() }
    }

    /// Where rank `rank` puts its part of round `round`.
    fn buffer(&self, rank: usize, round: u32) -> NonNull<f32> {
        assert!(rank < self.size);
        let index = 2 * rank + (round & 1) as usize;
        // SAFETY: within the mapping, which has two buffers a rank behind the cells.
        unsafe {
            self.start
                .byte_add(cells_end(self.size))
                .cast::<f32>()
                .add(index * BUFFER)
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), bytes(self.size)) };
    }
}

fn cells_end(size: usize) -> usize {
    PAGE + (size * size_of::<Cell>()).next_multiple_of(PAGE)
}

fn bytes(size: usize) -> usize {
    cells_end(size) + size * 2 * BUFFER * size_of::<f32>()
}

/// [`HostCollective`] through a [`Segment`].
pub struct ShmCollective {
    segment: Segment,
    /// Tells whether the others are still there.
    peers: TcpCollective,
    rank: usize,
    round: u32,
    spin: bool,
}

impl ShmCollective {
    /// Every rank of `peers` has `segment` mapped.
    pub fn new(segment: Segment, peers: TcpCollective) -> Self {
        ShmCollective {
            rank: peers.rank(),
            spin: peers.spins(),
            segment,
            peers,
            round: 0,
        }
    }

    /// Shows `part` to all and waits for theirs; rank `r`'s is [`ShmCollective::part`] until the next round.
    ///
    /// `expected(r)`: how many elements rank `r` must have shown.
    fn exchange(&mut self, part: &[f32], expected: impl Fn(usize) -> usize) -> Result<()> {
        assert!(part.len() <= BUFFER);
        self.round = self.round.wrapping_add(1);
        let to = self.segment.buffer(self.rank, self.round);
        // SAFETY: the buffer has room for `BUFFER` elements, and nobody reads it: see the head of this file.
        unsafe { to.copy_from_nonoverlapping(NonNull::from(part).cast(), part.len()) };
        let cell = self.segment.cell(self.rank);
        cell.lengths[(self.round & 1) as usize].store(part.len() as u32, Ordering::Relaxed);
        cell.round.store(self.round, Ordering::SeqCst);
        if cell.sleepers.load(Ordering::SeqCst) != 0 {
            wake_all(&cell.round);
        }
        for rank in 0..self.size() {
            self.wait_for(rank)?;
            let cell = self.segment.cell(rank);
            let length = cell.lengths[(self.round & 1) as usize].load(Ordering::Relaxed);
            if length as usize != expected(rank) {
                return Err(self.peers.elsewhere(rank));
            }
        }
        Ok(())
    }

    /// The first `n` elements that rank `rank` has shown in this round.
    fn part(&self, rank: usize, n: usize) -> &[f32] {
        assert!(n <= BUFFER);
        let buffer = self.segment.buffer(rank, self.round);
        // SAFETY: `exchange` has seen this round published, which orders the writes before; the rank writes this
        // buffer again only after this one has published its next round, which takes `&mut self`.
        unsafe { std::slice::from_raw_parts(buffer.as_ptr(), n) }
    }

    fn wait_for(&self, rank: usize) -> Result<()> {
        let cell = self.segment.cell(rank);
        // Another rank may be one round on already.
        let ready = |seen: u32| seen.wrapping_sub(self.round) < 2;
        let mut looks = 0u32;
        let mut since: Option<Instant> = None;
        while !ready(cell.round.load(Ordering::Acquire)) {
            looks += 1;
            if self.spin && looks < 256 {
                std::hint::spin_loop();
            } else if looks < 272 || since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                // The core may be wanted by the very rank that is waited for.
                std::thread::yield_now();
            } else {
                cell.sleepers.fetch_add(1, Ordering::SeqCst);
                let seen = cell.round.load(Ordering::SeqCst);
                let woken = ready(seen) || sleep_on(&cell.round, seen);
                cell.sleepers.fetch_sub(1, Ordering::SeqCst);
                if !woken {
                    self.peers.are_there()?;
                }
            }
        }
        Ok(())
    }
}

/// Sleeps while `word` is `seen`; `false` when that was so for a whole [`NAP`].
fn sleep_on(word: &AtomicU32, seen: u32) -> bool {
    let nap = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::from(NAP.subsec_nanos()),
    };
    // SAFETY: the word and the time outlive the call, which only reads them. Not the private kind of futex: the
    // word lies in memory shared between processes.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &nap) };
    result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

fn wake_all(word: &AtomicU32) {
    // SAFETY: wakes whoever sleeps on the word's address; nothing is read or written.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

impl HostCollective for ShmCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.segment.size
    }

    fn name(&self) -> &'static str {
        "shared memory"
    }

    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        for block in x.chunks_mut(BUFFER) {
            let n = block.len();
            self.exchange(block, |_| n)?;
            block.copy_from_slice(self.part(0, n));
            for rank in 1..self.size() {
                for (sum, x) in block.iter_mut().zip(self.part(rank, n)) {
                    *sum += x;
                }
            }
        }
        Ok(())
    }

    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()> {
        super::check_counts(self, local, counts, out)?;
        let longest = counts.iter().copied().max().unwrap_or(0);
        for done in (0..longest).step_by(BUFFER) {
            // What rank `r` shows in this round: some have nothing left.
            let range = |r: usize| done.min(counts[r])..(done + BUFFER).min(counts[r]);
            self.exchange(&local[range(self.rank)], |r| range(r).len())?;
            let mut start = 0;
            for (rank, &count) in counts.iter().enumerate() {
                let range = range(rank);
                out[start..start + count][range.clone()]
                    .copy_from_slice(self.part(rank, range.len()));
                start += count;
            }
        }
        Ok(())
    }
}
