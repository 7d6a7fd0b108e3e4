//! Weights: safetensors headers → this rank's byte ranges → straight into their final place.
//!
//! [`Checkpoint::open`] reads headers only; [`Arena`] is the host memory that a rank's matrices live in; [`load`] fills
//! them from the checkpoint's files, or with random values where there are none.

mod arena;
mod checkpoint;
mod data;
mod dtype;
pub mod header;
mod index;
mod load;
mod pieces;
mod random;
#[cfg(test)]
mod tests;
mod text;

pub use arena::{ALIGN, Arena, Slab};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use dtype::Dtype;
pub use load::{LoadStats, Source, load, load_overhead};

use std::ops::Range;

/// One rectangle of a checkpoint tensor and the row of the local matrix where it begins.
///
/// A one-dimensional tensor of `n` elements counts as `n` rows of one column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name in the checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub tensor: String,
    /// Shape of the whole tensor, `[rows, cols]`; the checkpoint must agree.
    pub shape: [usize; 2],
    /// The rows of the tensor that this rank holds.
    pub rows: Range<usize>,
    /// The columns of the tensor that this rank holds; all parts of a matrix have the same width.
    pub cols: Range<usize>,
    /// Where the part's first row lies in the local matrix.
    pub dst_row: usize,
}

/// A matrix as one rank holds it: row-major, `rows` × `cols`, its parts one under the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalMatrix {
    /// Local name, e.g. `layers.0.qkv`.
    pub name: String,
    /// Local rows (output features).
    pub rows: usize,
    /// Local columns (input features).
    pub cols: usize,
    /// Element type in memory; a source of a narrower or equal type is widened exactly.
    pub dtype: Dtype,
    /// What fills it; together the parts cover every row once.
    pub parts: Vec<Part>,
}

impl LocalMatrix {
    /// Bytes of the local matrix.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }
}
