//! The last tier: weights that are in no memory are read from the checkpoint in every step, several reads at a time, ahead
//! of their use.

use super::{From, HostPart, Transfer, rows_per_unit};
use crate::gpu::driver::{DevicePtr, Driver, Pinned, Stream};
use crate::gpu::memory::{OwnedEvent, PinnedBuffer};
use crate::gpu::regions::{self, Region};
use crate::layout::{RING_SLOT_BYTES, RING_SLOTS};
use crate::weights::{Checkpoint, Source};
use crate::{Error, Result};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// The checkpoint that is read from.
pub type FileSource = Arc<Checkpoint>;

/// Buffers that wait for their copies rather than take a new read at once.
const DRAINING: usize = 2;

struct Slot {
    memory: PinnedBuffer,
    copied: OwnedEvent,
}

/// A read: which in the order of all, into what, and the rows of which region.
struct Read {
    number: u64,
    slot: Slot,
    region: usize,
    rows: Range<usize>,
}

type Done = (u64, Result<Slot>);

/// Readers and the order in which they read.
pub struct Files {
    reads: Option<Sender<Read>>,
    done: Receiver<Done>,
    readers: Vec<JoinHandle<()>>,
    /// Not in use.
    idle: Vec<Slot>,
    /// Being copied from, oldest first.
    draining: VecDeque<Slot>,
    /// Read, and not yet wanted.
    ready: HashMap<u64, Slot>,
    /// What will be wanted: once, and then again and again.
    once: Vec<(usize, Range<usize>)>,
    again: Vec<(usize, Range<usize>)>,
    /// Reads asked for, and those used.
    asked: u64,
    used: u64,
}

impl Files {
    /// Starts the readers.
    ///
    /// # Errors
    /// Too little memory, or threads that cannot be started.
    pub fn new(driver: &Arc<dyn Driver>, source: FileSource, parts: &[HostPart]) -> Result<Files> {
        let regions: Arc<Vec<Region>> = Arc::new(parts.iter().map(|p| p.file.clone()).collect());
        let (reads, queue) = channel::<Read>();
        let (finished, done) = channel::<Done>();
        let queue = Arc::new(Mutex::new(queue));
        let mut idle = Vec::new();
        let mut readers = Vec::new();
        for n in 0..RING_SLOTS {
            idle.push(Slot {
                memory: PinnedBuffer::new(driver, RING_SLOT_BYTES, Pinned::Cached, "file staging")?,
                copied: OwnedEvent::new(driver, false)?,
            });
            let (queue, finished) = (queue.clone(), finished.clone());
            let (source, regions) = (source.clone(), regions.clone());
            let reader = std::thread::Builder::new().name(format!("read-{n}"));
            let reader = reader
                .spawn(move || read_all(&queue, &finished, &source, &regions))
                .map_err(|e| Error::failed(format_args!("cannot start file reader {n}: {e}")))?;
            readers.push(reader);
        }
        Ok(Files {
            reads: Some(reads),
            done,
            readers,
            idle,
            draining: VecDeque::new(),
            ready: HashMap::new(),
            once: Vec::new(),
            again: Vec::new(),
            asked: 0,
            used: 0,
        })
    }

    /// Begins the reads of a list of transfers, as the ring will ask for them: the first to fill its slots, and
    /// then, step after step, each slot's next.
    pub fn restart(&mut self, list: &[Transfer], parts: &[HostPart]) {
        // What was read for another list is of no use.
        while self.used < self.asked {
            if let Ok(slot) = self.take() {
                self.idle.push(slot);
            }
        }
        let rows = |index: &usize| {
            let t = &list[*index];
            let n = t.units * rows_per_unit(parts[t.part].gated);
            match t.from {
                From::File(row) => Some((t.part, row..row + n)),
                From::Host(_) => None,
            }
        };
        let n = list.len();
        let next = |used: usize| match used + RING_SLOTS {
            follows if follows < n => follows,
            _ => used % RING_SLOTS,
        };
        self.once = (0..n.min(RING_SLOTS)).filter_map(|i| rows(&i)).collect();
        self.again = (0..n).map(next).filter_map(|i| rows(&i)).collect();
        (self.asked, self.used) = (0, 0);
        self.ask();
    }

    /// Enqueues the copy of the read that is due.
    ///
    /// # Errors
    /// A read that failed, or those of the driver.
    pub fn upload(&mut self, bytes: usize, to: DevicePtr, stream: Stream) -> Result<()> {
        let slot = self.take()?;
        slot.memory.upload_to(0..bytes, to, stream)?;
        slot.copied.record(stream)?;
        self.draining.push_back(slot);
        while self.draining.len() > DRAINING
            && let Some(slot) = self.draining.pop_front()
        {
            slot.copied.synchronize()?;
            self.idle.push(slot);
        }
        self.ask();
        Ok(())
    }

    /// The read that is due.
    fn take(&mut self) -> Result<Slot> {
        let number = self.used;
        self.used += 1;
        while !self.ready.contains_key(&number) {
            let (n, slot) = self
                .done
                .recv()
                .map_err(|_| Error::failed("the file readers are gone"))?;
            self.ready.insert(n, slot?);
        }
        let gone = || Error::failed("internal error: a read is gone");
        self.ready.remove(&number).ok_or_else(gone)
    }

    /// Gives every idle buffer a read.
    fn ask(&mut self) {
        let Some(reads) = &self.reads else { return };
        let total = self.once.len() + self.again.len();
        while total > 0
            && let Some(slot) = self.idle.pop()
        {
            let n = self.asked as usize;
            let wanted = match self.once.get(n) {
                Some(first) => Some(first),
                None => {
                    let n = n - self.once.len();
                    n.checked_rem(self.again.len()).map(|i| &self.again[i])
                }
            };
            let Some((region, rows)) = wanted.cloned() else {
                return self.idle.push(slot);
            };
            let number = self.asked;
            self.asked += 1;
            let read = Read {
                number,
                slot,
                region,
                rows,
            };
            if reads.send(read).is_err() {
                return;
            }
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.reads = None;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// A reader's life.
fn read_all(
    queue: &Mutex<Receiver<Read>>,
    finished: &Sender<Done>,
    source: &Checkpoint,
    regions: &[Region],
) {
    let mut scratch = Vec::new();
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut read) = next else { return };
        let piece = regions[read.region].piece(read.rows);
        let place = &mut read.slot.memory.as_mut_slice()[..piece.bytes()];
        let source = Source::Checkpoint(source);
        let outcome = regions::read(source, &[piece], vec![place], &mut scratch, 1, &|_| {});
        if finished
            .send((read.number, outcome.map(|_| read.slot)))
            .is_err()
        {
            return;
        }
    }
}
