//! Does a checkpoint hold the model that its configuration describes?

use crate::Result;
use crate::config::ModelConfig;
use crate::plan::Shard;
use crate::weights::{Checkpoint, Dtype};

/// Checks every tensor's presence and shape, and returns the type that the weight matrices are kept in: the
/// checkpoint's own, or the one that holds all of them exactly where they differ.
///
/// # Errors
/// Missing tensors, other shapes, tensors that the model does not have.
pub fn check_tensors(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Dtype> {
    let matrices = Shard::new(config, 1, 0).matrices(config, config.dtype);
    let parts = || matrices.iter().flat_map(|m| &m.parts);
    let wanted: Vec<_> = parts().map(|p| (p.tensor.as_str(), p.shape)).collect();
    // Tied models may carry a copy of the embedding; older exports carry the rotary table, which is computed here.
    let superfluous = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || (config.tie_word_embeddings && name == "lm_head.weight")
    };
    checkpoint.check(&wanted, &superfluous)?;
    checkpoint.dtype_of(
        parts()
            .filter(|p| p.shape[1] > 1)
            .map(|p| p.tensor.as_str()),
    )
}
