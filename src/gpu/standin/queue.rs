//! Streams, events and graphs of the stand-in: work waits in queues and runs in any order that the promises allow.
//!
//! A real device starts work soon and in whatever order its streams leave open. Here nothing runs until somebody has to
//! wait, or until chance says so; then operations of all streams are taken in an order drawn from the seed. Code that
//! forgets to wait for something meets that order sooner or later, and with the same seed meets it again.

use super::compiler::Kernel;
use super::memory::Memory;
use crate::gpu::driver::Launch;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Work of the host that stands for a device library's.
pub type HostWork = Arc<dyn Fn(&mut Memory) -> Result<()> + Send + Sync>;

/// One enqueued operation.
#[derive(Clone)]
pub enum Op {
    /// Copies within memory that the device sees.
    Copy { dst: u64, src: u64, bytes: usize },
    /// Sets bytes.
    Fill { dst: u64, value: u8, bytes: usize },
    /// Runs a kernel.
    Launch {
        kernel: Arc<Kernel>,
        launch: Launch,
        args: Vec<u64>,
    },
    /// Completes an event's `version`-th recording.
    Record { event: u64, version: u64 },
    /// Is ready once that recording is complete.
    Wait { event: u64, version: u64 },
    /// Is ready once the value in memory is at least this.
    WaitValue { ptr: u64, value: u32 },
    /// Writes a value to memory.
    WriteValue { ptr: u64, value: u32 },
    /// Runs a closure.
    Host { what: &'static str, work: HostWork },
    /// Runs a graph; the flags say which nodes are done.
    Graph {
        nodes: Arc<Vec<Node>>,
        done: Vec<bool>,
    },
}

/// A recorded operation and the nodes that it comes after.
pub struct Node {
    op: Op,
    after: Vec<usize>,
}

#[derive(Default)]
struct EventState {
    /// How often it was recorded.
    recorded: u64,
    /// The latest recording that is complete.
    completed: u64,
    at: Option<Instant>,
}

struct Capture {
    origin: u64,
    nodes: Vec<Node>,
    /// The nodes that the next operation of a joined stream comes after.
    last: HashMap<u64, Vec<usize>>,
    events: HashMap<u64, Vec<usize>>,
}

/// What runs an operation that is not about order.
pub trait Execute {
    /// Runs it, now.
    fn execute(&mut self, op: &Op) -> Result<()>;
    /// The value of a word that streams wait for.
    fn value_at(&self, ptr: u64) -> Result<u32>;
}

/// All the queues of a device.
pub struct Queues {
    streams: BTreeMap<u64, VecDeque<Op>>,
    events: BTreeMap<u64, EventState>,
    graphs: BTreeMap<u64, Arc<Vec<Node>>>,
    capture: Option<Capture>,
    next_id: u64,
    random: u64,
    /// Longest wait for a value that another device should write.
    patience: Duration,
}

impl Queues {
    /// Empty queues; `seed` draws the order of operations.
    pub fn new(seed: u64, patience: Duration) -> Queues {
        let (streams, events, graphs) = Default::default();
        Queues {
            streams,
            events,
            graphs,
            capture: None,
            next_id: 1,
            random: seed,
            patience,
        }
    }

    /// The next random number (SplitMix64; Steele et al., OOPSLA 2014).
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.random;
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A new stream.
    pub fn create_stream(&mut self) -> u64 {
        let id = self.id();
        self.streams.insert(id, VecDeque::new());
        id
    }

    /// A new event.
    pub fn create_event(&mut self) -> u64 {
        let id = self.id();
        self.events.insert(id, EventState::default());
        id
    }

    /// Forgets a stream.
    pub fn destroy_stream(&mut self, stream: u64) -> Result<()> {
        self.streams
            .remove(&stream)
            .map(drop)
            .ok_or_else(|| no("stream", stream))
    }

    /// Forgets an event.
    pub fn destroy_event(&mut self, event: u64) -> Result<()> {
        self.events
            .remove(&event)
            .map(drop)
            .ok_or_else(|| no("event", event))
    }

    /// Forgets a graph.
    pub fn destroy_graph(&mut self, graph: u64) -> Result<()> {
        self.graphs
            .remove(&graph)
            .map(drop)
            .ok_or_else(|| no("graph", graph))
    }

    /// Appends an operation to a stream, or to the recording that the stream has joined.
    pub fn enqueue(&mut self, stream: u64, op: Op) -> Result<()> {
        if let Some(capture) = &mut self.capture
            && let Some(last) = capture.last.get_mut(&stream)
        {
            let after = std::mem::replace(last, vec![capture.nodes.len()]);
            capture.nodes.push(Node { op, after });
            return Ok(());
        }
        self.streams
            .get_mut(&stream)
            .ok_or_else(|| no("stream", stream))?
            .push_back(op);
        Ok(())
    }

    /// Records an event.
    pub fn record(&mut self, event: u64, stream: u64) -> Result<()> {
        let state = self
            .events
            .get_mut(&event)
            .ok_or_else(|| no("event", event))?;
        if let Some(capture) = &mut self.capture
            && let Some(last) = capture.last.get(&stream)
        {
            capture.events.insert(event, last.clone());
            return Ok(());
        }
        state.recorded += 1;
        let version = state.recorded;
        self.enqueue(stream, Op::Record { event, version })
    }

    /// Makes a stream wait for an event.
    pub fn wait(&mut self, stream: u64, event: u64) -> Result<()> {
        let version = self
            .events
            .get(&event)
            .ok_or_else(|| no("event", event))?
            .recorded;
        if let Some(capture) = &mut self.capture
            && let Some(nodes) = capture.events.get(&event)
        {
            // A stream that waits for recorded work joins the recording.
            let last = capture.last.entry(stream).or_default();
            last.extend(
                nodes
                    .iter()
                    .filter(|n| !last.contains(n))
                    .copied()
                    .collect::<Vec<_>>(),
            );
            return Ok(());
        }
        if self
            .capture
            .as_ref()
            .is_some_and(|c| c.last.contains_key(&stream))
        {
            return Err(Error::failed(
                "a recorded stream waits for work outside of the recording",
            ));
        }
        self.enqueue(stream, Op::Wait { event, version })
    }

    /// Starts recording.
    pub fn begin_capture(&mut self, stream: u64) -> Result<()> {
        if !self.streams.contains_key(&stream) {
            return Err(no("stream", stream));
        }
        if self.capture.is_some() {
            return Err(Error::failed("a capture is under way already"));
        }
        let last = HashMap::from([(stream, Vec::new())]);
        self.capture = Some(Capture {
            origin: stream,
            nodes: Vec::new(),
            last,
            events: HashMap::new(),
        });
        Ok(())
    }

    /// Ends a recording.
    pub fn end_capture(&mut self, stream: u64) -> Result<u64> {
        let capture = self
            .capture
            .take()
            .ok_or_else(|| Error::failed("no capture is under way"))?;
        if capture.origin != stream {
            return Err(Error::failed("the capture began on another stream"));
        }
        // Whatever a joined stream did last has to come before what the first one did last.
        let mut before = capture.last.get(&stream).cloned().unwrap_or_default();
        let mut joined = vec![false; capture.nodes.len()];
        while let Some(n) = before.pop() {
            if !std::mem::replace(&mut joined[n], true) {
                before.extend(&capture.nodes[n].after);
            }
        }
        if joined.contains(&false) {
            return Err(Error::failed(
                "a stream that joined the capture was not waited for before its end",
            ));
        }
        let id = self.id();
        self.graphs.insert(id, Arc::new(capture.nodes));
        Ok(id)
    }

    /// Whether a recording is under way: the host must not wait meanwhile.
    pub fn capturing(&self) -> bool {
        self.capture.is_some()
    }

    /// Enqueues a graph.
    pub fn launch_graph(&mut self, graph: u64, stream: u64) -> Result<()> {
        let nodes = self
            .graphs
            .get(&graph)
            .ok_or_else(|| no("graph", graph))?
            .clone();
        let done = vec![false; nodes.len()];
        self.enqueue(stream, Op::Graph { nodes, done })
    }

    /// Drops all work and all graphs: none of it will run.
    pub fn clear(&mut self) {
        self.streams.values_mut().for_each(VecDeque::clear);
        self.graphs.clear();
        self.capture = None;
    }

    /// How many graphs there are.
    pub fn graphs(&self) -> usize {
        self.graphs.len()
    }

    /// Milliseconds between two completed events.
    pub fn elapsed_ms(&self, from: u64, to: u64) -> Result<f32> {
        let at = |event| {
            let state = self.events.get(&event).ok_or_else(|| no("event", event))?;
            let complete = state.completed == state.recorded;
            state
                .at
                .filter(|_| complete)
                .ok_or_else(|| Error::failed("the event is not complete"))
        };
        Ok(at(to)?.saturating_duration_since(at(from)?).as_secs_f32() * 1e3)
    }

    /// Runs whatever chance picks until `stream` is empty (`None`: all streams).
    pub fn run_stream(&mut self, stream: Option<u64>, on: &mut dyn Execute) -> Result<()> {
        if let Some(s) = stream.filter(|s| !self.streams.contains_key(s)) {
            return Err(no("stream", s));
        }
        self.run_until(on, |q| match stream {
            Some(s) => q.streams.get(&s).is_none_or(VecDeque::is_empty),
            None => q.streams.values().all(VecDeque::is_empty),
        })
    }

    /// Runs whatever chance picks until the event's last recording is complete.
    pub fn run_event(&mut self, event: u64, on: &mut dyn Execute) -> Result<()> {
        let version = self
            .events
            .get(&event)
            .ok_or_else(|| no("event", event))?
            .recorded;
        self.run_until(on, |q| {
            q.events.get(&event).is_none_or(|e| e.completed >= version)
        })
    }

    /// Whether the event's last recording is complete.
    pub fn is_complete(&self, event: u64) -> Result<bool> {
        self.events
            .get(&event)
            .map(|e| e.completed >= e.recorded)
            .ok_or_else(|| no("event", event))
    }

    fn run_until(&mut self, on: &mut dyn Execute, reached: impl Fn(&Queues) -> bool) -> Result<()> {
        let mut idle_since = None;
        while !reached(self) {
            if self.run_one(on)? {
                idle_since = None;
                continue;
            }
            // Only values that another device writes can be missing now.
            if idle_since.get_or_insert_with(Instant::now).elapsed() > self.patience {
                return Err(Error::failed(format_args!(
                    "timeout: a stream waited over {:.0?} for a value that nobody wrote",
                    self.patience
                )));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Whether nothing is left on a stream.
    pub fn is_empty(&self, stream: u64) -> Result<bool> {
        self.streams
            .get(&stream)
            .map(VecDeque::is_empty)
            .ok_or_else(|| no("stream", stream))
    }

    /// Runs one operation that is ready, drawn at random; false when none is.
    pub fn run_one(&mut self, on: &mut dyn Execute) -> Result<bool> {
        let mut ready = Vec::new();
        for (&stream, queue) in &self.streams {
            match queue.front() {
                Some(Op::Graph { nodes, done }) => {
                    let free = |n: &usize| !done[*n] && nodes[*n].after.iter().all(|&a| done[a]);
                    for n in (0..nodes.len()).filter(free) {
                        if self.is_ready(&nodes[n].op, on)? {
                            ready.push((stream, Some(n)));
                        }
                    }
                    if nodes.is_empty() {
                        ready.push((stream, None));
                    }
                }
                Some(op) if self.is_ready(op, on)? => ready.push((stream, None)),
                _ => {}
            }
        }
        if ready.is_empty() {
            return Ok(false);
        }
        let (stream, node) = ready[(self.random() % ready.len() as u64) as usize];
        self.run_front(stream, node, on)?;
        Ok(true)
    }

    fn is_ready(&self, op: &Op, on: &dyn Execute) -> Result<bool> {
        Ok(match op {
            Op::Wait { event, version } => self
                .events
                .get(event)
                .is_none_or(|e| e.completed >= *version),
            // Cyclic, as the driver compares: the distance, read as signed, is not negative.
            Op::WaitValue { ptr, value } => on.value_at(*ptr)?.wrapping_sub(*value) as i32 >= 0,
            _ => true,
        })
    }

    fn run_front(&mut self, stream: u64, node: Option<usize>, on: &mut dyn Execute) -> Result<()> {
        let Some(queue) = self.streams.get_mut(&stream) else {
            return Ok(());
        };
        let op = match (queue.front_mut(), node) {
            (Some(Op::Graph { nodes, done }), Some(n)) => {
                let op = nodes[n].op.clone();
                done[n] = true;
                if done.iter().all(|&d| d) {
                    queue.pop_front();
                }
                op
            }
            _ => match queue.pop_front() {
                Some(op) => op,
                None => return Ok(()),
            },
        };
        match op {
            Op::Record { event, version } => {
                if let Some(state) = self.events.get_mut(&event) {
                    state.completed = version;
                    state.at = Some(Instant::now());
                }
                Ok(())
            }
            Op::Wait { .. } | Op::WaitValue { .. } | Op::Graph { .. } => Ok(()),
            op => on.execute(&op),
        }
    }
}

fn no(what: &str, id: u64) -> Error {
    Error::failed(format_args!("invalid handle: there is no {what} {id}"))
}
