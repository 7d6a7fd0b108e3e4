//! Bytes, pure: who holds which part of the model, how it lies, and how much memory that takes.
//!
//! Whoever plans and whoever allocates call the same functions of this module; it asks no device and holds no memory.

mod buffers;
mod cache;
mod cut;
mod geometry;
mod peer;
pub mod shard;
mod staging;

pub use buffers::{
    CANDIDATES, DRAW_WORDS, Limits, StepBuffers, WORKSPACE, attention_parts, batch_words,
    candidate_bytes, chosen_bytes, lists, max_splits, sample_parts,
};
pub use cache::{KV_BLOCK, kv_bytes};
pub use cut::{CUT_ROWS, Cut, KINDS, Placement, kind_of};
pub use geometry::{ALIGN, Geometry, HEAD_DIMS, Layout};
pub use peer::{GATHER_WORDS, MAX_ROWS, SUM_ROWS, gather_at, inbox_bytes};
pub use shard::Shard;
pub use staging::{RING_BYTES, RING_SLOT_BYTES, RING_SLOTS, SHARE_ROWS, STAGING};
