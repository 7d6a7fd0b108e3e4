//! The all-reduce of decode-size messages over peer memory, in one kernel with the residual add and the norm that follow.
//!
//! Every rank maps the others' inboxes (CUDA IPC) and its kernel writes straight into them. Whatever it does not serve
//! goes to the collective beneath: longer messages, ranks on several hosts, GPUs that cannot map each other's memory.

use super::collective::{DeviceCollective, FusedNorm};
use super::driver::{DevicePtr, Driver, Function, IpcHandle, Launch, Pinned, Stream, args};
use super::kernels;
use super::memory::{DeviceBuffer, PinnedBuffer};
use super::ways::{self, Trial, Way};
use crate::comm::HostCollective;
use crate::layout::{GATHER_WORDS, MAX_ROWS, SUM_ROWS, gather_at, inbox_bytes};
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Rows up to which sums are fused as long as nothing was measured.
const UNMEASURED_ROWS: usize = 8;

/// Peer inboxes, mapped by every rank.
pub struct OneShot {
    beneath: Box<dyn DeviceCollective>,
    driver: Arc<dyn Driver>,
    all_reduce: Function,
    all_gather: Function,
    rank: usize,
    size: usize,
    hidden: usize,
    timeout_ms: u32,
    /// This rank's inbox, until every rank has ended its mapping of it.
    inbox: Option<DeviceBuffer>,
    imported: Vec<DevicePtr>,
    /// The ranks' way past the device.
    ranks: Box<dyn HostCollective>,
    /// Where every rank's inbox is for this device.
    table: DeviceBuffer,
    epochs: DeviceBuffer,
    /// Which sums are fused, once it was measured.
    ways: Vec<Way>,
    /// The rank + 1 of a peer that did not answer.
    lost: PinnedBuffer,
}

/// What one rank tells the others about its inbox.
struct Offer {
    host: u64,
    handle: Option<IpcHandle>,
}

impl OneShot {
    /// Maps the other ranks' inboxes. Where any rank cannot, all of them stay with `beneath`, and rank 0 says why.
    ///
    /// # Errors
    /// A lost rank or device.
    pub fn over(
        beneath: Box<dyn DeviceCollective>,
        driver: &Arc<dyn Driver>,
        mut ranks: Box<dyn HostCollective>,
        hidden: usize,
        timeout_ms: u32,
        stream: Stream,
    ) -> Result<Box<dyn DeviceCollective>> {
        let (rank, size) = (ranks.rank(), ranks.size());
        let inbox = DeviceBuffer::new(driver, inbox_bytes(size, hidden), "all-reduce inbox")?;
        let table = DeviceBuffer::new(driver, size * 8, "all-reduce table")?;
        let epochs = DeviceBuffer::new(driver, (MAX_ROWS + 1) * 4, "all-reduce epochs")?;
        for buffer in [&inbox, &epochs] {
            // SAFETY: inside the buffer, which outlives the stream's work.
            unsafe { driver.fill(buffer.ptr(), 0, buffer.bytes(), stream) }?;
        }
        driver.synchronize(stream)?;

        let Inboxes {
            pointers,
            imported,
            problem,
        } = Inboxes::of_all(&inbox, driver, &mut *ranks)?;
        // All or none: the ranks have to take the same way.
        let agreed = ranks_agree(&mut *ranks, pointers.len() == size)?;
        if !agreed {
            close(driver, &imported);
            // Nobody may return memory that another still maps.
            ranks_agree(&mut *ranks, true)?;
            if rank == 0 {
                let why = problem.map_or_else(|| "another rank cannot".into(), |e| e.to_string());
                tracing::warn!(
                    "decode sums over ranks by {}, which takes longer: no peer memory ({why})",
                    beneath.name()
                );
            }
            return Ok(beneath);
        }
        let mut staging = PinnedBuffer::new(driver, size * 8, Pinned::Cached, "all-reduce table")?;
        staging
            .as_mut_slice()
            .copy_from_slice(bytemuck::cast_slice(&pointers));
        staging.upload(0..size * 8, &table, 0, stream)?;
        driver.synchronize(stream)?;
        let lost = PinnedBuffer::new(driver, 4, Pinned::Cached, "all-reduce status")?;
        let all_reduce = driver.function(&kernels::ALL_REDUCE, "all_reduce_add_rms_norm")?;
        let all_gather = driver.function(&kernels::ALL_REDUCE, "all_gather_words")?;
        let driver = driver.clone();
        let inbox = Some(inbox);
        Ok(Box::new(OneShot {
            beneath,
            driver,
            all_reduce,
            all_gather,
            rank,
            size,
            hidden,
            timeout_ms,
            inbox,
            imported,
            ranks,
            table,
            epochs,
            ways: Vec::new(),
            lost,
        }))
    }

    /// What the ranks have measured, by the slowest of them: all must choose alike.
    fn slowest(&mut self, mine: &[Way]) -> Result<Vec<Way>> {
        let local: Vec<f32> = mine
            .iter()
            .flat_map(|w| [w.fused_us as f32, w.library_us as f32])
            .collect();
        let mut all = vec![0.0; local.len() * self.size];
        let counts = vec![local.len(); self.size];
        self.ranks.all_gather(&local, &counts, &mut all)?;
        let worst = |at: usize| {
            let of_ranks = all.iter().skip(at).step_by(local.len());
            f64::from(of_ranks.copied().fold(0.0, f32::max))
        };
        let way = |(i, w): (usize, &Way)| Way {
            rows: w.rows,
            fused_us: worst(2 * i),
            library_us: worst(2 * i + 1),
        };
        Ok(mine.iter().enumerate().map(way).collect())
    }

    fn check_lost(&self) -> Result<()> {
        let word = self.lost.as_slice().as_ptr().cast::<AtomicU32>();
        // SAFETY: four aligned bytes of this value's own, which the device may write at any time.
        match unsafe { &*word }.load(Ordering::Acquire) {
            0 => Ok(()),
            peer => Err(Error::failed(format_args!(
                "rank {} did not take part in a sum over ranks within {} s",
                peer - 1,
                self.timeout_ms / 1000
            ))),
        }
    }
}

impl DeviceCollective for OneShot {
    fn name(&self) -> &'static str {
        "peer memory"
    }

    unsafe fn all_reduce(&mut self, x: DevicePtr, n: usize, stream: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.beneath.all_reduce(x, n, stream) }
    }

    unsafe fn all_gather(
        &mut self,
        local: DevicePtr,
        counts: &[usize],
        out: DevicePtr,
        stream: Stream,
    ) -> Result<()> {
        let n = counts.first().copied().unwrap_or(0);
        if n > GATHER_WORDS || counts.iter().any(|&c| c != n) {
            // SAFETY: passed on to the caller.
            return unsafe { self.beneath.all_gather(local, counts, out, stream) };
        }
        let args = args![
            local,
            out,
            self.table.ptr(),
            gather_at(self.size, self.hidden),
            self.epochs.ptr().offset(MAX_ROWS * 4),
            DevicePtr(self.lost.as_slice().as_ptr() as u64),
            self.rank,
            self.size,
            GATHER_WORDS / 2,
            n,
            self.timeout_ms
        ];
        let launch = Launch::linear(1, 128);
        // SAFETY: the parameters of all_reduce.cu; the buffers are the caller's and this value's own.
        unsafe { self.driver.launch(self.all_gather, &launch, &args, stream) }
    }

    unsafe fn all_reduce_add_norm(&mut self, f: &FusedNorm, stream: Stream) -> Result<bool> {
        if f.rows > MAX_ROWS || f.hidden != self.hidden {
            return Ok(false);
        }
        let lost = DevicePtr(self.lost.as_slice().as_ptr() as u64);
        let args = args![
            f.partial,
            f.x,
            f.weight,
            f.h,
            self.table.ptr(),
            self.epochs.ptr(),
            lost,
            self.rank,
            self.size,
            MAX_ROWS,
            f.hidden,
            f.eps,
            self.timeout_ms
        ];
        let launch = Launch::norm(f.rows, f.hidden);
        // SAFETY: the parameters of all_reduce.cu; the buffers are the caller's and this value's own.
        unsafe { self.driver.launch(self.all_reduce, &launch, &args, stream) }?;
        Ok(true)
    }

    fn is_fused(&self, rows: usize) -> bool {
        ways::is_fused(&self.ways, rows).unwrap_or(self.ways.is_empty() && rows <= UNMEASURED_ROWS)
    }

    fn measure(&mut self, stream: Stream) -> Result<()> {
        self.meet()?;
        let trial = Trial::new(&self.driver.clone(), self.hidden, stream)?;
        trial.connect(self)?;
        let start = Instant::now();
        let mut mine = Vec::new();
        for rows in SUM_ROWS {
            mine.extend(trial.measure(self, rows)?);
        }
        drop(trial);
        self.ways = self.slowest(&mine)?;
        if self.rank == 0 {
            tracing::info!(
                "{}; measured in {:.0} ms",
                ways::text(&self.ways, self.beneath.name()),
                1e3 * start.elapsed().as_secs_f64()
            );
        }
        Ok(())
    }

    fn ways(&self) -> &[Way] {
        &self.ways
    }

    fn meet(&mut self) -> Result<()> {
        ranks_agree(&mut *self.ranks, true).map(|_| ())
    }

    fn check(&mut self) -> Result<()> {
        self.check_lost()?;
        self.beneath.check()
    }

    fn finish(&mut self) -> Result<()> {
        close(&self.driver, &std::mem::take(&mut self.imported));
        // CUDA leaves open what becomes of memory that is returned while another process maps it.
        self.meet()?;
        self.inbox = None;
        self.beneath.finish()
    }

    fn abandon(&mut self) {
        self.beneath.abandon();
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        close(&self.driver, &self.imported);
        // The other ranks' mappings are not known to have ended: the inbox goes with the process.
        std::mem::forget(self.inbox.take());
    }
}

fn close(driver: &Arc<dyn Driver>, imported: &[DevicePtr]) {
    for &ptr in imported {
        // SAFETY: imported above; whoever drops a collective has synchronized the device.
        if let Err(e) = unsafe { driver.close_import(ptr) } {
            tracing::debug!("{e}");
        }
    }
}

/// The ranks' inboxes as this rank sees them.
struct Inboxes {
    /// Of every rank, in rank order; fewer where some rank's is out of reach.
    pointers: Vec<u64>,
    /// Those of other ranks, to be closed.
    imported: Vec<DevicePtr>,
    /// Why they are fewer, where this rank knows.
    problem: Option<Error>,
}

impl Inboxes {
    /// Offers `mine` to all and maps theirs.
    ///
    /// # Errors
    /// A lost rank.
    fn of_all(
        mine: &DeviceBuffer,
        driver: &Arc<dyn Driver>,
        ranks: &mut dyn HostCollective,
    ) -> Result<Inboxes> {
        let exported = driver.export(mine.ptr());
        let offers = Offer::exchange(exported.as_ref().ok(), ranks)?;
        let one_host = offers.iter().all(|o| o.host == offers[0].host);
        let problem = match (exported, one_host) {
            (Err(e), _) => Some(e),
            (_, false) => Some(Error::failed("the ranks are on several hosts")),
            _ => None,
        };
        let mut inboxes = Inboxes {
            pointers: Vec::new(),
            imported: Vec::new(),
            problem,
        };
        let everybody = one_host && offers.iter().all(|o| o.handle.is_some());
        for (r, offer) in offers.iter().enumerate().filter(|_| everybody) {
            match &offer.handle {
                _ if r == ranks.rank() => inboxes.pointers.push(mine.ptr().0),
                Some(handle) => match driver.import(handle) {
                    Ok(ptr) => {
                        inboxes.imported.push(ptr);
                        inboxes.pointers.push(ptr.0);
                    }
                    Err(e) => inboxes.problem = Some(e),
                },
                None => {}
            }
        }
        Ok(inboxes)
    }
}

impl Offer {
    /// Every rank's offer, in rank order.
    fn exchange(mine: Option<&IpcHandle>, ranks: &mut dyn HostCollective) -> Result<Vec<Offer>> {
        // The machine's own id: handles mean nothing on another.
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mut bytes = super::cache::fnv1a(&[&boot]).to_le_bytes().to_vec();
        bytes.push(u8::from(mine.is_some()));
        bytes.extend(mine.map_or([0; 64], |h| h.0));
        let all = exchange_bytes(ranks, &bytes)?;
        let offer = |bytes: &[u8]| Offer {
            host: bytes[..8]
                .iter()
                .rev()
                .fold(0, |x, &b| x << 8 | u64::from(b)),
            handle: (bytes[8] == 1).then(|| IpcHandle(std::array::from_fn(|i| bytes[9 + i]))),
        };
        Ok(all.chunks_exact(bytes.len()).map(offer).collect())
    }
}

/// Every rank's bytes, in rank order; each gives equally many.
///
/// # Errors
/// A lost rank.
pub fn exchange_bytes(ranks: &mut dyn HostCollective, mine: &[u8]) -> Result<Vec<u8>> {
    // The ranks' collective speaks f32, which holds a byte exactly.
    let local: Vec<f32> = mine.iter().map(|&b| f32::from(b)).collect();
    let mut all = vec![0.0; mine.len() * ranks.size()];
    ranks.all_gather(&local, &vec![mine.len(); ranks.size()], &mut all)?;
    Ok(all.into_iter().map(|b| b as u8).collect())
}

/// Whether `mine` is true on every rank.
///
/// # Errors
/// A lost rank.
pub fn ranks_agree(ranks: &mut dyn HostCollective, mine: bool) -> Result<bool> {
    Ok(exchange_bytes(ranks, &[u8::from(mine)])?
        .iter()
        .all(|&b| b == 1))
}
