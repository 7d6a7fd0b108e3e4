//! What a first request would pay for, paid at the start: libraries choose their algorithms and load their code, ranks
//! connect, decode graphs are recorded.

use super::LoadedRank;
use crate::Result;
use crate::model::{Backend, Batch, BatchSeq, BlockPool, KV_BLOCK, forward};
use std::time::Instant;

/// Rows of the smallest prefill: fewer are products of our own.
const SMALLEST: usize = 16;
/// Layers that show every shape of product there is: behind the last one's attention only the wanted rows are left.
const LAYERS: usize = 2;

impl LoadedRank {
    /// Runs steps of every kind, the same on every rank; `n_known` as for [`Backend::set_known_tokens`].
    ///
    /// They write to cache blocks that no sequence has yet, and leave nothing that a step could see.
    ///
    /// # Errors
    /// Those of the forward pass.
    pub fn warm_up(&mut self, n_known: usize) -> Result<()> {
        self.backend.comm.meet()?;
        let start = Instant::now();
        self.backend.set_known_tokens(n_known);
        let limits = self.backend.limits;
        let context = limits.n_kv_blocks * KV_BLOCK;
        let longest = limits.max_step_tokens.min(context);
        if self.backend.offload.is_some() {
            // A step passes over the link whatever it does not hold, and wants all layers in their order: one long step,
            // and two short ones of which the second is recorded.
            self.run(&sequence(0, longest, 1))?;
            for _ in 0..2 {
                self.run(&sequence(longest - 1, longest, 1))?;
            }
            return Ok(());
        }
        let rest = self
            .model
            .layers
            .split_off(LAYERS.min(self.model.layers.len()));
        let prefilled = doubling(SMALLEST, longest).try_for_each(|n| self.prefill(n));
        self.model.layers.extend(rest);
        prefilled?;
        // The first of these runs as it is, and all that differ in how attention is cut are recorded.
        for context in std::iter::once(1).chain(doubling(64, context)) {
            self.run(&sequence(context - 1, context, 1))?;
        }
        tracing::info!(
            "warmed up in {:.2} s, {} decode graphs",
            start.elapsed().as_secs_f64(),
            self.backend.recorded_graphs()
        );
        Ok(())
    }

    /// A prompt of `n` tokens, with as many rows of logits as a step may have.
    fn prefill(&mut self, n: usize) -> Result<()> {
        let rows = self.backend.limits.max_logit_rows.min(n);
        self.run(&sequence(0, n, rows))?;
        if n == SMALLEST {
            self.backend.candidates(&self.activations.logits)?;
            self.backend.read_logits(&self.activations.logits)?;
        }
        Ok(())
    }

    fn run(&mut self, batch: &Batch) -> Result<()> {
        forward(&mut self.backend, &self.model, &mut self.activations, batch)?;
        // The step after it overwrites what it reads.
        self.backend.synchronize()
    }
}

/// `from`, its doubles below `to`, and `to`; only `to` where it is smaller.
fn doubling(from: usize, to: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(from.min(to)), move |&n| {
        (n < to).then(|| (2 * n).min(to))
    })
}

/// Tokens `from..to` of a sequence in the first blocks of the cache, the last `rows` of them with logits.
fn sequence(from: usize, to: usize, rows: usize) -> Batch {
    let n = to - from;
    Batch {
        tokens: vec![0; n],
        positions: (from as u32..to as u32).collect(),
        seqs: vec![BatchSeq {
            start: 0,
            len: n,
            context_len: to,
            blocks: (0..BlockPool::blocks_for(to) as u32).collect(),
        }],
        logit_rows: ((n - rows) as u32..n as u32).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double_up_to_the_largest() {
        let sizes = |from, to| doubling(from, to).collect::<Vec<_>>();
        assert_eq!(sizes(16, 100), [16, 32, 64, 100]);
        assert_eq!(sizes(16, 64), [16, 32, 64]);
        assert_eq!(sizes(16, 5), [5]);
    }
}
