//! The engine: rank 0 schedules, every rank steps, rank 0 emits.
//!
//! [`Scheduler`] decides on rank 0 what the next step computes; [`StepPlan`] is that decision, sent to all ranks;
//! [`Replica`] carries it out on each of them and samples the same tokens everywhere; [`Engine`] ties them together.
//!
//! Where the device chooses the tokens itself, the host is one step ahead: a step is begun before the tokens of the one in
//! front are known, so that the device never waits for the host. Every rank begins the same steps in the same order; when it
//! collects their tokens is its own affair.

mod bans;
mod protocol;
mod replica;
pub mod sampler;
mod scheduler;

pub use bans::Bans;
pub use protocol::{Entry, NewSequence, SeqId, StepPlan};
pub use replica::{Replica, Sampled};
pub use sampler::{Sampler, SamplingParams};
pub use scheduler::{Event, FinishReason, Request, Scheduler};

use crate::model::Backend;
use crate::world::Group;
use crate::{Error, Result};
use protocol::Command;

/// What carries out a step: a [`Replica`] over any backend.
pub trait Step {
    /// Begins a step. Whether it is under way: then the next may be begun before its tokens are collected, though no
    /// third one. Otherwise it is done.
    ///
    /// # Errors
    /// A plan that does not fit what this rank knows, or a failure of the backend.
    fn submit(&mut self, plan: &StepPlan) -> Result<bool>;

    /// Waits for the oldest step not yet collected; a token for each sequence whose known tokens were then all computed.
    ///
    /// # Errors
    /// Those of the backend.
    fn collect(&mut self) -> Result<Vec<Sampled>>;

    /// The orderly end, on every rank alike; no step follows.
    ///
    /// # Errors
    /// Those of the backend.
    fn finish(&mut self) -> Result<()>;

    /// Has every row of logits that a token is chosen from kept from now on; on all ranks or on none, since fetching
    /// them is a collective. For measurements of accuracy.
    fn keep_logits(&mut self) {}
    /// The rows kept so far, `[tokens, vocab]`, in the order of choice.
    fn kept_logits(&self) -> &[f32] {
        &[]
    }
}

impl<B: Backend> Step for Replica<B> {
    fn submit(&mut self, plan: &StepPlan) -> Result<bool> {
        Replica::submit(self, plan)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>> {
        Replica::collect(self)
    }

    fn finish(&mut self) -> Result<()> {
        Replica::finish(self)
    }
    fn keep_logits(&mut self) {
        Replica::keep_logits(self);
    }
    fn kept_logits(&self) -> &[f32] {
        Replica::kept_logits(self)
    }
}

/// Rank 0's engine: requests in, tokens out.
pub struct Engine<'a> {
    scheduler: Scheduler,
    replica: &'a mut dyn Step,
    group: &'a Group,
    /// Steps begun and not yet collected.
    begun: usize,
}

impl<'a> Engine<'a> {
    /// Joins the parts on rank 0.
    pub fn new(scheduler: Scheduler, replica: &'a mut dyn Step, group: &'a Group) -> Self {
        Engine {
            scheduler,
            replica,
            group,
            begun: 0,
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// A request that could never run: empty, longer than the context, or larger than the whole KV cache.
    pub fn submit(&mut self, request: Request) -> Result<SeqId> {
        self.scheduler.submit(request)
    }

    /// Ends a sequence early, e.g. at a stop string.
    pub fn cancel(&mut self, id: SeqId) {
        self.scheduler.cancel(id);
    }

    /// Whether any request is queued or running.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    /// One step: schedule → forward → sample → emit, the next step begun first where that is possible.
    ///
    /// # Errors
    /// A failure of the forward pass, here or on another rank.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let mut ahead = false;
        while self.begun < 2
            && let Some(plan) = self.scheduler.next_step()
        {
            tracing::debug!(
                "step: {} sequences, {} tokens",
                plan.entries.len(),
                plan.entries.iter().map(|e| e.n_tokens).sum::<u32>()
            );
            let command = Command::Step(plan);
            self.tell(&command)?;
            let Command::Step(plan) = command else { break };
            self.begun += 1;
            ahead = self.replica.submit(&plan)?;
            if !ahead {
                break;
            }
        }
        let mut events = Vec::new();
        let left = usize::from(ahead && self.begun == 2);
        while self.begun > left {
            self.begun -= 1;
            let sampled = self.replica.collect()?;
            events.extend(self.scheduler.record(&sampled));
        }
        Ok(events)
    }

    /// Tells the other ranks that there is no more work, and comes to an end with them.
    ///
    /// # Errors
    /// A rank that is gone already.
    pub fn finish(self) -> Result<()> {
        self.tell(&Command::Finish)?;
        self.replica.finish()
    }

    /// The rows of logits kept so far, `[tokens, vocab]`; empty unless the session was told to keep them.
    pub fn kept_logits(&self) -> &[f32] {
        self.replica.kept_logits()
    }

    /// Longest sequence, prompt and answer together.
    pub fn context(&self) -> usize {
        self.scheduler.context()
    }

    fn tell(&self, command: &Command) -> Result<()> {
        if self.group.size() == 1 {
            return Ok(());
        }
        let bytes = postcard::to_stdvec(command)
            .map_err(|e| Error::failed(format!("step message: {e}")))?;
        self.group.broadcast(&bytes)
    }
}

/// The other ranks' loop: carry out what rank 0 decides until it says that there is no more.
///
/// # Errors
/// A failure of the forward pass, or rank 0 gone.
pub fn serve(replica: &mut dyn Step, group: &Group) -> Result<()> {
    let mut begun = 0;
    loop {
        let bytes = group.receive()?;
        let command = postcard::from_bytes(&bytes)
            .map_err(|e| Error::failed(format!("message from rank 0: {e}")))?;
        match command {
            Command::Step(plan) => {
                begun += 1;
                let left = usize::from(replica.submit(&plan)?);
                while begun > left {
                    begun -= 1;
                    replica.collect()?;
                }
            }
            Command::Finish => return replica.finish(),
        }
    }
}
