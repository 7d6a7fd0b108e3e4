//! Decode steps as CUDA graphs: recorded once for each number of sequences (few, because steps are filled up), then
//! launched as one piece of work.
//!
//! A launch from the host costs several microseconds and a decode step has hundreds; a graph's kernels follow each other
//! within one. The first step of a number of sequences runs as it is, so that libraries can set up what they need, the next
//! of each kind is recorded, and from then on the forward pass only describes the step: its operations are in the graph already.

use super::driver::{Driver, Graph, Stream};
use super::step::DecodeKey;
use crate::Result;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Beyond this many sequences launches no longer cost more than the work, and each graph takes memory.
pub const MAX_SEQS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Operations run as they are enqueued.
    Direct,
    /// Operations are being recorded.
    Recording(DecodeKey),
    /// A graph holds the step's operations and has been launched.
    Replayed,
}

/// The graphs of one backend.
pub struct Graphs {
    driver: Arc<dyn Driver>,
    stream: Stream,
    /// Numbers of sequences that have run once.
    seen: HashSet<usize>,
    recorded: HashMap<DecodeKey, Graph>,
    mode: Mode,
}

impl Graphs {
    /// No graphs yet.
    pub fn new(driver: &Arc<dyn Driver>, stream: Stream) -> Graphs {
        Graphs {
            driver: driver.clone(),
            stream,
            seen: HashSet::new(),
            recorded: HashMap::new(),
            mode: Mode::Direct,
        }
    }

    /// Begins a step whose description is on its way; `key` where it is a decode step.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn begin(&mut self, key: Option<DecodeKey>) -> Result<()> {
        self.mode = Mode::Direct;
        let Some(key) = key.filter(|k| k.n_seqs() <= MAX_SEQS) else {
            return Ok(());
        };
        if let Some(&graph) = self.recorded.get(&key) {
            // SAFETY: everything recorded lives in buffers that outlive the backend's stream.
            unsafe { self.driver.launch_graph(graph, self.stream) }?;
            self.mode = Mode::Replayed;
        } else if !self.seen.insert(key.n_seqs()) {
            self.driver.begin_capture(self.stream)?;
            self.mode = Mode::Recording(key);
        }
        Ok(())
    }

    /// Whether the step's operations have been launched already and must not be enqueued again.
    pub fn has_launched(&self) -> bool {
        self.mode == Mode::Replayed
    }

    /// Whether the step's operations are being recorded.
    pub fn is_recording(&self) -> bool {
        matches!(self.mode, Mode::Recording(_))
    }

    /// Ends the step's operations: what was recorded is launched for the first time.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn end(&mut self) -> Result<()> {
        if let Mode::Recording(key) = self.mode {
            self.mode = Mode::Direct;
            let graph = self.driver.end_capture(self.stream)?;
            self.recorded.insert(key, graph);
            // SAFETY: as in `begin`.
            unsafe { self.driver.launch_graph(graph, self.stream) }?;
        }
        Ok(())
    }

    /// Forgets every graph. NCCL ends a communicator only when no graph holds its work any more: with graphs left,
    /// its end never comes.
    pub fn clear(&mut self) {
        for (_, graph) in self.recorded.drain() {
            if let Err(e) = self.driver.destroy_graph(graph) {
                tracing::debug!("{e}");
            }
        }
    }

    /// How many graphs have been recorded.
    pub fn recorded(&self) -> usize {
        self.recorded.len()
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        self.clear();
    }
}
