//! Weights into place: file → pinned memory → device, many threads at a time; or file → host memory, which is locked
//! afterwards, for what the plan leaves there.

use super::driver::{DevicePtr, Driver, Stream};
use super::memory::{DeviceBuffer, LockedMemory, LockedPiece, OwnedEvent};
use super::offload::HostPart;
use super::regions::{self, Piece, Region, is_gated};
use crate::layout::{Geometry, Layout, Placement, STAGING};
use crate::weights::{LoadStats, LocalMatrix, Source};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A bf16 matrix, row-major without gaps; a vector has one column.
#[derive(Debug, Clone, Copy)]
pub struct GpuWeight {
    /// Where its rows on the device begin.
    pub ptr: DevicePtr,
    /// Output features, padding included.
    pub rows: usize,
    /// Input features, padding included.
    pub cols: usize,
    /// How many rows (of `gate_up`, features) are on the device; the others follow them.
    pub resident: usize,
    /// Where its rows in host memory begin.
    pub host_ptr: DevicePtr,
    /// The number by which the offload knows it, where it has rows elsewhere.
    pub host: Option<usize>,
}

/// Every matrix begins at a multiple of this.
const ALIGN: usize = 256;
/// Most of a thread's slot.
const MAX_SLOT: usize = 2 << 20;
/// Bytes of host memory that are read together.
const HOST_PIECE: usize = 32 << 20;

/// Bytes of host memory that are filled together: large enough that starting threads costs nothing.
const HOST_BATCH: usize = 1 << 30;

/// All weights of a rank.
pub struct Loaded {
    /// Keeps what is on the device.
    pub memory: DeviceBuffer,
    /// Each matrix by its local name.
    pub weights: HashMap<String, GpuWeight>,
    /// What is not on the device.
    pub host: Option<(LockedMemory, Vec<HostPart>)>,
    /// What it took.
    pub stats: LoadStats,
}

/// Loads every matrix as `placement` says. `progress` gets the bytes of the source's matrices just placed, as
/// [`crate::weights::load`] counts them.
///
/// # Errors
/// Too little memory on the device or the host, and those of [`crate::weights::load`].
#[allow(
    clippy::too_many_arguments,
    reason = "each is another thing; a struct would only rename them"
)]
pub fn load(
    driver: &Arc<dyn Driver>,
    source: Source<'_>,
    matrices: &[LocalMatrix],
    g: &Geometry,
    placement: &Placement,
    threads: usize,
    stream: Stream,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Loaded> {
    let start = Instant::now();
    // In the order in which a step needs them, in which what is elsewhere is brought.
    let mut matrices: Vec<&LocalMatrix> = matrices.iter().collect();
    matrices.sort_by_key(|m| !m.name.starts_with("layers."));
    let cut = cut_all(&matrices, g, placement)?;
    let memory = DeviceBuffer::new(driver, on_device(&cut), "weights")?;
    let mut loader = Loader {
        source,
        threads,
        progress,
        stats: LoadStats {
            bytes_read: 0,
            bytes_placed: 0,
            seconds: 0.0,
        },
    };
    let regions = |tier: usize| cut.iter().map(|c| &c.0[tier]).collect::<Vec<_>>();
    loader.onto_device(driver, &regions(0), &memory, stream)?;
    let locked = loader.fill_host_memory(driver, &regions(1))?;

    let (mut weights, mut parts) = (HashMap::new(), Vec::new());
    let (mut at, mut host_at) = (0, 0);
    // An untied embedding is only looked up: nothing of it is ever multiplied.
    let untied = matrices.iter().any(|m| m.name == "head");
    for (m, ([here, there, file], layout)) in matrices.iter().zip(cut) {
        let per_row = if is_gated(&m.name) { 2 } else { 1 };
        let elsewhere = there.bytes() + file.bytes() > 0 && !(m.name == "embed" && untied);
        let resident = here.rows() / per_row;
        weights.insert(
            m.name.clone(),
            GpuWeight {
                ptr: memory.ptr().offset(at),
                rows: layout.device_rows(),
                cols: layout.device_cols(),
                resident,
                host_ptr: locked.device(host_at),
                host: elsewhere.then_some(parts.len()),
            },
        );
        at += here.bytes().next_multiple_of(ALIGN);
        let offset = host_at;
        host_at += there.bytes().next_multiple_of(crate::weights::ALIGN);
        if elsewhere {
            parts.push(HostPart::new(m, resident, &there, offset, file));
        }
    }
    loader.stats.seconds = start.elapsed().as_secs_f64();
    Ok(Loaded {
        memory,
        weights,
        host: (host_at > 0 || !parts.is_empty()).then_some((locked, parts)),
        stats: loader.stats,
    })
}

/// A matrix's three parts, and how it lies on the device.
type CutMatrix = ([Region; 3], Layout);

fn cut_all(
    matrices: &[&LocalMatrix],
    g: &Geometry,
    placement: &Placement,
) -> Result<Vec<CutMatrix>> {
    let cut = |m: &&LocalMatrix| {
        let layout = g.layout(&m.name, m.rows, m.cols);
        let cut = placement.of(&m.name).unwrap_or_default();
        Ok((Region::cut(m, layout, cut)?, layout))
    };
    matrices.iter().map(cut).collect()
}

fn on_device(cut: &[CutMatrix]) -> usize {
    let bytes = |c: &CutMatrix| c.0[0].bytes().next_multiple_of(ALIGN);
    cut.iter().map(bytes).sum()
}

/// Bytes that a rank's weights take on the device.
///
/// # Errors
/// A placement that is not that of these matrices.
pub fn device_bytes(
    matrices: &[LocalMatrix],
    g: &Geometry,
    placement: &Placement,
) -> Result<usize> {
    let matrices: Vec<&LocalMatrix> = matrices.iter().collect();
    Ok(on_device(&cut_all(&matrices, g, placement)?))
}

struct Loader<'a> {
    source: Source<'a>,
    threads: usize,
    progress: &'a (dyn Fn(u64) + Sync),
    stats: LoadStats,
}

/// Rows of a region that are read together.
struct Batch {
    /// Which region.
    region: usize,
    rows: Range<usize>,
    /// Offset where they will lie.
    at: usize,
}

impl Loader<'_> {
    /// Every thread reads into two small slots of its own, one while the other is copied: no thread waits for another, and
    /// what was just read is still in the cache when it is copied. All slots are locked at once and lie in huge pages:
    /// where every thread asked the driver for its own, two processes placed whole files at 29 GB/s each instead of 45.
    ///
    /// Measured on 2 × H100, 32 cores, half of a 15 GB checkpoint in the page cache to each rank (2026-11-25; the host is shared, the same
    /// run gives 22 one minute and 29 GB/s the next): 16 threads a rank 22 and 29 GB/s each, 12 of them 23 and 30, 14 of them 32 and once 15
    /// and 23; in a program of its own 16 threads 24, 12 of them 36. One thread that copies for all, with 1 MiB at a time, 10 to 30, with 0.5 MiB 10; slots of 0.25 MiB 12; the file mapped instead of read 30; the
    /// mapping locked and copied from 11. The threads alone read 50 GB/s, the links alone bring 44 to 46 that way.
    fn onto_device(
        &mut self,
        driver: &Arc<dyn Driver>,
        regions: &[&Region],
        memory: &DeviceBuffer,
        stream: Stream,
    ) -> Result<()> {
        // The driver and the other threads of the process need some time too.
        let threads = (self.threads - self.threads / 8).max(1);
        let wanted = STAGING / (2 * threads);
        let batches = batches(regions, wanted.min(MAX_SLOT), ALIGN);
        if batches.is_empty() {
            return Ok(());
        }
        let (source, progress) = (self.source, self.progress);
        let largest = batches
            .iter()
            .map(|b| b.rows.len() * regions[b.region].row_bytes());
        let slot_bytes = largest.max().unwrap_or(0).next_multiple_of(ALIGN);
        let threads = threads.min(batches.len());
        let mut staging = LockedMemory::map(2 * threads * slot_bytes)?;
        staging.touch(threads);
        staging.lock(driver, "weights on their way")?;
        let slots = Mutex::new(staging.split(slot_bytes));
        let next = AtomicUsize::new(0);
        let total = Mutex::new((0, 0));
        let work = || -> Result<()> {
            let mut slots = [Slot::take(driver, &slots)?, Slot::take(driver, &slots)?];
            let mut scratch = Vec::new();
            let mut done = (0, 0);
            for turn in (0..2).cycle() {
                let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    break;
                };
                let slot = &mut slots[turn];
                slot.copied.synchronize()?;
                let piece = regions[batch.region].piece(batch.rows.clone());
                let bytes = piece.bytes();
                let place = &mut slot.memory.as_mut_slice()[..bytes];
                let read = regions::read(source, &[piece], vec![place], &mut scratch, 1, progress)
                    // The others need not go on.
                    .inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed))?;
                slot.memory.upload(bytes, memory, batch.at, stream)?;
                slot.copied.record(stream)?;
                done = (done.0 + read.bytes_read, done.1 + read.bytes_placed);
            }
            slots.iter().try_for_each(|s| s.copied.synchronize())?;
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            *total = (total.0 + done.0, total.1 + done.1);
            Ok(())
        };
        std::thread::scope(|scope| {
            // A thread that the system refuses is no reason to fail: this one works too.
            let start = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
            let others: Vec<_> = (1..threads).map_while(start).collect();
            let joined = others.into_iter().map(|t| {
                t.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            let mine = work();
            joined.fold(mine, Result::and)
        })?;
        let (read, placed) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.stats.bytes_read += read;
        self.stats.bytes_placed += placed;
        driver.synchronize(stream)
    }

    /// Host memory for the regions, filled and then locked.
    fn fill_host_memory(
        &mut self,
        driver: &Arc<dyn Driver>,
        regions: &[&Region],
    ) -> Result<LockedMemory> {
        let align = crate::weights::ALIGN;
        let bytes: usize = regions
            .iter()
            .map(|r| r.bytes().next_multiple_of(align))
            .sum();
        let mut memory = LockedMemory::map(bytes)?;
        let mut rest = memory.as_mut_slice();
        let (mut pieces, mut places, mut batched) = (Vec::new(), Vec::new(), 0);
        let mut scratch = Vec::new();
        let mut at = 0;
        for batch in batches(regions, HOST_PIECE, align) {
            let piece = regions[batch.region].piece(batch.rows);
            let (_, here) = std::mem::take(&mut rest).split_at_mut(batch.at - at);
            let (place, later) = here.split_at_mut(piece.bytes());
            at = batch.at + piece.bytes();
            rest = later;
            // What is repacked takes scratch memory on its way.
            batched += piece.bytes() * if piece.is_direct() { 1 } else { 16 };
            pieces.push(piece);
            places.push(place);
            if batched >= HOST_BATCH {
                self.read(&pieces, std::mem::take(&mut places), &mut scratch)?;
                (pieces, batched) = (Vec::new(), 0);
            }
        }
        self.read(&pieces, places, &mut scratch)?;
        // Locking comes last: by then all threads together have touched the pages, which one thread alone would take long for.
        let start = Instant::now();
        memory.lock(driver, "offloaded weights")?;
        tracing::debug!("locked {bytes} bytes in {:.2?}", start.elapsed());
        Ok(memory)
    }

    fn read(
        &mut self,
        pieces: &[Piece],
        places: Vec<&mut [u8]>,
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        let (threads, progress) = (self.threads, self.progress);
        let done = regions::read(self.source, pieces, places, scratch, threads, progress)?;
        self.stats.bytes_read += done.bytes_read;
        self.stats.bytes_placed += done.bytes_placed;
        Ok(())
    }
}

/// All rows of all regions in batches of at most `bytes` (but whole rows), each region from the next multiple of `align` on.
fn batches(regions: &[&Region], bytes: usize, align: usize) -> Vec<Batch> {
    let mut all = Vec::new();
    let mut at = 0;
    for (index, region) in regions.iter().enumerate() {
        let rows = (bytes / region.row_bytes().max(1)).max(1);
        all.extend((0..region.rows()).step_by(rows).map(|row| Batch {
            region: index,
            rows: row..(row + rows).min(region.rows()),
            at: at + row * region.row_bytes(),
        }));
        at += region.bytes().next_multiple_of(align);
    }
    all
}

/// Pinned memory of one thread, free again when its copy is done.
struct Slot {
    memory: LockedPiece,
    copied: OwnedEvent,
}

impl Slot {
    fn take(driver: &Arc<dyn Driver>, from: &Mutex<Vec<LockedPiece>>) -> Result<Slot> {
        let mut from = from.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = from
            .pop()
            .ok_or_else(|| Error::failed("internal error: more threads than staging for them"))?;
        Ok(Slot {
            memory,
            copied: OwnedEvent::new(driver, false)?,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Also where the load has failed, the memory stays until nothing is copied from it any more.
        if let Err(e) = self.copied.synchronize() {
            tracing::debug!("{e}");
        }
    }
}

/// Takes a loaded weight by name, for [`crate::model::Qwen::assemble`].
///
/// # Errors
/// There is none of that name.
pub fn take(weights: &HashMap<String, GpuWeight>, name: &str) -> Result<GpuWeight> {
    weights
        .get(name)
        .copied()
        .ok_or_else(|| Error::failed(format_args!("no weight {name} was loaded")))
}
