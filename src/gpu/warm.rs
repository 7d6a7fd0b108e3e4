//! What a first request would pay for, paid at the start: libraries choose their algorithms and load their code, ranks
//! connect, decode graphs are recorded.

use super::LoadedRank;
use super::step::splits;
use crate::Result;
use crate::layout::{CANDIDATES, KV_BLOCK};
use crate::model::{Backend, Batch, BatchSeq, BlockPool, Draw, forward};
use std::time::Instant;

/// Rows of the smallest prefill: fewer are products of our own.
const SMALLEST: usize = 16;
/// Layers of all recorded steps together: each runs once, which takes a fifth of a millisecond or so, and all of them half a
/// second. A count, because the ranks have to stop at the same step.
const RECORDED_LAYERS: usize = 2500;
/// Attention of one sequence is cut no further anywhere: by the multiprocessors of a GPU whose rank has one KV head.
const MOST_SPLITS: usize = 132;
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
        if self.backend.steps_offload {
            // A step passes over the link whatever it does not hold, and wants all layers in their order: one long step,
            // and two short ones of which the second is recorded.
            self.run(&sequence(0, longest, 1))?;
            for _ in 0..2 {
                self.run(&drawn(sequence(longest - 1, longest, 1)))?;
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
        let n_seqs = self.record_decode_steps()?;
        tracing::info!(
            "warmed up in {:.2} s, {} decode graphs for up to {n_seqs} sequences",
            start.elapsed().as_secs_f64(),
            self.backend.recorded_graphs()
        );
        Ok(())
    }

    /// Records the decode steps that there may be, those of few sequences first; the largest number of sequences for which
    /// all are recorded. What is left is recorded when it first comes.
    fn record_decode_steps(&mut self) -> Result<usize> {
        let n_blocks = self.backend.limits.n_kv_blocks;
        let (mut recorded, mut n_layers) = (0, 0);
        for n in doubling(1, self.backend.most_seqs()) {
            // The fewest sequences that are filled up to `n` leave the longest one the most blocks.
            let n_seqs = recorded + 1;
            if n_seqs > n_blocks {
                break;
            }
            let contexts = contexts(n, (n_blocks - recorded) * KV_BLOCK);
            n_layers += (contexts.len() + 1) * self.model.layers.len();
            if n > 1 && n_layers > RECORDED_LAYERS {
                break;
            }
            // The first one runs as it is.
            for context in std::iter::once(1).chain(contexts) {
                self.run(&decode(n_seqs, context))?;
            }
            recorded = n;
        }
        Ok(recorded)
    }

    /// A prompt of `n` tokens, with as many rows of logits as a step may have.
    fn prefill(&mut self, n: usize) -> Result<()> {
        let rows = self.backend.limits.max_logit_rows.min(n);
        let batch = sequence(0, n, rows);
        if n > SMALLEST {
            return self.run(&batch);
        }
        self.run(&drawn(batch))?;
        self.backend.read_logits(&self.activations.logits)?;
        Ok(())
    }

    fn run(&mut self, batch: &Batch) -> Result<()> {
        forward(&mut self.backend, &self.model, &mut self.activations, batch)?;
        // The step after it overwrites what it reads.
        self.backend.synchronize()
    }
}

/// Lengths of the longest of `n` sequences, up to `most`, that differ in how attention is cut on some rank: ranks with fewer
/// KV heads cut further, and all have to take the same steps.
fn contexts(n: usize, most: usize) -> Vec<usize> {
    let mut contexts: Vec<usize> = doubling(64, most).collect();
    contexts.dedup_by_key(|c| splits(*c, n, MOST_SPLITS));
    contexts
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
        draws: Vec::new(),
    }
}

/// The same step with a token drawn from every row, in the way that takes the most work.
fn drawn(mut batch: Batch) -> Batch {
    let draw = Draw {
        temperature: 1.0,
        top_k: CANDIDATES as u32,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.1,
        uniform: 0.5,
    };
    batch.draws = vec![draw; batch.logit_rows.len()];
    batch
}

/// A token of each of `n` sequences with a block each; the first one's is the last of `context`.
fn decode(n: usize, context: usize) -> Batch {
    let mut batch = sequence(context - 1, context, 1);
    let first_free = BlockPool::blocks_for(context) as u32;
    for row in 1..n {
        batch.tokens.push(0);
        batch.positions.push(0);
        batch.logit_rows.push(row as u32);
        batch.seqs.push(BatchSeq {
            start: row,
            len: 1,
            context_len: 1,
            blocks: vec![first_free + row as u32 - 1],
        });
    }
    batch
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
