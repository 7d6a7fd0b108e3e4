//! How one rank's matrices are divided over the memories: by output rows, from the first row on.
//!
//! A matrix's rows lie on the GPU first, then in pinned host memory, then in the model's files. Rows are those of the
//! device's layout, padding included ([`super::Geometry`]); a row of `gate_up` is a feature, its gate row and its up
//! row together. Layers are alike, so a kind of matrix is cut once for all of them; norms and biases never leave the GPU.

use super::Shard;
use crate::config::ModelConfig;
use crate::weights::Dtype;
use serde::Serialize;

/// A matrix is cut at multiples of this many rows, or at its end.
pub const CUT_ROWS: usize = 16;
/// Kinds of matrices, in the order of [`Placement::cuts`].
pub const KINDS: [&str; 6] = ["embed", "qkv", "o", "gate_up", "down", "head"];

/// Rows of one matrix by the memory that holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Cut {
    /// On the GPU.
    pub resident: usize,
    /// In pinned host memory: streamed over the link ahead of their use, or multiplied there by the CPU cores.
    pub pinned: usize,
    /// In the model's files, read again in every step.
    pub file: usize,
}

impl Cut {
    /// Everything on the GPU.
    pub fn resident(rows: usize) -> Cut {
        Cut {
            resident: rows,
            ..Cut::default()
        }
    }

    /// All rows.
    pub fn rows(&self) -> usize {
        self.resident + self.pinned + self.file
    }

    /// Whether any row is not on the GPU.
    pub fn is_offloaded(&self) -> bool {
        self.pinned + self.file > 0
    }
}

/// The cut of every kind of matrix of one rank.
///
/// The embedding is only looked up, row by row, by the GPU itself wherever the rows lie; where the head is tied to it, this
/// is the head's cut as well. It never lies in the files. An empty cut says that the matrix is whole on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Placement {
    /// `embed`
    pub embed: Cut,
    /// `layers.*.qkv`
    pub qkv: Cut,
    /// `layers.*.o`
    pub o: Cut,
    /// `layers.*.gate_up`, in features.
    pub gate_up: Cut,
    /// `layers.*.down`
    pub down: Cut,
    /// `head`; empty where it is tied.
    pub head: Cut,
}

impl Placement {
    /// From the cuts in the order of [`KINDS`].
    pub fn from_cuts([embed, qkv, o, gate_up, down, head]: [Cut; KINDS.len()]) -> Placement {
        Placement {
            embed,
            qkv,
            o,
            gate_up,
            down,
            head,
        }
    }

    /// Everything resident, in the rows of the model itself.
    pub fn all_resident(config: &ModelConfig, shard: &Shard) -> Placement {
        let one_layer = ModelConfig {
            n_layers: 1,
            ..config.clone()
        };
        let mut cuts = [Cut::default(); KINDS.len()];
        for m in shard.matrices(&one_layer, Dtype::Bf16) {
            if let Some(kind) = kind_of(&m.name) {
                let per_row = if KINDS[kind] == "gate_up" { 2 } else { 1 };
                cuts[kind] = Cut::resident(m.rows / per_row);
            }
        }
        Placement::from_cuts(cuts)
    }

    /// All cuts in the order of [`KINDS`].
    pub fn cuts(&self) -> [Cut; KINDS.len()] {
        [
            self.embed,
            self.qkv,
            self.o,
            self.gate_up,
            self.down,
            self.head,
        ]
    }

    /// The cut of the local matrix `name` (`layers.0.qkv`), `None` for what never leaves the GPU.
    pub fn of(&self, name: &str) -> Option<Cut> {
        kind_of(name).map(|kind| self.cuts()[kind])
    }

    /// Whether any matrix is not wholly on the GPU.
    pub fn is_offloaded(&self) -> bool {
        self.cuts().iter().any(Cut::is_offloaded)
    }
}

/// Index in [`KINDS`] of the local matrix `name` (`layers.0.qkv`); `None` for norms and biases.
pub fn kind_of(name: &str) -> Option<usize> {
    let last = name.rsplit('.').next().unwrap_or(name);
    KINDS.iter().position(|&kind| kind == last)
}
