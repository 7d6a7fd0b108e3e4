//! Every rank's half of a step: turn the plan into a batch, run the forward pass, sample.

use super::protocol::{SeqId, StepPlan};
use super::sampler::{Sampler, SamplingParams, log_sum_exp};
use crate::model::{
    Activations, Backend, Batch, BatchSeq, BlockPool, CHOSEN, Choice, Draw, Fetch, Qwen, forward,
};
use crate::{Error, Result};
use std::collections::{HashMap, VecDeque};

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
    /// Prompt and answer so far, as far as the host knows them.
    tokens: Vec<u32>,
    /// How many of them are in the KV cache, or will be when the steps under way are done.
    computed: usize,
    blocks: Vec<u32>,
    sampling: SamplingParams,
    /// The token that follows while only the device knows it.
    awaited: Option<Awaited>,
}

/// A token that a step under way chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Awaited {
    /// The number of the step.
    step: u64,
    /// Its row of logits.
    row: u32,
}

impl Sequence {
    /// Tokens that the next step may take, known or awaited.
    fn len(&self) -> usize {
        self.tokens.len() + usize::from(self.awaited.is_some())
    }

    /// Tokens `from..to`, an awaited one by the row that it comes from.
    fn tokens(&self, from: usize, to: usize) -> impl Iterator<Item = u32> {
        let known = &self.tokens[from.min(self.tokens.len())..to.min(self.tokens.len())];
        let awaited = self.awaited.filter(|_| to > self.tokens.len());
        known.iter().copied().chain(awaited.map(|a| CHOSEN | a.row))
    }
}

/// A step that was begun and whose tokens were not collected.
enum Begun {
    /// The device chooses the tokens.
    UnderWay {
        step: u64,
        finishing: Vec<SeqId>,
        fetch: Fetch,
    },
    Done(Vec<Sampled>),
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
    /// Every row of logits chosen from, where they are wanted.
    kept: Option<Vec<f32>>,
    /// Oldest first.
    begun: VecDeque<Begun>,
    n_steps: u64,
}

impl<B: Backend> Replica<B> {
    /// `vocab_size` is the width of a row of logits, of which the first `n_tokens_known` belong to real tokens: rows
    /// that pad the vocabulary are never sampled.
    pub fn new(
        mut backend: B,
        model: Qwen<B::Weight>,
        activations: Activations<B::Buf>,
        vocab_size: usize,
        n_tokens_known: usize,
    ) -> Self {
        let n_tokens_known = n_tokens_known.min(vocab_size);
        backend.set_known_tokens(n_tokens_known);
        let (sequences, sampler, batch, begun) = Default::default();
        Replica {
            backend,
            model,
            activations,
            vocab_size,
            n_tokens_known,
            sequences,
            sampler,
            batch,
            kept: None,
            begun,
            n_steps: 0,
        }
    }

    /// Keeps every row of logits that a token is chosen from.
    pub fn keep_logits(&mut self) {
        self.kept.get_or_insert_default();
    }

    /// The rows kept so far, `[tokens, vocab]`.
    pub fn kept_logits(&self) -> &[f32] {
        self.kept.as_deref().unwrap_or_default()
    }

    /// Begins a step. Whether it is under way: then the next may be begun before its tokens are collected, though no
    /// third one. Otherwise it is done.
    ///
    /// # Errors
    /// A plan that does not fit what this rank knows, or a failure of the backend.
    pub fn submit(&mut self, plan: &StepPlan) -> Result<bool> {
        // What is awaited comes from the step right before this one.
        self.settle(1)?;
        for id in &plan.dropped {
            self.sequences.remove(id);
        }
        for new in &plan.admitted {
            let sequence = Sequence {
                tokens: new.prompt.clone(),
                computed: 0,
                blocks: new.blocks.clone(),
                sampling: new.sampling.clone(),
                awaited: None,
            };
            self.sequences.insert(new.id, sequence);
        }
        if plan.entries.is_empty() {
            self.begun.push_back(Begun::Done(Vec::new()));
            return Ok(false);
        }
        let finishing = self.make_batch(plan)?;
        let on_device = self.leave_to_device(&finishing);
        self.n_steps += 1;
        forward(
            &mut self.backend,
            &self.model,
            &mut self.activations,
            &self.batch,
        )?;
        if on_device && let Some(fetch) = self.backend.fetch_choices()? {
            self.begun_on_device(finishing, fetch);
            return Ok(true);
        }
        // The sampler looks at all the tokens before.
        self.settle(0)?;
        let sampled = self.sample(&finishing)?;
        self.begun.push_back(Begun::Done(sampled));
        Ok(false)
    }

    /// Waits for the oldest step not yet collected; a token for each sequence whose known tokens were then all computed.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn collect(&mut self) -> Result<Vec<Sampled>> {
        self.settle(self.begun.len().saturating_sub(1))?;
        match self.begun.pop_front() {
            Some(Begun::Done(sampled)) => Ok(sampled),
            _ => Err(Error::failed("internal error: no step was begun")),
        }
    }

    /// Carries out one step by itself: [`Replica::submit`] and [`Replica::collect`].
    ///
    /// # Errors
    /// Theirs.
    pub fn step(&mut self, plan: &StepPlan) -> Result<Vec<Sampled>> {
        self.submit(plan)?;
        self.collect()
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

    /// Whether a device can choose every token that the step produces; then the batch says how.
    fn leave_to_device(&mut self, finishing: &[SeqId]) -> bool {
        self.batch.draws.clear();
        if self.kept.is_some() || finishing.is_empty() {
            return false;
        }
        for s in finishing.iter().filter_map(|id| self.sequences.get(id)) {
            let Some(draw) = s.sampling.draw(s.len()) else {
                self.batch.draws.clear();
                return false;
            };
            self.batch.draws.push(draw);
        }
        if self.batch.draws.iter().all(Draw::is_plain_argmax) {
            self.batch.draws.clear();
        }
        true
    }

    fn begun_on_device(&mut self, finishing: Vec<SeqId>, fetch: Fetch) {
        let step = self.n_steps;
        for (id, row) in finishing.iter().zip(0..) {
            if let Some(s) = self.sequences.get_mut(id) {
                s.awaited = Some(Awaited { step, row });
            }
        }
        self.begun.push_back(Begun::UnderWay {
            step,
            finishing,
            fetch,
        });
    }

    /// Waits until at most the `keep` youngest steps are under way.
    fn settle(&mut self, keep: usize) -> Result<()> {
        for at in 0..self.begun.len().saturating_sub(keep) {
            let begun = std::mem::replace(&mut self.begun[at], Begun::Done(Vec::new()));
            self.begun[at] = match begun {
                Begun::Done(_) => begun,
                Begun::UnderWay {
                    step,
                    finishing,
                    fetch,
                } => {
                    let choices = self.backend.choices(fetch)?;
                    for id in &finishing {
                        if let Some(s) = self.sequences.get_mut(id) {
                            s.awaited = s.awaited.filter(|a| a.step != step);
                        }
                    }
                    Begun::Done(self.take_in(&finishing, &choices)?)
                }
            };
        }
        Ok(())
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
            if len == 0 || to > s.len() || BlockPool::blocks_for(to) > s.blocks.len() {
                let have = s.len();
                return Err(Error::failed(format!(
                    "step asks for tokens {from}..{to} of {have} known"
                )));
            }
            let start = batch.tokens.len();
            batch.tokens.extend(s.tokens(from, to));
            batch.positions.extend(from as u32..to as u32);
            let blocks = s.blocks[..BlockPool::blocks_for(to)].to_vec();
            batch.seqs.push(BatchSeq {
                start,
                len,
                context_len: to,
                blocks,
            });
            s.computed = to;
            if to == s.len() {
                batch.logit_rows.push((start + len - 1) as u32);
                finishing.push(entry.id);
            }
        }
        Ok(finishing)
    }

    /// Chooses on the host.
    fn sample(&mut self, finishing: &[SeqId]) -> Result<Vec<Sampled>> {
        if finishing.is_empty() {
            return Ok(Vec::new());
        }
        let known = self.n_tokens_known;
        let sequences = &self.sequences;
        let logits = self.backend.read_logits(&self.activations.logits)?;
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(&logits[..finishing.len() * self.vocab_size]);
        }
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
        let choices: Vec<Choice> = choices.collect();
        self.take_in(finishing, &choices)
    }

    /// Appends what was chosen to the sequences that still run.
    fn take_in(&mut self, finishing: &[SeqId], choices: &[Choice]) -> Result<Vec<Sampled>> {
        let mut sampled = Vec::with_capacity(finishing.len());
        for (&id, choice) in finishing.iter().zip(choices) {
            // A sequence that ended while the step was under way has no use for its token.
            let Some(s) = self.sequences.get_mut(&id) else {
                continue;
            };
            if !choice.logit.is_finite() || choice.log_sum_exp.is_nan() {
                return Err(Error::failed(
                    "the logits are not finite: the checkpoint's weights are damaged or overflow its precision",
                ));
            }
            s.tokens.push(choice.token);
            let logprob = (f64::from(choice.logit) - choice.log_sum_exp) as f32;
            sampled.push(Sampled {
                id,
                token: choice.token,
                logprob,
            });
        }
        Ok(sampled)
    }
}
