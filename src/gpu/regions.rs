//! Which rows of a matrix lie together in one memory, and how any of them are read from the source.
//!
//! A matrix is cut by [`Cut`]: its first rows stay on the GPU, the next lie in host memory, the last in the model's files.
//! On the GPU, gate and up lie one above the other; elsewhere 8 gate rows are followed by their 8 up rows, so that any
//! multiple of 8 features lies together and can be moved and multiplied on its own.

use crate::layout::{Cut, Layout};
use crate::weights::{self, Dtype, LoadStats, LocalMatrix, Source};
use crate::{Error, Result};
use half::{bf16, f16};
use std::ops::Range;

/// Features of `gate_up` whose rows lie together outside of the GPU.
const TILE: usize = 8;

/// Rows of one matrix that lie one after the other, as bf16.
#[derive(Debug, Clone)]
pub struct Region {
    /// The whole matrix.
    pub matrix: LocalMatrix,
    layout: Layout,
    /// Rows on the device, in the order in which they lie here.
    runs: Vec<Range<usize>>,
}

impl Region {
    /// The three parts of a matrix, some of them empty.
    ///
    /// # Errors
    /// A cut that does not have the matrix's rows.
    pub fn cut(matrix: &LocalMatrix, layout: Layout, cut: Cut) -> Result<[Region; 3]> {
        let gated = is_gated(&matrix.name);
        let rows = layout.device_rows() / if gated { 2 } else { 1 };
        let cut = if cut.rows() == 0 {
            Cut::resident(rows)
        } else {
            cut
        };
        if cut.rows() != rows || (gated && !(cut.resident + cut.pinned).is_multiple_of(TILE)) {
            return Err(Error::failed(format_args!(
                "internal error: matrix {} of {rows} rows is cut into {cut:?}",
                matrix.name
            )));
        }
        let (a, b) = (cut.resident, cut.resident + cut.pinned);
        let here = |range: Range<usize>, size: usize| {
            let mut runs = Vec::new();
            if !gated {
                runs.push(range);
            } else {
                for start in range.clone().step_by(size.max(1)) {
                    let end = (start + size).min(range.end);
                    runs.extend([start..end, rows + start..rows + end]);
                }
            }
            runs.retain(|r| !r.is_empty());
            Region {
                matrix: matrix.clone(),
                layout,
                runs,
            }
        };
        Ok([here(0..a, a), here(a..b, TILE), here(b..rows, TILE)])
    }

    /// Its rows; a feature of `gate_up` has two.
    pub fn rows(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.layout.device_cols() * 2
    }

    /// All its bytes.
    pub fn bytes(&self) -> usize {
        self.rows() * self.row_bytes()
    }

    /// Some of its rows, ready to be read.
    pub fn piece(&self, rows: Range<usize>) -> Piece {
        let mut model_rows: Vec<(Range<usize>, usize)> = Vec::new();
        let mut begin = 0;
        for run in &self.runs {
            let (from, to) = (rows.start.max(begin), rows.end.min(begin + run.len()));
            for at in from..to {
                let Some(row) = self.layout.model_row(run.start + at - begin) else {
                    continue;
                };
                let to = at - rows.start;
                match model_rows.last_mut() {
                    Some((r, first)) if r.end == row && *first + r.len() == to => r.end += 1,
                    _ => model_rows.push((row..row + 1, to)),
                }
            }
            begin += run.len();
        }
        let (mut parts, mut n) = (Vec::new(), 0);
        for (range, _) in &model_rows {
            parts.extend(parts_of(&self.matrix, range, n));
            n += range.len();
        }
        let matrix = LocalMatrix {
            name: self.matrix.name.clone(),
            rows: n,
            cols: self.matrix.cols,
            dtype: self.matrix.dtype,
            parts,
        };
        let plain = self.layout.has_plain_columns() && self.matrix.dtype == Dtype::Bf16;
        Piece {
            direct: plain && n == rows.len(),
            bytes: rows.len() * self.row_bytes(),
            matrix,
            model_rows,
            layout: self.layout,
        }
    }
}

/// Whether the rows of a matrix come in pairs of gate and up.
pub fn is_gated(name: &str) -> bool {
    name.ends_with("gate_up")
}

/// The parts of rows `rows` of a matrix, from row `first` of another on.
fn parts_of(m: &LocalMatrix, rows: &Range<usize>, first: usize) -> Vec<weights::Part> {
    let mut parts = Vec::new();
    for part in &m.parts {
        let (begin, end) = (
            part.dst_row.max(rows.start),
            (part.dst_row + part.rows.len()).min(rows.end),
        );
        if begin < end {
            let from = part.rows.start + begin - part.dst_row;
            parts.push(weights::Part {
                rows: from..from + end - begin,
                dst_row: first + begin - rows.start,
                ..part.clone()
            });
        }
    }
    parts
}

/// Some rows of a region.
#[derive(Clone)]
pub struct Piece {
    /// The model's rows among them, as a matrix of their own.
    matrix: LocalMatrix,
    /// Runs of the model's rows and where each begins here; what is between is padding.
    model_rows: Vec<(Range<usize>, usize)>,
    layout: Layout,
    direct: bool,
    bytes: usize,
}

impl Piece {
    /// Bytes where it will lie.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is read right where it will lie.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Rounds and spreads what was read into place.
    fn repack(&self, read: &[u8], to: &mut [u8]) {
        let (size, device_cols) = (self.matrix.dtype.size(), self.layout.device_cols());
        to.fill(0);
        let mut rows = read.chunks_exact((self.matrix.cols * size).max(1));
        for (range, first) in &self.model_rows {
            for (i, row) in rows.by_ref().take(range.len()).enumerate() {
                let to = &mut to[(first + i) * device_cols * 2..][..device_cols * 2];
                for (j, element) in row.chunks_exact(size).enumerate() {
                    let value = match (self.matrix.dtype, element) {
                        (Dtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
                        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
                        (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                        _ => f32::NAN,
                    };
                    let place = 2 * self.layout.col(j);
                    to[place..place + 2]
                        .copy_from_slice(&bf16::from_f32(value * self.layout.scale).to_le_bytes());
                }
            }
        }
    }
}

/// Reads every piece into its place, of [`Piece::bytes`] bytes each. All are kept in bf16: what is stored wider is rounded to
/// it, once. `scratch` grows to what had to be repacked.
///
/// # Errors
/// Those of [`weights::load`].
pub fn read(
    source: Source<'_>,
    pieces: &[Piece],
    places: Vec<&mut [u8]>,
    scratch: &mut Vec<u8>,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<LoadStats> {
    let indirect = pieces.iter().filter(|p| !p.direct);
    scratch.resize(indirect.map(|p| p.matrix.bytes()).sum(), 0);
    let mut scratch = &mut scratch[..];
    let mut to_read: Vec<&mut [u8]> = Vec::new();
    let mut to_repack = Vec::new();
    for (piece, place) in pieces.iter().zip(places) {
        if piece.direct {
            to_read.push(place);
        } else {
            let (read, rest) = std::mem::take(&mut scratch).split_at_mut(piece.matrix.bytes());
            scratch = rest;
            to_read.push(read);
            to_repack.push((piece, to_read.len() - 1, place));
        }
    }
    let matrices: Vec<LocalMatrix> = pieces.iter().map(|p| p.matrix.clone()).collect();
    let stats = weights::load(source, &matrices, &mut to_read, threads, progress)?;
    for (piece, index, place) in to_repack {
        piece.repack(to_read[index], place);
    }
    Ok(stats)
}
