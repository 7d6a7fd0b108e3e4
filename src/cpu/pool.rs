//! Fork-join threads, one a CPU: [`Pool::run`] hands one closure to all and returns when all are done.
//!
//! A decode step forks some two hundred times, so a fork must cost a microsecond, not a wake-up: idle threads spin
//! for a while before they sleep. A pool whose CPUs are shared with other ranks neither spins nor binds.

use super::{Isa, topology};
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread, ThreadId};
use std::time::{Duration, Instant};

/// How long an idle thread spins before it sleeps: longer than the serial parts of a step and an all-reduce.
const SPIN: Duration = Duration::from_micros(200);
/// The same for a pool that works beside a GPU, which may be busy for longer between two jobs.
const LONG_SPIN: Duration = Duration::from_millis(20);

type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// The job slot that all threads watch.
struct Shared {
    /// Counts jobs; a change starts the workers.
    epoch: AtomicU32,
    /// The current closure, valid between the change of `epoch` and `pending` reaching zero.
    task: std::cell::UnsafeCell<Option<Task<'static>>>,
    /// Workers that have not finished the current job.
    pending: AtomicUsize,
    /// Where the caller waits when it does not spin.
    caller: std::sync::Mutex<Option<Thread>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    spin: Duration,
}

// SAFETY: `task` is written only by the one caller (`Pool` is not `Sync`) while no worker runs, and published by the
// release store of `epoch`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference inside is to a `Sync` closure.
unsafe impl Send for Shared {}

struct Worker {
    handle: Option<JoinHandle<()>>,
    asleep: Arc<AtomicBool>,
}

/// Threads that run one closure together; the calling thread is thread 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    isa: Isa,
    /// The caller's own mask, restored on drop, if it was bound.
    unpinned: Option<(ThreadId, Vec<usize>)>,
    // One caller at a time: keeps `Pool` from being `Sync`.
    _single: std::marker::PhantomData<std::cell::Cell<()>>,
}

impl Pool {
    /// One thread on each of `cpus`, bound to it, the calling thread to the first (until the pool is dropped).
    ///
    /// # Errors
    /// `cpus` is empty, names a CPU outside the affinity mask, or a thread cannot be started.
    pub fn new(cpus: &[usize]) -> Result<Pool> {
        Pool::build(cpus, Isa::detect(), Some(SPIN))
    }

    /// The same for jobs that come with pauses in between.
    ///
    /// # Errors
    /// Those of [`Pool::new`].
    pub fn eager(cpus: &[usize]) -> Result<Pool> {
        Pool::build(cpus, Isa::detect(), Some(LONG_SPIN))
    }

    /// As many threads as `cpus`, neither bound nor spinning: for ranks that share their CPUs with others.
    ///
    /// # Errors
    /// `cpus` is empty, or a thread cannot be started.
    pub fn sharing(cpus: &[usize]) -> Result<Pool> {
        Pool::build(cpus, Isa::detect(), None)
    }

    /// The same pool with another instruction set.
    ///
    /// # Errors
    /// This machine lacks it.
    pub fn with_isa(mut self, isa: Isa) -> Result<Pool> {
        if !Isa::available().contains(&isa) {
            return Err(Error::failed(format!("this CPU has no {isa}")));
        }
        self.isa = isa;
        Ok(self)
    }

    /// `spin` is how long idle threads spin where their CPUs are theirs alone; `None` where they are not.
    fn build(cpus: &[usize], isa: Isa, spin: Option<Duration>) -> Result<Pool> {
        let exclusive = spin.is_some();
        let Some(&first) = cpus.first() else {
            return Err(Error::failed("a thread pool needs at least one CPU"));
        };
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            task: std::cell::UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            caller: std::sync::Mutex::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            spin: spin.unwrap_or(Duration::ZERO),
        });
        let mut pool = Pool {
            shared,
            workers: Vec::new(),
            isa,
            unpinned: None,
            _single: std::marker::PhantomData,
        };
        for (tid, &cpu) in cpus.iter().enumerate().skip(1) {
            pool.spawn(tid, cpus.len(), exclusive.then_some(cpu))?;
        }
        if exclusive && cpus.len() > 1 {
            let before = topology::affinity_cpus();
            topology::pin_current_thread(&[first])?;
            pool.unpinned = Some((std::thread::current().id(), before));
        }
        Ok(pool)
    }

    fn spawn(&mut self, tid: usize, n: usize, cpu: Option<usize>) -> Result<()> {
        let (shared, asleep) = (self.shared.clone(), Arc::new(AtomicBool::new(false)));
        let flag = asleep.clone();
        let (ready, pinned) = std::sync::mpsc::channel();
        let handle = std::thread::Builder::new()
            .name(format!("cpu-{tid}"))
            .spawn(move || {
                let pin = cpu.map_or(Ok(()), |cpu| topology::pin_current_thread(&[cpu]));
                let ok = pin.is_ok();
                let _ = ready.send(pin);
                if ok {
                    work(&shared, &flag, tid, n);
                }
            })
            .map_err(|e| Error::failed(format!("cannot start CPU thread {tid} of {n}: {e}")))?;
        self.workers.push(Worker {
            handle: Some(handle),
            asleep,
        });
        pinned
            .recv()
            .unwrap_or_else(|_| Err(Error::failed(format!("CPU thread {tid} of {n} died"))))
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set that kernels run on.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `f(thread, threads)` on every thread and returns when all have.
    ///
    /// # Panics
    /// If `f` panicked on any thread. `f` must not call `run` itself.
    pub fn run(&self, f: impl Fn(usize, usize) + Sync) {
        let n = self.threads();
        if n == 1 {
            return f(0, 1);
        }
        let task: Task<'_> = &f;
        // SAFETY: only the lifetime is erased; `finish` below waits for every worker before `f` goes out of scope,
        // also when `f` panics on this thread.
        let task: Task<'static> = unsafe { std::mem::transmute(task) };
        // SAFETY: no job is running (`pending` is zero), so no worker reads the slot.
        unsafe { *self.shared.task.get() = Some(task) };
        self.shared.pending.store(n - 1, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in &self.workers {
            if worker.asleep.load(Ordering::SeqCst)
                && let Some(handle) = &worker.handle
            {
                handle.thread().unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| f(0, n)));
        self.finish();
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a CPU thread panicked; its message stands above");
        }
    }

    /// Waits until every worker has finished the job.
    fn finish(&self) {
        let done = || self.shared.pending.load(Ordering::Acquire) == 0;
        if spin_until(self.shared.spin, done) {
            return;
        }
        if let Ok(mut caller) = self.shared.caller.lock() {
            *caller = Some(std::thread::current());
        }
        while !done() {
            std::thread::park();
        }
        if let Ok(mut caller) = self.shared.caller.lock() {
            *caller = None;
        }
    }

    /// Runs `f(thread, chunk)` for every chunk of `0..chunks`, each once, on whichever thread is free.
    pub fn for_each_chunk(&self, chunks: usize, f: impl Fn(usize, usize) + Sync) {
        self.for_each_chunk_on(self.threads(), chunks, f);
    }

    /// The same on the first `threads` threads alone.
    pub fn for_each_chunk_on(
        &self,
        threads: usize,
        chunks: usize,
        f: impl Fn(usize, usize) + Sync,
    ) {
        if chunks <= 1 {
            (0..chunks).for_each(|chunk| f(0, chunk));
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(|tid, _| {
            while tid < threads.max(1) {
                let chunk = next.fetch_add(1, Ordering::Relaxed);
                if chunk >= chunks {
                    break;
                }
                f(tid, chunk);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in &mut self.workers {
            if let Some(handle) = worker.handle.take() {
                handle.thread().unpark();
                let _ = handle.join();
            }
        }
        if let Some((thread, mask)) = self.unpinned.take()
            && thread == std::thread::current().id()
        {
            let _ = topology::pin_current_thread(&mask);
        }
    }
}

/// True as soon as `ready` holds, false when `limit` passes first.
fn spin_until(limit: Duration, ready: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if ready() {
                return true;
            }
            if limit.is_zero() {
                return false;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > limit {
            return false;
        }
    }
}

/// A worker's life: wait for the epoch to change, run the job, report.
fn work(shared: &Shared, asleep: &AtomicBool, tid: usize, n: usize) {
    let mut seen = 0;
    loop {
        let changed = || shared.epoch.load(Ordering::SeqCst) != seen;
        if !spin_until(shared.spin, changed) {
            // The caller reads `asleep` after it has changed the epoch, so one of the two sees the other.
            asleep.store(true, Ordering::SeqCst);
            while !changed() {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
        seen = shared.epoch.load(Ordering::SeqCst);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the caller published the task before the epoch and keeps it alive until `pending` is zero.
        if let Some(task) = unsafe { *shared.task.get() }
            && catch_unwind(AssertUnwindSafe(|| task(tid, n))).is_err()
        {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        if shared.pending.fetch_sub(1, Ordering::AcqRel) == 1
            && let Ok(caller) = shared.caller.lock()
            && let Some(caller) = caller.as_ref()
        {
            caller.unpark();
        }
    }
}

/// A raw pointer into a buffer of which each thread writes a part of its own.
pub(super) struct Shards<T>(*mut T, usize);

// SAFETY: handing out disjoint parts is the contract of `Shards::part`.
unsafe impl<T: Send> Sync for Shards<T> {}

impl<T> Shards<T> {
    pub(super) fn new(buffer: &mut [T]) -> Self {
        Shards(buffer.as_mut_ptr(), buffer.len())
    }

    /// The first element, for writes whose bounds the caller has checked against [`Shards::len`].
    pub(super) fn as_ptr(&self) -> *mut T {
        self.0
    }

    pub(super) fn len(&self) -> usize {
        self.1
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// No two threads may hold overlapping parts at the same time.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.1 && len <= self.1 - start);
        // SAFETY: in bounds by the assertion; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// The `i`-th of `n` nearly equal pieces of `0..len`.
pub(super) fn piece(len: usize, i: usize, n: usize) -> std::ops::Range<usize> {
    len * i / n..len * (i + 1) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools() -> Vec<Pool> {
        let cpus = topology::affinity_cpus();
        let many: Vec<usize> = std::iter::repeat_n(cpus[0], 5).collect();
        vec![Pool::new(&cpus).unwrap(), Pool::sharing(&many).unwrap()]
    }

    #[test]
    fn every_thread_runs_every_job_once() {
        for pool in pools() {
            let counts: Vec<AtomicUsize> =
                (0..pool.threads()).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..2000 {
                pool.run(|tid, n| {
                    assert_eq!(n, counts.len());
                    counts[tid].fetch_add(1, Ordering::Relaxed);
                });
                if round % 500 == 0 {
                    std::thread::sleep(Duration::from_millis(1)); // let the workers fall asleep
                }
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2000));
        }
    }

    #[test]
    fn every_chunk_runs_once() {
        for pool in pools() {
            for chunks in [0, 1, 3, 1000] {
                let hits: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each_chunk(chunks, |_, i| {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_on_a_worker_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::sharing(&[0, 0]).unwrap();
        let run = || pool.run(|tid, _| assert_ne!(tid, 1, "meant to fail"));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        pool.run(|_, _| {});
    }

    #[test]
    fn no_cpu_or_a_cpu_that_is_not_there_is_an_error() {
        assert!(Pool::new(&[]).is_err());
        assert!(Pool::new(&[topology::affinity_cpus()[0], 8000]).is_err());
    }

    #[test]
    fn the_callers_mask_comes_back() {
        let before = topology::affinity_cpus();
        drop(Pool::new(&before).unwrap());
        assert_eq!(topology::affinity_cpus(), before);
    }
}
