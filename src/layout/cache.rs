//! Bytes of the paged KV cache.

use super::geometry::Geometry;

/// Tokens in one block of the KV cache.
pub const KV_BLOCK: usize = 16;

/// Bytes of a rank's KV cache.
pub fn kv_bytes(g: &Geometry, n_blocks: usize) -> usize {
    2 * g.n_layers * n_blocks * g.n_kv_heads * KV_BLOCK * g.padded_head_dim * 2
}
