//! Collectives over device memory, enqueued on a stream like everything else.

use super::driver::{DevicePtr, Stream};
use super::ways::Way;
use crate::Result;

/// A sum over ranks and what always follows it: `x += Σ partial`, `h = RMSNorm(x) · weight`.
#[derive(Debug, Clone, Copy)]
pub struct FusedNorm {
    /// bf16 `[rows, hidden]`
    pub partial: DevicePtr,
    /// f32 `[rows, hidden]`
    pub x: DevicePtr,
    /// bf16 `[hidden]`
    pub weight: DevicePtr,
    /// bf16 `[rows, hidden]`
    pub h: DevicePtr,
    /// Tokens of the step.
    pub rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// The collectives of a forward pass; every rank enqueues the same ones in the same order.
pub trait DeviceCollective: Send {
    /// The way the data takes, in a word or two.
    fn name(&self) -> &'static str;

    /// `x = Σ over ranks of x`, in place, `n` elements of bf16.
    ///
    /// # Safety
    /// `x` is valid until the stream is synchronized.
    ///
    /// # Errors
    /// A lost rank, or those of the library.
    unsafe fn all_reduce(&mut self, x: DevicePtr, n: usize, stream: Stream) -> Result<()>;

    /// `out` is every rank's `local` in rank order, f32; `counts[r]` elements from rank `r`.
    ///
    /// # Safety
    /// Both buffers are valid until the stream is synchronized.
    ///
    /// # Errors
    /// A lost rank, or those of the library.
    unsafe fn all_gather(
        &mut self,
        local: DevicePtr,
        counts: &[usize],
        out: DevicePtr,
        stream: Stream,
    ) -> Result<()>;

    /// The sum, the residual add and the norm in one; false where that is not this collective's, and nothing was done.
    ///
    /// # Safety
    /// The four buffers are valid until the stream is synchronized.
    ///
    /// # Errors
    /// Those of the driver.
    unsafe fn all_reduce_add_norm(&mut self, _: &FusedNorm, _: Stream) -> Result<bool> {
        Ok(false)
    }

    /// Whether sums of `rows` rows are better fused, where they can be.
    fn is_fused(&self, _rows: usize) -> bool {
        true
    }

    /// Measures which sums are better fused, on every rank at the same time and while nothing else runs.
    ///
    /// # Errors
    /// A lost rank, too little memory, or those of the driver and the library.
    fn measure(&mut self, _: Stream) -> Result<()> {
        Ok(())
    }

    /// What [`DeviceCollective::measure`] has found; the same on every rank.
    fn ways(&self) -> &[Way] {
        &[]
    }

    /// Returns when all ranks are here: before the first sums, which wait for a late rank for a few seconds only.
    ///
    /// # Errors
    /// A lost rank.
    fn meet(&mut self) -> Result<()> {
        Ok(())
    }

    /// Whether all ranks are still there, as far as is known: asked while waiting for work that may need them.
    ///
    /// # Errors
    /// A lost rank.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    /// The orderly end, on every rank alike: all work is done, no recorded work is left, and nothing is exchanged
    /// afterwards. Memory that other ranks map is returned when all of them have ended their mappings.
    ///
    /// # Errors
    /// A lost rank, or those of the library.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    /// Gives up whatever still waits for another rank; nothing is exchanged afterwards.
    fn abandon(&mut self) {}
}

/// One rank alone.
pub struct Solo(pub std::sync::Arc<dyn super::Driver>);

impl DeviceCollective for Solo {
    fn name(&self) -> &'static str {
        "one rank"
    }

    unsafe fn all_reduce(&mut self, _: DevicePtr, _: usize, _: Stream) -> Result<()> {
        Ok(())
    }

    unsafe fn all_gather(
        &mut self,
        local: DevicePtr,
        counts: &[usize],
        out: DevicePtr,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe {
            self.0
                .copy(out, local, counts.iter().sum::<usize>() * 4, stream)
        }
    }
}

/// A host collective with several users, who take turns.
#[cfg(test)]
#[derive(Clone)]
pub struct Shared(std::sync::Arc<std::sync::Mutex<Box<dyn crate::comm::HostCollective>>>);

#[cfg(test)]
impl Shared {
    /// Shares `comm`.
    pub fn new(comm: Box<dyn crate::comm::HostCollective>) -> Shared {
        Shared(std::sync::Arc::new(std::sync::Mutex::new(comm)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Box<dyn crate::comm::HostCollective>> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
impl crate::comm::HostCollective for Shared {
    fn rank(&self) -> usize {
        self.lock().rank()
    }
    fn size(&self) -> usize {
        self.lock().size()
    }
    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        self.lock().all_reduce(x)
    }
    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()> {
        self.lock().all_gather(local, counts, out)
    }
}

/// The stand-in's: the ranks' host collective, run in the order of the stream.
#[cfg(test)]
pub struct HostRanks {
    device: std::sync::Arc<super::standin::Standin>,
    comm: Shared,
}

#[cfg(test)]
impl HostRanks {
    /// The collectives of `device` through `comm`.
    pub fn new(device: std::sync::Arc<super::standin::Standin>, comm: Shared) -> HostRanks {
        HostRanks { device, comm }
    }
}

#[cfg(test)]
impl DeviceCollective for HostRanks {
    fn name(&self) -> &'static str {
        "host memory"
    }

    unsafe fn all_reduce(&mut self, x: DevicePtr, n: usize, stream: Stream) -> Result<()> {
        use half::bf16;
        let comm = self.comm.clone();
        let work = move |memory: &mut super::standin::Memory| {
            let read = memory.read::<bf16>(x.0, n)?;
            let mut values: Vec<f32> = read.into_iter().map(bf16::to_f32).collect();
            comm.lock().all_reduce(&mut values)?;
            let sums: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            memory.write(x.0, &sums)
        };
        self.device
            .enqueue_host("all-reduce", std::sync::Arc::new(work), stream)
    }

    unsafe fn all_gather(
        &mut self,
        local: DevicePtr,
        counts: &[usize],
        out: DevicePtr,
        stream: Stream,
    ) -> Result<()> {
        let (comm, counts) = (self.comm.clone(), counts.to_vec());
        let work = move |memory: &mut super::standin::Memory| {
            let mut comm = comm.lock();
            let mine = memory.read::<f32>(local.0, counts[comm.rank()])?;
            let mut all = vec![0.0; counts.iter().sum()];
            comm.all_gather(&mine, &counts, &mut all)?;
            memory.write(out.0, &all)
        };
        self.device
            .enqueue_host("all-gather", std::sync::Arc::new(work), stream)
    }

    fn finish(&mut self) -> Result<()> {
        // NCCL would wait for their end.
        match self.device.graphs() {
            0 => Ok(()),
            n => Err(crate::Error::failed(format_args!(
                "{n} graphs still hold the collective's work"
            ))),
        }
    }
}
