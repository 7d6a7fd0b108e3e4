//! Weights into place: file → pinned memory → device, one slot being read while the other is copied; or file → host memory,
//! which is locked afterwards, for what the plan leaves there.

use super::driver::{DevicePtr, Driver, Pinned, Stream};
use super::geometry::{Geometry, Layout};
use super::memory::{DeviceBuffer, LockedMemory, OwnedEvent, PinnedBuffer};
use super::offload::HostPart;
use super::regions::{self, Piece, Region, is_gated};
use crate::plan::Placement;
use crate::weights::{LoadStats, LocalMatrix, Source};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
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
/// Bytes of one of the two slots of pinned memory.
pub const SLOT: usize = 64 << 20;

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
        scratch: Vec::new(),
        stats: LoadStats {
            bytes_read: 0,
            bytes_placed: 0,
            seconds: 0.0,
        },
    };
    loader.onto_device(driver, cut.iter().map(|c| &c.0[0]), &memory, stream)?;
    let pinned: Vec<&Region> = cut.iter().map(|c| &c.0[1]).collect();
    let locked = loader.into_host_memory(driver, &pinned)?;

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
    /// For what has to be repacked.
    scratch: Vec<u8>,
    stats: LoadStats,
}

/// Rows of a region that are read together.
struct Batch {
    piece: Piece,
    /// Offset where it will lie.
    at: usize,
}

impl Loader<'_> {
    fn onto_device<'r>(
        &mut self,
        driver: &Arc<dyn Driver>,
        regions: impl Iterator<Item = &'r Region>,
        memory: &DeviceBuffer,
        stream: Stream,
    ) -> Result<()> {
        let mut at = 0;
        let mut batches = Vec::new();
        for region in regions {
            batches.extend(cut_for_slots(region, at));
            at += region.bytes().next_multiple_of(ALIGN);
        }
        let mut ring = Ring::new(driver, &batches)?;
        while !batches.is_empty() {
            let now: Vec<Batch> = batches.drain(..that_fit(&batches)).collect();
            let (slot, copied) = ring.next()?;
            let (mut places, mut rest) = (Vec::new(), slot.as_mut_slice());
            for b in &now {
                let (mine, later) = std::mem::take(&mut rest).split_at_mut(staged(b.piece.bytes()));
                places.push(&mut mine[..b.piece.bytes()]);
                rest = later;
            }
            let pieces: Vec<Piece> = now.iter().map(|b| b.piece.clone()).collect();
            self.read(&pieces, places)?;
            let mut from = 0;
            for b in &now {
                slot.upload(from..from + b.piece.bytes(), memory, b.at, stream)?;
                from += staged(b.piece.bytes());
            }
            copied.record(stream)?;
        }
        driver.synchronize(stream)
    }

    /// Host memory for the regions, filled and then locked.
    fn into_host_memory(
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
        for region in regions {
            let (mut mine, later) =
                std::mem::take(&mut rest).split_at_mut(region.bytes().next_multiple_of(align));
            rest = later;
            let rows = rows_of_a_slot(region);
            for row in (0..region.rows()).step_by(rows) {
                let piece = region.piece(row..(row + rows).min(region.rows()));
                let (place, later) = std::mem::take(&mut mine).split_at_mut(piece.bytes());
                mine = later;
                // What is repacked takes scratch memory on its way.
                batched += piece.bytes() * if piece.is_direct() { 1 } else { 16 };
                pieces.push(piece);
                places.push(place);
                if batched >= HOST_BATCH {
                    self.read(&pieces, std::mem::take(&mut places))?;
                    (pieces, batched) = (Vec::new(), 0);
                }
            }
        }
        self.read(&pieces, places)?;
        // Locking comes last: by then all threads together have touched the pages, which one thread alone would take long for.
        let start = Instant::now();
        memory.lock(driver)?;
        tracing::debug!("locked {bytes} bytes in {:.2?}", start.elapsed());
        Ok(memory)
    }

    fn read(&mut self, pieces: &[Piece], places: Vec<&mut [u8]>) -> Result<()> {
        let (threads, progress) = (self.threads, self.progress);
        let done = regions::read(
            self.source,
            pieces,
            places,
            &mut self.scratch,
            threads,
            progress,
        )?;
        self.stats.bytes_read += done.bytes_read;
        self.stats.bytes_placed += done.bytes_placed;
        Ok(())
    }
}

fn staged(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// Rows of a region that fill a slot; what is stored wider takes more room on its way.
fn rows_of_a_slot(region: &Region) -> usize {
    let wide = region.row_bytes().max(region.matrix.cols * 2) * 2;
    (SLOT / wide.max(1)).max(1)
}

fn cut_for_slots(region: &Region, at: usize) -> Vec<Batch> {
    let (rows, all) = (rows_of_a_slot(region), region.rows());
    let cut = (0..all).step_by(rows).map(|row| Batch {
        piece: region.piece(row..(row + rows).min(all)),
        at: at + row * region.row_bytes(),
    });
    cut.collect()
}

/// How many batches from the front fit a slot together; at least one.
fn that_fit(batches: &[Batch]) -> usize {
    let mut sum = 0;
    let fit = batches.iter().take_while(|b| {
        sum += staged(b.piece.bytes());
        sum <= SLOT
    });
    fit.count().max(1)
}

/// Two slots of pinned memory, each free again when its copies are done.
struct Ring {
    slots: [(PinnedBuffer, OwnedEvent); 2],
    turn: usize,
}

impl Ring {
    fn new(driver: &Arc<dyn Driver>, batches: &[Batch]) -> Result<Ring> {
        let sizes = || batches.iter().map(|b| staged(b.piece.bytes()));
        let bytes = sizes()
            .sum::<usize>()
            .min(SLOT)
            .max(sizes().max().unwrap_or(0));
        let slot = || -> Result<_> {
            let memory =
                PinnedBuffer::new(driver, bytes, Pinned::Cached, "staging for the weights")?;
            Ok((memory, OwnedEvent::new(driver, false)?))
        };
        Ok(Ring {
            slots: [slot()?, slot()?],
            turn: 0,
        })
    }

    /// The slot whose turn it is, once it is free.
    fn next(&mut self) -> Result<&mut (PinnedBuffer, OwnedEvent)> {
        self.turn = 1 - self.turn;
        let slot = &mut self.slots[self.turn];
        slot.1.synchronize()?;
        Ok(slot)
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
