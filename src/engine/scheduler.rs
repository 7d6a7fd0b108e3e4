//! Rank 0's decisions: which sequences run, and how many of their tokens the next step takes.
//!
//! Decode tokens go first, so that running answers never wait for a long prompt; what is left of the step is filled
//! with chunks of prompts, oldest first. A sequence is admitted when blocks for its prompt and its longest allowed
//! answer are free, so a running sequence can never be without room.

use super::protocol::{Entry, NewSequence, SeqId, StepPlan};
use super::replica::Sampled;
use super::sampler::SamplingParams;
use crate::layout::KV_BLOCK;
use crate::model::{BlockPool, CHOSEN};
use crate::{Error, Result};
use serde::Serialize;
use std::collections::VecDeque;

/// What a user asks for, in tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt; not empty.
    pub prompt: Vec<u32>,
    /// The longest answer; at least 1.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<u32>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token, or a stop string.
    Stop,
    /// `max_tokens` reached.
    Length,
}

/// A new token of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whose token.
    pub id: SeqId,
    /// Which token.
    pub token: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
    /// Set on the last one.
    pub finish: Option<FinishReason>,
}

#[derive(Debug)]
struct Running {
    id: SeqId,
    request: Request,
    blocks: Vec<u32>,
    /// Prompt tokens already computed or planned.
    prefilled: usize,
    /// Tokens that planned steps will have produced.
    planned: usize,
    /// Tokens known.
    generated: usize,
}

/// Rank 0's queue and running set.
#[derive(Debug)]
pub struct Scheduler {
    pool: BlockPool,
    max_step_tokens: usize,
    max_seqs: usize,
    context: usize,
    vocab_size: usize,
    waiting: VecDeque<(SeqId, Request)>,
    running: Vec<Running>,
    dropped: Vec<SeqId>,
    next_id: SeqId,
}

impl Scheduler {
    /// `context` limits prompt and answer together; a step takes at most `max_step_tokens` of at most `max_seqs`.
    pub fn new(n_blocks: usize, max_step_tokens: usize, max_seqs: usize, context: usize) -> Self {
        Scheduler {
            pool: BlockPool::new(n_blocks),
            max_step_tokens,
            max_seqs: max_seqs.min(max_step_tokens),
            context,
            vocab_size: CHOSEN as usize,
            waiting: VecDeque::new(),
            running: Vec::new(),
            dropped: Vec::new(),
            next_id: 0,
        }
    }

    /// Refuses ids without a row in an embedding of `vocab_size` rows: a backend would read past its end.
    pub fn with_vocab_size(mut self, vocab_size: usize) -> Self {
        self.vocab_size = vocab_size.min(CHOSEN as usize);
        self
    }

    /// Queues a request.
    ///
    /// # Errors
    /// An empty prompt, one that does not fit the context, a request larger than the whole cache, or an id without a row
    /// in the embedding.
    pub fn submit(&mut self, mut request: Request) -> Result<SeqId> {
        let (prompt, answer) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err(Error::failed(
                "the prompt is empty: give at least one token",
            ));
        }
        if answer == 0 {
            return Err(Error::usage("--max-tokens 0: at least 1"));
        }
        if let Some(id) = request
            .prompt
            .iter()
            .find(|&&id| id as usize >= self.vocab_size)
        {
            return Err(Error::failed(format!(
                "internal error: token {id} of the prompt is not below the {} rows of the embedding",
                self.vocab_size
            )));
        }
        let total = prompt.saturating_add(answer);
        if total > self.context {
            return Err(Error::failed(format!(
                "the prompt's {prompt} tokens and --max-tokens {answer} make {total}, over the context of {}",
                self.context
            )));
        }
        if BlockPool::blocks_for(total) > self.pool.total() {
            return Err(Error::failed(format!(
                "the prompt's {prompt} tokens and --max-tokens {answer} need {total} cache entries of the {} there are",
                self.pool.total() * KV_BLOCK
            )));
        }
        request.sampling.bans.prompt_len = prompt;
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// Ends a sequence, wherever it is.
    pub fn cancel(&mut self, id: SeqId) {
        self.waiting.retain(|w| w.0 != id);
        if let Some(at) = self.running.iter().position(|r| r.id == id) {
            self.retire(at);
        }
    }

    /// Longest sequence, prompt and answer together.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Whether any request is queued or running.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Decides the next step; `None` when there is nothing to compute.
    ///
    /// It may be asked for before the step before it is recorded. A sequence whose last token may come from that one takes
    /// part all the same, and what the step makes of it is passed over should it have ended.
    pub fn next_step(&mut self) -> Option<StepPlan> {
        let admitted = self.admit();
        let mut room = self.max_step_tokens;
        let mut entries = Vec::new();
        let in_prefill = |r: &Running| r.prefilled < r.request.prompt.len();
        let wants_more = |r: &Running| !in_prefill(r) && r.planned < r.request.max_tokens;
        for r in self.running.iter_mut().filter(|r| wants_more(r)) {
            entries.push(Entry {
                id: r.id,
                n_tokens: 1,
            });
            r.planned += 1;
            room -= 1;
        }
        for r in self.running.iter_mut() {
            if !in_prefill(r) {
                continue;
            }
            let n = room.min(r.request.prompt.len() - r.prefilled);
            if n == 0 {
                break;
            }
            entries.push(Entry {
                id: r.id,
                n_tokens: n as u32,
            });
            r.prefilled += n;
            r.planned += usize::from(!in_prefill(r));
            room -= n;
        }
        if entries.is_empty() {
            return None;
        }
        Some(StepPlan {
            dropped: std::mem::take(&mut self.dropped),
            admitted,
            entries,
        })
    }

    /// Takes in what a step produced.
    pub fn record(&mut self, sampled: &[Sampled]) -> Vec<Event> {
        let mut events = Vec::with_capacity(sampled.len());
        for s in sampled {
            let Some(at) = self.running.iter().position(|r| r.id == s.id) else {
                continue;
            };
            let r = &mut self.running[at];
            r.generated += 1;
            let finish = if r.request.stop_tokens.contains(&s.token) {
                Some(FinishReason::Stop)
            } else if r.generated == r.request.max_tokens {
                Some(FinishReason::Length)
            } else {
                None
            };
            if finish.is_some() {
                self.retire(at);
            }
            events.push(Event {
                id: s.id,
                token: s.token,
                logprob: s.logprob,
                finish,
            });
        }
        events
    }

    fn admit(&mut self) -> Vec<NewSequence> {
        let mut admitted = Vec::new();
        while self.running.len() < self.max_seqs
            && let Some((_, request)) = self.waiting.front()
            && let Some(blocks) = self.pool.take(BlockPool::blocks_for(
                request.prompt.len() + request.max_tokens,
            ))
            && let Some((id, request)) = self.waiting.pop_front()
        {
            admitted.push(NewSequence {
                id,
                prompt: request.prompt.clone(),
                sampling: request.sampling.clone(),
                blocks: blocks.clone(),
            });
            self.running.push(Running {
                id,
                request,
                blocks,
                prefilled: 0,
                planned: 0,
                generated: 0,
            });
        }
        admitted
    }

    /// Its blocks may go to a sequence of a later step at once: steps run in the order in which they are planned, also
    /// one that is under way and still has a token of this sequence.
    fn retire(&mut self, at: usize) {
        let r = self.running.remove(at);
        self.pool.give_back(r.blocks);
        self.dropped.push(r.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: usize, max_tokens: usize) -> Request {
        let sampling = SamplingParams::greedy();
        Request {
            prompt: vec![1; prompt],
            max_tokens,
            sampling,
            stop_tokens: vec![9],
        }
    }

    fn entries(plan: &StepPlan) -> Vec<(SeqId, u32)> {
        plan.entries.iter().map(|e| (e.id, e.n_tokens)).collect()
    }

    fn token(id: SeqId, token: u32) -> Sampled {
        Sampled {
            id,
            token,
            logprob: 0.0,
        }
    }

    #[test]
    fn decode_goes_first_and_prompts_fill_the_rest() {
        let mut s = Scheduler::new(100, 10, 4, 1000);
        let a = s.submit(request(4, 8)).unwrap();
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 4)]);
        s.record(&[token(a, 5)]);
        let b = s.submit(request(25, 2)).unwrap();
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 1), (b, 9)]);
        s.record(&[token(a, 5)]);
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 1), (b, 9)]);
        let last = s.record(&[token(a, 9)]);
        assert_eq!(last[0].finish, Some(FinishReason::Stop));
        let plan = s.next_step().unwrap();
        assert_eq!(
            (plan.dropped.clone(), entries(&plan)),
            (vec![a], vec![(b, 7)])
        );
        s.record(&[token(b, 5)]);
        s.next_step().unwrap();
        assert_eq!(
            s.record(&[token(b, 5)])[0].finish,
            Some(FinishReason::Length)
        );
        assert!(!s.has_work());
        assert_eq!(s.pool.free(), 100);
    }

    #[test]
    fn a_step_may_be_planned_before_the_one_in_front_is_known() {
        let mut s = Scheduler::new(100, 10, 4, 1000);
        let (a, b) = (
            s.submit(request(4, 2)).unwrap(),
            s.submit(request(3, 5)).unwrap(),
        );
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 4), (b, 3)]);
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 1), (b, 1)]);
        // b stops in the first step; the second has a token of it all the same, which is nobody's.
        assert_eq!(s.record(&[token(a, 5), token(b, 9)]).len(), 2);
        assert_eq!(s.next_step(), None, "a has all its tokens planned");
        let events = s.record(&[token(a, 6), token(b, 7)]);
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].finish, Some(FinishReason::Length));
        let c = s.submit(request(2, 1)).unwrap();
        let plan = s.next_step().unwrap();
        assert_eq!(
            (plan.dropped.clone(), entries(&plan)),
            (vec![b, a], vec![(c, 2)])
        );
    }

    #[test]
    fn an_id_without_a_row_is_refused_and_so_is_one_that_means_a_chosen_token() {
        let with = |ids: &[u32]| Request {
            prompt: ids.to_vec(),
            ..request(1, 1)
        };
        let mut s = Scheduler::new(4, 64, 4, 64);
        assert!(s.submit(with(&[1, CHOSEN])).is_err());
        let mut s = s.with_vocab_size(300);
        let line = s.submit(with(&[1, 300])).unwrap_err().to_string();
        assert!(
            line.contains("token 300") && line.contains("300 rows"),
            "{line}"
        );
        s.submit(with(&[299])).unwrap();
    }

    #[test]
    fn a_request_waits_until_all_its_blocks_are_free() {
        let mut s = Scheduler::new(4, 64, 4, 64);
        let a = s.submit(request(30, 10)).unwrap();
        let b = s.submit(request(20, 10)).unwrap();
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 30)]);
        s.record(&[token(a, 1)]);
        assert_eq!(entries(&s.next_step().unwrap()), [(a, 1)]);
        s.cancel(a);
        assert_eq!(entries(&s.next_step().unwrap()), [(b, 20)]);
    }

    #[test]
    fn requests_that_can_never_run_are_refused_with_the_numbers() {
        let mut s = Scheduler::new(4, 64, 4, 100);
        let refused = |s: &mut Scheduler, p, m| s.submit(request(p, m)).unwrap_err().to_string();
        assert!(refused(&mut s, 0, 5).contains("empty"));
        assert!(refused(&mut s, 5, 0).contains("--max-tokens 0"));
        assert!(refused(&mut s, 90, 11).contains("make 101, over the context of 100"));
        assert!(refused(&mut s, 60, 20).contains("need 80 cache entries of the 64"));
        assert!(refused(&mut s, 5, usize::MAX).contains("over the context"));
    }
}
