//! Decode steps as CUDA graphs: recorded once for each number of sequences, then launched as one piece of work.
//!
//! A launch from the host costs several microseconds and a decode step has hundreds; a graph's kernels follow each other
//! within one. The first step of a kind runs as it is, so that libraries can set up what they need, the second is
//! recorded, and from then on the forward pass only describes the step: its operations are in the graph already.

use super::driver::{Driver, Graph, Stream};
use super::step::DecodeKey;
use crate::Result;
use std::collections::HashMap;
use std::sync::Arc;

/// Beyond this many sequences launches no longer cost more than the work, and each graph takes memory.
const MAX_SEQS: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Operations run as they are enqueued.
    Direct,
    /// Operations are being recorded.
    Recording(DecodeKey),
    /// A graph holds the step's operations and has been launched.
    Replayed,
}

#[derive(Debug, Clone, Copy)]
enum Known {
    Seen,
    Recorded(Graph),
}

/// The graphs of one backend.
pub struct Graphs {
    driver: Arc<dyn Driver>,
    stream: Stream,
    known: HashMap<DecodeKey, Known>,
    mode: Mode,
}

impl Graphs {
    /// No graphs yet.
    pub fn new(driver: &Arc<dyn Driver>, stream: Stream) -> Graphs {
        Graphs {
            driver: driver.clone(),
            stream,
            known: HashMap::new(),
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
        match self.known.get(&key) {
            None => {
                self.known.insert(key, Known::Seen);
            }
            Some(Known::Seen) => {
                self.driver.begin_capture(self.stream)?;
                self.mode = Mode::Recording(key);
            }
            Some(&Known::Recorded(graph)) => {
                // SAFETY: everything recorded lives in buffers that outlive the backend's stream.
                unsafe { self.driver.launch_graph(graph, self.stream) }?;
                self.mode = Mode::Replayed;
            }
        }
        Ok(())
    }

    /// Whether the step's operations have been launched already and must not be enqueued again.
    pub fn has_launched(&self) -> bool {
        self.mode == Mode::Replayed
    }

    /// Ends the step's operations: what was recorded is launched for the first time.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn end(&mut self) -> Result<()> {
        if let Mode::Recording(key) = self.mode {
            self.mode = Mode::Direct;
            let graph = self.driver.end_capture(self.stream)?;
            self.known.insert(key, Known::Recorded(graph));
            // SAFETY: as in `begin`.
            unsafe { self.driver.launch_graph(graph, self.stream) }?;
        }
        Ok(())
    }

    /// Forgets every graph. NCCL ends a communicator only when no graph holds its work any more: with graphs left,
    /// its end never comes.
    pub fn clear(&mut self) {
        for (_, known) in self.known.drain() {
            if let Known::Recorded(graph) = known
                && let Err(e) = self.driver.destroy_graph(graph)
            {
                tracing::debug!("{e}");
            }
        }
    }

    /// How many graphs have been recorded.
    pub fn recorded(&self) -> usize {
        let recorded = |k: &&Known| matches!(k, Known::Recorded(_));
        self.known.values().filter(recorded).count()
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        self.clear();
    }
}
