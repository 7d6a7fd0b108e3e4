//! The cores' share of every product: a thread that waits for the GPU's word, multiplies rows where they lie in host memory
//! with all its cores, and leaves the result where the GPU fetches it. `kernels/handover.cu` is the other side.

use super::{HostPart, rows_per_unit};
use crate::cpu::{self, Matrix, Pool};
use crate::gpu::driver::{DevicePtr, Driver, Pinned, Stream};
use crate::gpu::memory::{DeviceBuffer, LockedMemory, PinnedBuffer};
use crate::layout::SHARE_ROWS;
use crate::weights::Dtype;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A host that leaves the GPU waiting for this long is lost.
pub const TIMEOUT_MS: u32 = 30_000;
/// How long the thread looks for the GPU's word without a pause where the cores are its alone, and where others need them;
/// and the pauses after that.
const SPIN: Duration = Duration::from_millis(50);
const SPIN_AMONG_OTHERS: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_micros(50);
/// How long a rate is measured.
const MEASURE: Duration = Duration::from_millis(80);

/// What multiplies.
#[derive(Debug, Clone)]
pub struct Cores {
    /// One thread each.
    pub cpus: Vec<usize>,
    /// Nobody else runs there: threads may be bound and may spin.
    pub exclusive: bool,
}

impl Cores {
    fn spin(&self) -> Duration {
        match self.exclusive {
            true => SPIN,
            false => SPIN_AMONG_OTHERS,
        }
    }
}

/// Words of the mailbox, 64 bytes apart where both sides write.
const REQUEST: usize = 0;
const ANSWER: usize = 64;
const LOST: usize = 128;
const WORDS: usize = 192;

/// Pinned memory that both sides see.
struct Mailbox {
    words: PinnedBuffer,
    x: PinnedBuffer,
    y: PinnedBuffer,
}

impl Mailbox {
    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: an aligned word inside the buffer, which the device may write at any time; only atomics touch it.
        unsafe { &*self.words.ptr().add(offset).cast::<AtomicU32>() }
    }

    fn device(&self, offset: usize) -> DevicePtr {
        DevicePtr(self.words.ptr() as u64 + offset as u64)
    }

    /// The input that was handed over with the current request.
    fn x(&self, n: usize) -> &[f32] {
        &bytemuck::cast_slice(self.x.as_slice())[..n]
    }

    /// The place of the result.
    #[allow(
        clippy::mut_from_ref,
        reason = "the one thread that serves is the only one that asks"
    )]
    fn y(&self, n: usize) -> &mut [f32] {
        assert!(n * 4 <= self.y.bytes());
        // SAFETY: inside the buffer; the device reads it only between this request's answer and the next request.
        unsafe { std::slice::from_raw_parts_mut(self.y.ptr().cast::<f32>(), n) }
    }
}

/// A part as the thread sees it.
struct Job {
    offset: usize,
    pinned: usize,
    k: usize,
    rows_per_unit: usize,
    /// Units in front that are streamed.
    streamed: AtomicUsize,
}

struct Shared {
    mail: Mailbox,
    memory: Arc<LockedMemory>,
    jobs: Vec<Job>,
    /// Threads that take part: where memory is the limit, fewer may do as much and leave the link more.
    active: AtomicUsize,
    stop: AtomicBool,
    measuring: AtomicBool,
    failed: AtomicBool,
    /// Nanoseconds of multiplying for steps, bytes multiplied meanwhile, and nanoseconds from each product's end to the next
    /// one's request.
    busy: AtomicU64,
    bytes: AtomicU64,
    idle: AtomicU64,
}

/// The thread and its mailbox.
pub struct HostShare {
    shared: Arc<Shared>,
    state: DeviceBuffer,
    thread: Option<JoinHandle<()>>,
    tasks: Sender<Sender<f64>>,
}

impl HostShare {
    /// Starts the thread and its pool.
    ///
    /// # Errors
    /// Too little memory, or threads that cannot be started or bound.
    pub fn start(
        driver: &Arc<dyn Driver>,
        parts: &[HostPart],
        memory: Arc<LockedMemory>,
        cores: Cores,
        stream: Stream,
    ) -> Result<HostShare> {
        let most = |of: &dyn Fn(&HostPart) -> usize| parts.iter().map(of).max().unwrap_or(0);
        let pinned =
            |floats: usize, what: &str| PinnedBuffer::new(driver, floats * 4, Pinned::Cached, what);
        let mail = Mailbox {
            words: pinned(WORDS / 4, "hand-over words")?,
            x: pinned(SHARE_ROWS * most(&|p| p.k), "hand-over input")?,
            y: pinned(
                SHARE_ROWS * most(&|p| p.pinned * rows_per_unit(p.gated)),
                "hand-over output",
            )?,
        };
        let state = DeviceBuffer::new(driver, 8, "hand-over state")?;
        // SAFETY: inside the buffer, which outlives the stream's work.
        unsafe { driver.fill(state.ptr(), 0, 8, stream) }?;
        driver.synchronize(stream)?;
        let job = |p: &HostPart| Job {
            offset: p.offset,
            pinned: p.pinned,
            k: p.k,
            rows_per_unit: rows_per_unit(p.gated),
            streamed: AtomicUsize::new(p.pinned),
        };
        let shared = Arc::new(Shared {
            mail,
            memory,
            jobs: parts.iter().map(job).collect(),
            active: AtomicUsize::new(cores.cpus.len()),
            stop: AtomicBool::new(false),
            measuring: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            busy: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            idle: AtomicU64::new(0),
        });
        let (tasks, asked) = channel();
        let (ready, started) = channel();
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("host-share".into())
            .spawn(move || match make_pool(&cores) {
                Ok(pool) => {
                    let _ = ready.send(Ok(()));
                    theirs.serve(&pool, &asked, cores.spin());
                }
                Err(e) => drop(ready.send(Err(e))),
            })
            .map_err(|e| Error::failed(format_args!("cannot start the host's share: {e}")))?;
        started
            .recv()
            .unwrap_or_else(|_| Err(Error::failed("the host's share died")))?;
        Ok(HostShare {
            shared,
            state,
            thread: Some(thread),
            tasks,
        })
    }

    /// Units of each part that are streamed; the rest is multiplied here.
    pub fn set_streamed(&self, streamed: &[usize]) {
        for (job, &n) in self.shared.jobs.iter().zip(streamed) {
            job.streamed.store(n, Ordering::Release);
        }
    }

    /// Units of a part that are streamed.
    pub fn streamed(&self, part: usize) -> usize {
        self.shared.jobs[part].streamed.load(Ordering::Acquire)
    }

    /// How many threads take part in a product, at most.
    pub fn threads(&self) -> usize {
        self.shared.active.load(Ordering::Acquire)
    }

    /// Lets only so many threads take part.
    pub fn set_threads(&self, n: usize) {
        self.shared.active.store(n.max(1), Ordering::Release);
    }

    /// Begins to multiply everything in turn; the rate in GB/s comes when it is known.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn begin_measuring(&self) -> Result<Receiver<f64>> {
        let (reply, rate) = channel();
        self.shared.measuring.store(true, Ordering::Release);
        self.tasks
            .send(reply)
            .map_err(|_| Error::failed("the host's share is gone"))?;
        Ok(rate)
    }

    /// Whether that is still going on.
    pub fn is_measuring(&self) -> bool {
        self.shared.measuring.load(Ordering::Acquire)
    }

    /// Where the input goes, the words of the request, and the counters, for `hand_over`.
    pub fn request(&self) -> [DevicePtr; 3] {
        let mail = &self.shared.mail;
        let x = DevicePtr(mail.x.ptr() as u64);
        [x, mail.device(REQUEST), self.state.ptr()]
    }

    /// Where the result comes from, the answer, the mark of a lost host, and the counters, for `take_back`.
    pub fn answer(&self) -> [DevicePtr; 4] {
        let mail = &self.shared.mail;
        let y = DevicePtr(mail.y.ptr() as u64);
        [y, mail.device(ANSWER), mail.device(LOST), self.state.ptr()]
    }

    /// Whether the thread has kept its promises.
    ///
    /// # Errors
    /// It has not.
    pub fn check(&self) -> Result<()> {
        let lost = self.shared.mail.word(LOST).load(Ordering::Acquire) != 0;
        if lost || self.shared.failed.load(Ordering::Acquire) {
            return Err(Error::failed(format_args!(
                "the CPU cores did not multiply their share within {} s",
                TIMEOUT_MS / 1000
            )));
        }
        Ok(())
    }
}

impl Drop for HostShare {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let of = |n: &AtomicU64| n.load(Ordering::Relaxed) as f64 / 1e9;
        let (busy, bytes, idle) = (
            of(&self.shared.busy),
            of(&self.shared.bytes),
            of(&self.shared.idle),
        );
        tracing::debug!(
            "the cores multiplied {bytes:.1} GB in {busy:.2} s ({:.1} GB/s), and waited {idle:.2} s for the GPU in between",
            bytes / busy.max(1e-9)
        );
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn make_pool(cores: &Cores) -> Result<Pool> {
    if cores.exclusive {
        Pool::eager(&cores.cpus)
    } else {
        Pool::sharing(&cores.cpus)
    }
}

impl Shared {
    /// The thread's life; it pauses when the GPU has been silent for `spin`.
    fn serve(&self, pool: &Pool, tasks: &Receiver<Sender<f64>>, spin: Duration) {
        let mut seen = 0;
        let mut idle_since = Instant::now();
        while !self.stop.load(Ordering::Acquire) {
            for _ in 0..64 {
                let epoch = self.mail.word(REQUEST).load(Ordering::Acquire);
                if epoch != seen {
                    seen = epoch;
                    let idle = idle_since.elapsed();
                    // A longer silence is the user's.
                    if idle < Duration::from_millis(100) {
                        self.idle
                            .fetch_add(idle.as_nanos() as u64, Ordering::Relaxed);
                    }
                    let start = Instant::now();
                    self.answer(pool, epoch);
                    self.busy
                        .fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
                    idle_since = Instant::now();
                }
                std::hint::spin_loop();
            }
            if let Ok(reply) = tasks.try_recv() {
                let rate = self.measure(pool);
                self.measuring.store(false, Ordering::Release);
                let _ = reply.send(rate);
            }
            if idle_since.elapsed() > spin {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Multiplies what was asked for.
    fn answer(&self, pool: &Pool, epoch: u32) {
        let word = |i: usize| self.mail.word(REQUEST + 4 * i).load(Ordering::Acquire) as usize;
        let (index, m) = (word(1), word(2));
        match self.jobs.get(index).filter(|_| m <= SHARE_ROWS) {
            Some(job) => {
                let first = job.streamed.load(Ordering::Acquire);
                let rows = (job.pinned - first) * job.rows_per_unit;
                let (x, y) = (self.mail.x(m * job.k), self.mail.y(m * rows));
                let w = self.rows_of(job, first);
                self.bytes.fetch_add(w.data.len() as u64, Ordering::Relaxed);
                self.multiply(pool, x, m, w, y);
                self.mail.word(ANSWER).store(epoch, Ordering::Release);
            }
            // The GPU asks for what does not exist: it waits in vain, and `check` says so.
            None => self.failed.store(true, Ordering::Release),
        }
    }

    fn multiply(&self, pool: &Pool, x: &[f32], m: usize, w: Matrix<'_>, y: &mut [f32]) {
        cpu::few_rows(pool, self.active.load(Ordering::Acquire), x, m, w, y);
    }

    /// The rows of a job from unit `first` on.
    fn rows_of(&self, job: &Job, first: usize) -> Matrix<'_> {
        let rows = (job.pinned - first) * job.rows_per_unit;
        let row_bytes = job.k * 2;
        let begin = job.offset + first * job.rows_per_unit * row_bytes;
        Matrix {
            data: &self.memory.as_slice()[begin..begin + rows * row_bytes],
            dtype: Dtype::Bf16,
            rows,
            cols: job.k,
        }
    }

    /// How fast all parts are multiplied in turn, in GB/s.
    fn measure(&self, pool: &Pool) -> f64 {
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < MEASURE && !self.jobs.is_empty() {
            for job in &self.jobs {
                let w = self.rows_of(job, 0);
                let (x, y) = (self.mail.x(job.k), self.mail.y(w.rows));
                self.multiply(pool, x, 1, w, y);
                bytes += w.data.len();
                if start.elapsed() > MEASURE {
                    break;
                }
            }
        }
        bytes as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}
