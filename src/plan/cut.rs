//! How one rank's matrices are divided over the memories: by output rows, from the first row on.
//!
//! A matrix's rows lie on the GPU first, then in pinned host memory, then in the model's files. Rows are those of the
//! device's layout, padding included ([`crate::gpu::Geometry`]); a row of `gate_up` is a feature, its gate row and its up
//! row together. Layers are alike, so a kind of matrix is cut once for all of them; norms and biases never leave the GPU.

use serde::Serialize;

/// Slots of device memory through which weights that are not on the GPU pass, and bytes of each.
pub const RING_SLOTS: usize = 8;
/// Bytes of a slot.
pub const RING_SLOT_BYTES: usize = 16 << 20;

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
    /// The cut of the local matrix `name` (`layers.0.qkv`), `None` for what never leaves the GPU.
    pub fn of(&self, name: &str) -> Option<Cut> {
        match name.rsplit('.').next().unwrap_or(name) {
            "embed" => Some(self.embed),
            "qkv" => Some(self.qkv),
            "o" => Some(self.o),
            "gate_up" => Some(self.gate_up),
            "down" => Some(self.down),
            "head" => Some(self.head),
            _ => None,
        }
    }

    /// Whether any matrix is not wholly on the GPU.
    pub fn is_offloaded(&self) -> bool {
        [
            self.embed,
            self.qkv,
            self.o,
            self.gate_up,
            self.down,
            self.head,
        ]
        .iter()
        .any(Cut::is_offloaded)
    }
}
