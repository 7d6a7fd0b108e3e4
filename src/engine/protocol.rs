//! What rank 0 tells the other ranks.

use super::sampler::SamplingParams;
use serde::{Deserialize, Serialize};

/// Identifies a sequence for as long as the engine runs.
pub type SeqId = u64;

/// A sequence's first appearance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewSequence {
    /// Its id.
    pub id: SeqId,
    /// The prompt's tokens; never empty.
    pub prompt: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// Its KV blocks, enough for the prompt and the longest answer allowed.
    pub blocks: Vec<u32>,
}

/// A sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Which sequence.
    pub id: SeqId,
    /// How many of its known but not yet computed tokens this step takes.
    pub n_tokens: u32,
}

/// One step, as decided by rank 0; the same plan on every rank gives the same tokens on every rank.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Sequences that ended since the last step.
    pub dropped: Vec<SeqId>,
    /// Sequences that begin.
    pub admitted: Vec<NewSequence>,
    /// What is computed.
    pub entries: Vec<Entry>,
}

/// A message on the control connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    Step(StepPlan),
    Finish,
}
