//! Every rank's half of a step: turn the plan into a batch, run the forward pass, sample.

use super::protocol::{SeqId, StepPlan};
use super::sampler::{Sampler, SamplingParams, log_sum_exp};
use crate::model::{Activations, Backend, Batch, BatchSeq, BlockPool, Choice, Qwen, forward};
use crate::{Error, Result};
use std::collections::HashMap;

/// A token that a step produced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Whose.
    pub id: SeqId,
    /// Which.
    pub token: u32,
    /// Natural logarithm of its probability under the model itself, before any sampling filter.
    pub logprob: f32,
}

#[derive(Debug)]
struct Sequence {
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    /// How many of them are in the KV cache.
    computed: usize,
    blocks: Vec<u32>,
    sampling: SamplingParams,
}

/// One rank's copy of the model and of every running sequence.
pub struct Replica<B: Backend> {
    backend: B,
    model: Qwen<B::Weight>,
    activations: Activations<B::Buf>,
    vocab_size: usize,
    n_tokens_known: usize,
    sequences: HashMap<SeqId, Sequence>,
    sampler: Sampler,
    batch: Batch,
}

impl<B: Backend> Replica<B> {
    /// `vocab_size` is the width of a row of logits, of which the first `n_tokens_known` belong to real tokens: rows
    /// that pad the vocabulary are never sampled.
    pub fn new(
        backend: B,
        model: Qwen<B::Weight>,
        activations: Activations<B::Buf>,
        vocab_size: usize,
        n_tokens_known: usize,
    ) -> Self {
        let n_tokens_known = n_tokens_known.min(vocab_size);
        let (sequences, sampler, batch) = Default::default();
        Replica {
            backend,
            model,
            activations,
            vocab_size,
            n_tokens_known,
            sequences,
            sampler,
            batch,
        }
    }

    /// Carries out one step and returns a token for each sequence whose known tokens are now all computed.
    ///
    /// # Errors
    /// A plan that does not fit what this rank knows, or a failure of the backend.
    pub fn step(&mut self, plan: &StepPlan) -> Result<Vec<Sampled>> {
        for id in &plan.dropped {
            self.sequences.remove(id);
        }
        for new in &plan.admitted {
            let sequence = Sequence {
                tokens: new.prompt.clone(),
                computed: 0,
                blocks: new.blocks.clone(),
                sampling: new.sampling.clone(),
            };
            self.sequences.insert(new.id, sequence);
        }
        if plan.entries.is_empty() {
            return Ok(Vec::new());
        }
        let finishing = self.make_batch(plan)?;
        forward(
            &mut self.backend,
            &self.model,
            &mut self.activations,
            &self.batch,
        )?;
        self.sample(&finishing)
    }

    /// The orderly end, on every rank alike; no step follows.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn finish(&mut self) -> Result<()> {
        self.backend.finish()
    }

    /// Runs one batch as it is and returns its logits, `[S, vocab]`; for tests and measurements.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn forward(&mut self, batch: &Batch) -> Result<&[f32]> {
        forward(&mut self.backend, &self.model, &mut self.activations, batch)?;
        self.backend.read_logits(&self.activations.logits)
    }

    /// Fills `self.batch`; returns the sequences whose last known token is in it.
    fn make_batch(&mut self, plan: &StepPlan) -> Result<Vec<SeqId>> {
        let batch = &mut self.batch;
        batch.tokens.clear();
        batch.positions.clear();
        batch.seqs.clear();
        batch.logit_rows.clear();
        let mut finishing = Vec::new();
        for entry in &plan.entries {
            let known = self.sequences.get_mut(&entry.id);
            let s = known
                .ok_or_else(|| Error::failed(format!("step for unknown sequence {}", entry.id)))?;
            let (from, len) = (s.computed, entry.n_tokens as usize);
            let to = from + len;
            if len == 0 || to > s.tokens.len() || BlockPool::blocks_for(to) > s.blocks.len() {
                let have = s.tokens.len();
                return Err(Error::failed(format!(
                    "step asks for tokens {from}..{to} of {have} known"
                )));
            }
            let start = batch.tokens.len();
            batch.tokens.extend_from_slice(&s.tokens[from..to]);
            batch.positions.extend(from as u32..to as u32);
            let blocks = s.blocks[..BlockPool::blocks_for(to)].to_vec();
            batch.seqs.push(BatchSeq {
                start,
                len,
                context_len: to,
                blocks,
            });
            s.computed = to;
            if to == s.tokens.len() {
                batch.logit_rows.push((start + len - 1) as u32);
                finishing.push(entry.id);
            }
        }
        Ok(finishing)
    }

    fn sample(&mut self, finishing: &[SeqId]) -> Result<Vec<Sampled>> {
        if finishing.is_empty() {
            return Ok(Vec::new());
        }
        let choices = self.choose(finishing)?;
        let mut sampled = Vec::with_capacity(finishing.len());
        for (&id, choice) in finishing.iter().zip(choices) {
            if !choice.logit.is_finite() {
                return Err(Error::failed(
                    "the logits are not finite: the checkpoint's weights are damaged or overflow its precision",
                ));
            }
            if let Some(s) = self.sequences.get_mut(&id) {
                s.tokens.push(choice.token);
            }
            let logprob = (choice.logit as f64 - choice.log_sum_exp) as f32;
            sampled.push(Sampled {
                id,
                token: choice.token,
                logprob,
            });
        }
        Ok(sampled)
    }

    /// A token for each of `finishing`: chosen where the logits are when all of them are plainly greedy, else here.
    fn choose(&mut self, finishing: &[SeqId]) -> Result<Vec<Choice>> {
        let known = self.n_tokens_known;
        let sequences = &self.sequences;
        let plain = |id| {
            sequences
                .get(id)
                .is_none_or(|s| s.sampling.is_plain_argmax())
        };
        if finishing.iter().all(plain)
            && let Some(choices) = self.backend.most_likely(&self.activations.logits, known)?
        {
            return Ok(choices);
        }
        let logits = self.backend.read_logits(&self.activations.logits)?;
        let rows = finishing.iter().zip(logits.chunks(self.vocab_size));
        let choices = rows.map(|(id, row)| {
            let choosable = &row[..known];
            let token = sequences.get(id).map_or(0, |s| {
                let position = s.tokens.len();
                self.sampler
                    .sample(choosable, &s.tokens, &s.sampling, position)
            });
            Choice {
                token,
                logit: choosable.get(token as usize).copied().unwrap_or(f32::NAN),
                log_sum_exp: log_sum_exp(choosable),
            }
        });
        Ok(choices.collect())
    }
}
