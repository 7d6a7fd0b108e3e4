//! The engine: rank 0 schedules, every rank steps, rank 0 emits.
//!
//! [`Scheduler`] decides on rank 0 what the next step computes; [`StepPlan`] is that decision, sent to all ranks;
//! [`Replica`] carries it out on each of them and samples the same tokens everywhere; [`Engine`] ties them together.

mod protocol;
mod replica;
pub mod sampler;
mod scheduler;

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
    /// Carries out one step and returns a token for each sequence whose known tokens are now all computed.
    ///
    /// # Errors
    /// A plan that does not fit what this rank knows, or a failure of the backend.
    fn step(&mut self, plan: &StepPlan) -> Result<Vec<Sampled>>;

    /// The orderly end, on every rank alike; no step follows.
    ///
    /// # Errors
    /// Those of the backend.
    fn finish(&mut self) -> Result<()>;
}

impl<B: Backend> Step for Replica<B> {
    fn step(&mut self, plan: &StepPlan) -> Result<Vec<Sampled>> {
        Replica::step(self, plan)
    }

    fn finish(&mut self) -> Result<()> {
        Replica::finish(self)
    }
}

/// Rank 0's engine: requests in, tokens out.
pub struct Engine<'a> {
    scheduler: Scheduler,
    replica: &'a mut dyn Step,
    group: &'a Group,
}

impl<'a> Engine<'a> {
    /// Joins the parts on rank 0.
    pub fn new(scheduler: Scheduler, replica: &'a mut dyn Step, group: &'a Group) -> Self {
        Engine {
            scheduler,
            replica,
            group,
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

    /// One step: schedule → forward → sample → emit.
    ///
    /// # Errors
    /// A failure of the forward pass, here or on another rank.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let plan = self.scheduler.next_step();
        tracing::debug!(
            "step: {} sequences, {} tokens",
            plan.entries.len(),
            plan.entries.iter().map(|e| e.n_tokens).sum::<u32>()
        );
        self.tell(&Command::Step(plan.clone()))?;
        let sampled = self.replica.step(&plan)?;
        Ok(self.scheduler.record(&sampled))
    }

    /// Tells the other ranks that there is no more work, and comes to an end with them.
    ///
    /// # Errors
    /// A rank that is gone already.
    pub fn finish(self) -> Result<()> {
        self.tell(&Command::Finish)?;
        self.replica.finish()
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
    loop {
        let bytes = group.receive()?;
        let command = postcard::from_bytes(&bytes)
            .map_err(|e| Error::failed(format!("message from rank 0: {e}")))?;
        match command {
            Command::Step(plan) => drop(replica.step(&plan)?),
            Command::Finish => return replica.finish(),
        }
    }
}
