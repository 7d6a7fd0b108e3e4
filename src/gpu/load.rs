//! Weights onto the device: file → pinned memory → device, one slot being read while the other is copied.

use super::driver::{DevicePtr, Driver, Pinned, Stream};
use super::geometry::{Geometry, Layout};
use super::memory::{DeviceBuffer, OwnedEvent, PinnedBuffer};
use crate::weights::{self, Dtype, LoadStats, LocalMatrix, Source};
use crate::{Error, Result};
use half::{bf16, f16};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// A bf16 matrix on the device, row-major without gaps; a vector has one column.
#[derive(Debug, Clone, Copy)]
pub struct GpuWeight {
    /// Where it begins.
    pub ptr: DevicePtr,
    /// Output features, padding included.
    pub rows: usize,
    /// Input features, padding included.
    pub cols: usize,
}

/// Every matrix begins at a multiple of this.
const ALIGN: usize = 256;
/// Bytes of one of the two slots of pinned memory.
pub const SLOT: usize = 64 << 20;

/// Bytes that a rank's weights take on the device.
pub fn device_bytes(matrices: &[LocalMatrix], g: &Geometry) -> usize {
    matrices
        .iter()
        .map(|m| matrix_bytes(&g.layout(&m.name, m.rows, m.cols)).next_multiple_of(ALIGN))
        .sum()
}

fn matrix_bytes(layout: &Layout) -> usize {
    layout.device_rows() * layout.device_cols() * 2
}

/// Loads every matrix: the memory that holds them, and each by its local name.
///
/// All are kept in bf16: what is stored wider is rounded to it, once. `progress` gets the bytes of the source's
/// matrices just placed, as [`weights::load`] counts them.
///
/// # Errors
/// Too little memory on the device, and those of [`weights::load`].
pub fn load(
    driver: &Arc<dyn Driver>,
    source: Source<'_>,
    matrices: &[LocalMatrix],
    g: &Geometry,
    threads: usize,
    stream: Stream,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(DeviceBuffer, HashMap<String, GpuWeight>, LoadStats)> {
    let start = Instant::now();
    let memory = DeviceBuffer::new(driver, device_bytes(matrices, g), "weights")?;
    let mut places = HashMap::new();
    let mut pieces = Vec::new();
    let mut at = 0;
    for m in matrices {
        let layout = g.layout(&m.name, m.rows, m.cols);
        let (rows, cols) = (layout.device_rows(), layout.device_cols());
        places.insert(
            m.name.clone(),
            GpuWeight {
                ptr: memory.ptr().offset(at),
                rows,
                cols,
            },
        );
        pieces.extend(Piece::cut(m, layout, at));
        at += matrix_bytes(&layout).next_multiple_of(ALIGN);
    }
    let mut ring = Ring::new(driver, &pieces, stream)?;
    let mut stats = LoadStats {
        bytes_read: 0,
        bytes_placed: 0,
        seconds: 0.0,
    };
    let mut rest = &pieces[..];
    while !rest.is_empty() {
        let n = Piece::that_fit(rest);
        let (now, later) = rest.split_at(n);
        rest = later;
        let done = ring.fill(source, now, threads, progress, &memory)?;
        stats.bytes_read += done.bytes_read;
        stats.bytes_placed += done.bytes_placed;
    }
    driver.synchronize(stream)?;
    stats.seconds = start.elapsed().as_secs_f64();
    Ok((memory, places, stats))
}

/// Some rows of a matrix, few enough for a slot.
struct Piece {
    /// The rows, as a matrix of their own.
    matrix: LocalMatrix,
    /// First row in the whole matrix.
    first_row: usize,
    layout: Layout,
    /// The device rows that it fills, padding included.
    device_rows: Range<usize>,
    /// Offset of those on the device.
    at: usize,
}

impl Piece {
    /// Cuts a matrix into pieces; `at` is its own offset on the device.
    fn cut(m: &LocalMatrix, layout: Layout, at: usize) -> Vec<Piece> {
        let wide = layout.device_cols().max(m.cols) * 4;
        let per_piece = (SLOT / wide.max(1)).max(1);
        let mut pieces: Vec<Piece> = Vec::new();
        let mut first_row = 0;
        let mut filled = 0;
        while first_row < m.rows {
            let mut end = (first_row + per_piece).min(m.rows);
            // A piece must not end inside a run that is followed by padding, nor before it.
            while end < m.rows && layout.row(end) != layout.row(end - 1) + 1 && end > first_row + 1
            {
                end -= 1;
            }
            let device_end = if end == m.rows {
                layout.device_rows()
            } else {
                layout.row(end)
            };
            pieces.push(Piece {
                matrix: rows_of(m, first_row..end),
                first_row,
                layout,
                device_rows: filled..device_end,
                at: at + filled * layout.device_cols() * 2,
            });
            filled = device_end;
            first_row = end;
        }
        pieces
    }

    /// How many pieces from the front fit a slot together; at least one.
    fn that_fit(pieces: &[Piece]) -> usize {
        let mut sum = 0;
        let fit = pieces.iter().take_while(|p| {
            sum += p.staged();
            sum <= SLOT
        });
        fit.count().max(1)
    }

    /// Bytes on the device.
    fn bytes(&self) -> usize {
        self.device_rows.len() * self.layout.device_cols() * 2
    }

    /// Bytes in a slot.
    fn staged(&self) -> usize {
        self.bytes().next_multiple_of(ALIGN)
    }

    /// Whether it is read right where it is copied from.
    fn is_direct(&self) -> bool {
        self.layout.is_plain() && self.matrix.dtype == Dtype::Bf16
    }

    /// Rounds and spreads what was read into what is copied.
    fn repack(&self, read: &[u8], staged: &mut [u8]) {
        let (cols, device_cols) = (self.matrix.cols, self.layout.device_cols());
        staged.fill(0);
        for (i, row) in read
            .chunks_exact(cols * self.matrix.dtype.size())
            .enumerate()
        {
            let to = (self.layout.row(self.first_row + i) - self.device_rows.start) * device_cols;
            for (j, element) in row.chunks_exact(self.matrix.dtype.size()).enumerate() {
                let value = match (self.matrix.dtype, element) {
                    (Dtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
                    (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
                    (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                    _ => f32::NAN,
                };
                let place = 2 * (to + self.layout.col(j));
                staged[place..place + 2]
                    .copy_from_slice(&bf16::from_f32(value * self.layout.scale).to_le_bytes());
            }
        }
    }
}

/// Rows `rows` of a matrix as a matrix.
fn rows_of(m: &LocalMatrix, rows: Range<usize>) -> LocalMatrix {
    let mut parts = Vec::new();
    for part in &m.parts {
        let (begin, end) = (
            part.dst_row.max(rows.start),
            (part.dst_row + part.rows.len()).min(rows.end),
        );
        if begin < end {
            let from = part.rows.start + begin - part.dst_row;
            let mut part = part.clone();
            part.rows = from..from + end - begin;
            part.dst_row = begin - rows.start;
            parts.push(part);
        }
    }
    LocalMatrix {
        name: m.name.clone(),
        rows: rows.len(),
        cols: m.cols,
        dtype: m.dtype,
        parts,
    }
}

/// Two slots of pinned memory, each free again when its copies are done.
struct Ring {
    slots: [(PinnedBuffer, OwnedEvent); 2],
    turn: usize,
    /// For what has to be repacked.
    scratch: Vec<u8>,
    stream: Stream,
}

impl Ring {
    fn new(driver: &Arc<dyn Driver>, pieces: &[Piece], stream: Stream) -> Result<Ring> {
        let all: usize = pieces.iter().map(Piece::staged).sum();
        let largest = pieces.iter().map(Piece::staged).max().unwrap_or(0);
        let bytes = all.min(SLOT).max(largest);
        let slot = || -> Result<_> {
            let memory =
                PinnedBuffer::new(driver, bytes, Pinned::Cached, "staging for the weights")?;
            Ok((memory, OwnedEvent::new(driver, false)?))
        };
        Ok(Ring {
            slots: [slot()?, slot()?],
            turn: 0,
            scratch: Vec::new(),
            stream,
        })
    }

    /// Reads pieces into the next slot and enqueues their copies.
    fn fill(
        &mut self,
        source: Source<'_>,
        pieces: &[Piece],
        threads: usize,
        progress: &(dyn Fn(u64) + Sync),
        memory: &DeviceBuffer,
    ) -> Result<LoadStats> {
        let (slot, copied) = &mut self.slots[self.turn];
        self.turn = 1 - self.turn;
        copied.synchronize()?;
        let indirect = pieces.iter().filter(|p| !p.is_direct());
        self.scratch
            .resize(indirect.map(|p| p.matrix.bytes()).sum(), 0);
        let (mut staged, mut scratch) = (slot.as_mut_slice(), &mut self.scratch[..]);
        let mut to_read: Vec<&mut [u8]> = Vec::new();
        let mut to_repack = Vec::new();
        for piece in pieces {
            let (mine, rest) = std::mem::take(&mut staged).split_at_mut(piece.staged());
            staged = rest;
            let (mine, _) = mine.split_at_mut(piece.bytes());
            if piece.is_direct() {
                to_read.push(mine);
            } else {
                let (read, rest) = std::mem::take(&mut scratch).split_at_mut(piece.matrix.bytes());
                scratch = rest;
                to_read.push(read);
                to_repack.push((piece, to_read.len() - 1, mine));
            }
        }
        let matrices: Vec<LocalMatrix> = pieces.iter().map(|p| p.matrix.clone()).collect();
        let stats = weights::load(source, &matrices, &mut to_read, threads, progress)?;
        for (piece, index, mine) in to_repack {
            piece.repack(to_read[index], mine);
        }
        let mut from = 0;
        for piece in pieces {
            slot.upload(from..from + piece.bytes(), memory, piece.at, self.stream)?;
            from += piece.staged();
        }
        copied.record(self.stream)?;
        Ok(stats)
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
