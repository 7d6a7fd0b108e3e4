//! What the forward pass asks of the machine: about a dozen fused operations over buffers that exist before the step.

use super::Layer;
use crate::layout::{KV_BLOCK, Limits};
use crate::{Error, Result};

/// Marks a token that the host does not know yet: what the step before has chosen in the row that the other bits name.
/// Only for backends with [`Backend::fetch_choices`].
pub const CHOSEN: u32 = 1 << 31;

/// The tokens of one step: prefill chunks and single decode tokens of many sequences, back to back.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[T]`; with [`CHOSEN`] set, the logit row in which the step before has chosen the token.
    pub tokens: Vec<u32>,
    /// Position of each token in its own sequence, `[T]`.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their tokens.
    pub seqs: Vec<BatchSeq>,
    /// The token rows whose logits are wanted, `[S]`, ascending.
    pub logit_rows: Vec<u32>,
    /// How the token of each such row is drawn, `[S]`; none where all take the most likely one, or where whoever has the
    /// logits draws. Only for backends with [`Backend::fetch_choices`].
    pub draws: Vec<Draw>,
}

/// How a token is drawn from a row of logits; the fields are those of [`crate::engine::SamplingParams`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// From 1 to [`crate::layout::CANDIDATES`].
    pub top_k: u32,
    /// In `[0, 1]`.
    pub top_p: f32,
    /// In `[0, 1]`.
    pub min_p: f32,
    /// For tokens that the sequence has already, as far as they are in the cache once this step is done.
    pub repetition_penalty: f32,
    /// In `[0, 1)`: which of the tokens it is.
    pub uniform: f32,
}

impl Draw {
    /// Whether it is the argmax of the logits as they are.
    pub fn is_plain_argmax(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }
}

/// One sequence's part of a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSeq {
    /// Its first token row.
    pub start: usize,
    /// Its number of token rows.
    pub len: usize,
    /// Its cached tokens once this step is done.
    pub context_len: usize,
    /// The KV blocks of its tokens `0..context_len`, in order.
    pub blocks: Vec<u32>,
}

impl Limits {
    /// Whether a step fits, and its parts fit together: every backend asks before it writes anywhere.
    ///
    /// # Errors
    /// A step that is empty, too large, or contradicts itself.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let (t, s) = (batch.tokens.len(), batch.logit_rows.len());
        let (mt, ms) = (self.max_step_tokens, self.max_logit_rows);
        if t == 0 || t > mt || s > ms {
            return Err(Error::failed(format!(
                "a step of {t} tokens and {s} logit rows does not fit the plan's {mt} and {ms}"
            )));
        }
        let wrong = || Error::failed("a step's sequences, blocks and tokens do not fit together");
        let (mut next, mut n_blocks) = (0, 0);
        for seq in &batch.seqs {
            let in_order = seq.start == next && seq.len > 0 && seq.len <= seq.context_len;
            let known = |&b: &u32| (b as usize) < self.n_kv_blocks;
            let room = seq.context_len <= seq.blocks.len() * KV_BLOCK;
            if !(in_order && room && seq.blocks.iter().all(known)) {
                return Err(wrong());
            }
            next += seq.len;
            n_blocks += seq.blocks.len();
        }
        let ascending = batch.logit_rows.is_sorted_by(|a, b| a < b);
        let rows = ascending
            && batch.logit_rows.iter().all(|&r| (r as usize) < t)
            && (batch.draws.is_empty() || batch.draws.len() == s);
        if next != t || batch.positions.len() != t || n_blocks > self.n_kv_blocks || !rows {
            return Err(wrong());
        }
        Ok(())
    }
}

/// The buffers of a step, T = tokens of the step; `plan::memory` lists their sizes.
#[derive(Debug)]
pub struct Activations<Buf> {
    /// Residual stream, `[T, hidden]`, whole on every rank.
    pub x: Buf,
    /// Normalised input of the next product, `[T, hidden]`.
    pub h: Buf,
    /// Rotated queries, `[T, n_heads_local · head_dim]`.
    pub q: Buf,
    /// Attention output, `[T, n_heads_local · head_dim]`.
    pub attn: Buf,
    /// MLP activations, `[T, intermediate_local]`.
    pub mlp: Buf,
    /// A row-parallel product, or the embedding, before its sum over ranks, `[T, hidden]`.
    pub partial: Buf,
    /// Logits of the wanted rows, `[S, vocab]`, whole on every rank.
    pub logits: Buf,
}

/// A token chosen from one row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token; the lowest id among equals where the most likely one is taken.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
    /// Natural logarithm of the sum of exp(logit) over the known tokens.
    pub log_sum_exp: f64,
}

/// A step's choices on their way to the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Fetch(pub(crate) usize);

/// A place where the forward pass runs. All operations refer to the batch given to [`Backend::begin`].
///
/// # Errors
/// Every operation may fail: a lost rank in a collective, a lost device, a step larger than the plan.
pub trait Backend {
    /// A matrix or vector in its final place.
    type Weight;
    /// A step buffer.
    type Buf;

    /// Rows of logits from token `n` on only pad the vocabulary and are never chosen; without this all may be.
    fn set_known_tokens(&mut self, _n: usize) {}
    /// Takes in the step's tokens, positions and block tables.
    fn begin(&mut self, batch: &Batch) -> Result<()>;
    /// Rows of `table` for the tokens go to `partial`, zeros for tokens of other ranks' rows; `x` begins as zeros. The sum
    /// over ranks is then like every other, and exact: no two ranks add to the same row.
    fn embed(
        &mut self,
        table: &Self::Weight,
        partial: &mut Self::Buf,
        x: &mut Self::Buf,
    ) -> Result<()>;
    /// Sums `partial` over the ranks, adds it to `x`, and `h = RMSNorm(x) · weight`.
    fn all_reduce_add_norm(
        &mut self,
        partial: &mut Self::Buf,
        x: &mut Self::Buf,
        weight: &Self::Weight,
        h: &mut Self::Buf,
    ) -> Result<()>;
    /// The q, k and v products with bias, head norms and rotation; k and v go to the cache of layer `index`.
    fn qkv(
        &mut self,
        index: usize,
        layer: &Layer<Self::Weight>,
        h: &Self::Buf,
        q: &mut Self::Buf,
    ) -> Result<()>;
    /// Causal attention of the queries over the cache of layer `index`.
    fn attention(&mut self, index: usize, q: &Self::Buf, attn: &mut Self::Buf) -> Result<()>;
    /// Moves the rows whose logits are wanted to the front; the operations that follow see no others.
    fn keep_wanted(&mut self, attn: &mut Self::Buf, x: &mut Self::Buf) -> Result<()>;
    /// `y = x · weightᵀ`.
    fn matmul(&mut self, x: &Self::Buf, weight: &Self::Weight, y: &mut Self::Buf) -> Result<()>;
    /// `mlp = silu(h · gateᵀ) ⊙ (h · upᵀ)`, gate and up one above the other in `gate_up`.
    fn gate_up_silu(
        &mut self,
        h: &Self::Buf,
        gate_up: &Self::Weight,
        mlp: &mut Self::Buf,
    ) -> Result<()>;
    /// `h · headᵀ`, the ranks' vocabulary parts joined.
    fn logits(&mut self, h: &Self::Buf, head: &Self::Weight, logits: &mut Self::Buf) -> Result<()>;
    /// The most likely known token of each wanted row, or the one drawn as [`Batch::draws`] says, found where the logits are
    /// and kept there for the next step; a backend without [`Backend::fetch_choices`] leaves choosing to whoever has
    /// [`Backend::read_logits`].
    fn choose(&mut self, _logits: &Self::Buf) -> Result<()> {
        Ok(())
    }
    /// Starts bringing the step's choices to the host, without waiting; `None` where the backend does not choose. At most
    /// two are on their way at a time.
    fn fetch_choices(&mut self) -> Result<Option<Fetch>> {
        Ok(None)
    }
    /// Waits for choices on their way.
    fn choices(&mut self, _fetch: Fetch) -> Result<Vec<Choice>> {
        Ok(Vec::new())
    }
    /// The logits of the step begun last on the host, `[S, vocab]`.
    fn read_logits<'a>(&'a mut self, logits: &'a Self::Buf) -> Result<&'a [f32]>;
    /// The orderly end, on every rank alike and before the backend is dropped; no step follows. A backend dropped without
    /// it gives up whatever still waits for another rank.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
