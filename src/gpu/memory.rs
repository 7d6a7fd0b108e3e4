//! Owned device and pinned memory: returned when dropped, every range checked.

use super::driver::{DevicePtr, Driver, Event, Pinned, Stream};
use crate::weights::{Arena, Slab};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Device memory that is returned when dropped.
///
/// Whoever drops it has synchronized the streams that use it, as [`super::GpuBackend`] does when it is dropped.
pub struct DeviceBuffer {
    driver: Arc<dyn Driver>,
    ptr: DevicePtr,
    bytes: usize,
}

impl DeviceBuffer {
    /// Allocates `bytes`; `what` it is for goes into the error message.
    ///
    /// # Errors
    /// The device has not that much left.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize, what: &str) -> Result<Self> {
        let ptr = driver
            .alloc(bytes.max(1))
            .map_err(|e| Error::failed(format_args!("{what}: {e}")))?;
        Ok(DeviceBuffer {
            driver: driver.clone(),
            ptr,
            bytes,
        })
    }

    /// Where it begins.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a range of it.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn range(&self, range: Range<usize>) -> Result<DevicePtr> {
        check(&range, self.bytes, "device memory")?;
        Ok(self.ptr.offset(range.start))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: `ptr` is this buffer's own, and its users have been synchronized (see the type).
        let freed = unsafe { self.driver.free(self.ptr) };
        if let Err(e) = freed {
            tracing::debug!("{e}");
        }
    }
}

/// Page-locked host memory that is returned when dropped; as for [`DeviceBuffer`], its users have been synchronized.
pub struct PinnedBuffer {
    driver: Arc<dyn Driver>,
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone; sharing follows the borrow of the value.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Allocates `bytes`; `what` it is for goes into the error message.
    ///
    /// # Errors
    /// The host has not that much left, or not that much may be locked.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize, kind: Pinned, what: &str) -> Result<Self> {
        let failed = |e| Error::failed(format_args!("{what}: {e}"));
        let ptr = driver.alloc_pinned(bytes.max(1), kind).map_err(failed)?;
        // SAFETY: just allocated, `bytes` long.
        unsafe { ptr.write_bytes(0, bytes) };
        Ok(PinnedBuffer {
            driver: driver.clone(),
            ptr,
            bytes,
        })
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it begins, for whoever shares it with running work.
    pub fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The contents; pending copies into it have been waited for.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this length, zeroed, and owned.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// The contents; pending copies out of it have been waited for.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }

    /// Enqueues a copy of `range` to the beginning of `dst`'s range of the same length.
    ///
    /// # Errors
    /// A range that is not inside, or a failed copy.
    pub fn upload(
        &self,
        range: Range<usize>,
        dst: &DeviceBuffer,
        at: usize,
        stream: Stream,
    ) -> Result<()> {
        let to = dst.range(at..at.saturating_add(range.len()))?;
        self.upload_to(range, to, stream)
    }

    /// Enqueues a copy of `range` to device memory at `to`, where that much was checked to be.
    ///
    /// # Errors
    /// A range that is not inside, or a failed copy.
    pub fn upload_to(&self, range: Range<usize>, to: DevicePtr, stream: Stream) -> Result<()> {
        check(&range, self.bytes, "pinned memory")?;
        // SAFETY: both ranges were checked; both buffers outlive the work on them (see the types).
        unsafe {
            self.driver
                .upload(to, self.ptr.add(range.start), range.len(), stream)
        }
    }

    /// Enqueues a copy of `src` from `at` on into `range`.
    ///
    /// # Errors
    /// A range that is not inside, or a failed copy.
    pub fn download(
        &mut self,
        range: Range<usize>,
        src: &DeviceBuffer,
        at: usize,
        stream: Stream,
    ) -> Result<()> {
        check(&range, self.bytes, "pinned memory")?;
        let bytes = range.len();
        let from = src.range(at..at.saturating_add(bytes))?;
        // SAFETY: as in `upload`.
        unsafe {
            self.driver
                .download(self.ptr.add(range.start), from, bytes, stream)
        }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: `ptr` is this buffer's own, and its users have been synchronized (see the type).
        let freed = unsafe { self.driver.free_pinned(self.ptr) };
        if let Err(e) = freed {
            tracing::debug!("{e}");
        }
    }
}

/// Host memory of exactly the size that was asked for, locked once it has been filled, so that the device can read it too.
pub struct LockedMemory {
    slab: Slab,
    driver: Option<Arc<dyn Driver>>,
}

impl LockedMemory {
    /// Maps `bytes`, which become resident as they are written.
    ///
    /// # Errors
    /// The host has not that much.
    pub fn map(bytes: usize) -> Result<LockedMemory> {
        let slab = Arena::new(bytes)?.take(bytes)?;
        Ok(LockedMemory { slab, driver: None })
    }

    /// Makes its pages resident with `threads` threads; locking alone would do so with one.
    pub fn touch(&mut self, threads: usize) {
        const PAGE: usize = 4096;
        let bytes = self.slab.len().div_ceil(threads.max(1)).max(PAGE);
        std::thread::scope(|scope| {
            for part in self.slab.chunks_mut(bytes) {
                let touch = || part.iter_mut().step_by(PAGE).for_each(|byte| *byte = 0);
                // Where the system refuses a thread, locking does its part.
                let _ = std::thread::Builder::new().spawn_scoped(scope, touch);
            }
        });
    }

    /// Locks it for a device.
    ///
    /// # Errors
    /// The system refuses to lock that much.
    pub fn lock(&mut self, driver: &Arc<dyn Driver>, what: &str) -> Result<()> {
        let bytes = self.slab.len();
        if bytes > 0 && self.driver.is_none() {
            // SAFETY: the slab stays mapped until `drop` has ended the lock.
            let locked = unsafe { driver.pin(self.slab.as_mut_ptr(), bytes) };
            locked.map_err(|e| {
                Error::failed(format_args!(
                    "host memory for {what}: {e}: check ulimit -l and the job's memory limit"
                ))
            })?;
            self.driver = Some(driver.clone());
        }
        Ok(())
    }

    /// Cuts it into pieces of `bytes` each, for as many owners; what is left over belongs to nobody.
    pub fn split(mut self, bytes: usize) -> Vec<LockedPiece> {
        let start = self.slab.as_mut_ptr();
        let n = self.slab.len().checked_div(bytes).unwrap_or(0);
        let whole = Arc::new(self);
        let piece = |i: usize| LockedPiece {
            // SAFETY: `n` pieces of `bytes` are inside the slab.
            ptr: unsafe { start.add(i * bytes) },
            bytes,
            _whole: whole.clone(),
        };
        (0..n).map(piece).collect()
    }

    /// The contents.
    pub fn as_slice(&self) -> &[u8] {
        &self.slab
    }

    /// The contents; nothing on the device uses them yet.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.slab
    }

    /// Where the byte at `offset` is for the device.
    pub fn device(&self, offset: usize) -> DevicePtr {
        DevicePtr(self.slab.as_ptr() as u64 + offset as u64)
    }

    /// Enqueues a copy of `range` to device memory at `to`, where that much was checked to be.
    ///
    /// # Errors
    /// A range that is not inside, or a failed copy.
    pub fn upload(
        &self,
        driver: &Arc<dyn Driver>,
        range: Range<usize>,
        to: DevicePtr,
        stream: Stream,
    ) -> Result<()> {
        check(&range, self.slab.len(), "locked memory")?;
        // SAFETY: both ranges were checked; nobody writes the locked memory any more.
        unsafe { driver.upload(to, self.slab[range.start..].as_ptr(), range.len(), stream) }
    }
}

/// A part of locked memory that has one owner.
pub struct LockedPiece {
    ptr: *mut u8,
    bytes: usize,
    /// Keeps it mapped and locked; nobody uses it otherwise.
    _whole: Arc<LockedMemory>,
}

// SAFETY: pieces do not overlap, and `LockedMemory::split` has left nobody else a way to the bytes.
unsafe impl Send for LockedPiece {}

impl LockedPiece {
    /// The contents; no copy from here is under way.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: this piece's own bytes, mapped as long as it lives.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }

    /// Enqueues a copy of the first `bytes` into `dst` from `at` on.
    ///
    /// # Errors
    /// A range that is not inside, or a failed copy.
    pub fn upload(
        &self,
        bytes: usize,
        dst: &DeviceBuffer,
        at: usize,
        stream: Stream,
    ) -> Result<()> {
        check(&(0..bytes), self.bytes, "locked memory")?;
        let to = dst.range(at..at.saturating_add(bytes))?;
        // SAFETY: both ranges were checked; the owner leaves the bytes alone until the copy is done.
        unsafe { dst.driver.upload(to, self.ptr, bytes, stream) }
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            // SAFETY: locked once; whoever drops it has synchronized its users, as for `DeviceBuffer`.
            if let Err(e) = unsafe { driver.unpin(self.slab.as_mut_ptr()) } {
                tracing::debug!("{e}");
            }
        }
    }
}

/// An event that is destroyed when dropped.
pub struct OwnedEvent {
    driver: Arc<dyn Driver>,
    event: Event,
}

impl OwnedEvent {
    /// A new event, already complete.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(driver: &Arc<dyn Driver>, timing: bool) -> Result<Self> {
        Ok(OwnedEvent {
            driver: driver.clone(),
            event: driver.create_event(timing)?,
        })
    }

    /// Completes when the work now on `stream` has.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn record(&self, stream: Stream) -> Result<()> {
        self.driver.record(self.event, stream)
    }

    /// Later work on `stream` waits for it.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn wait(&self, stream: Stream) -> Result<()> {
        self.driver.wait(stream, self.event)
    }

    /// Whether it is complete; does not wait.
    ///
    /// # Errors
    /// Those of the driver, or of the work before it.
    pub fn is_complete(&self) -> Result<bool> {
        self.driver.is_complete(self.event)
    }

    /// The calling thread waits for it.
    ///
    /// # Errors
    /// Those of the driver, or of the work waited for.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize_event(self.event)
    }

    /// Milliseconds from `earlier` to this one, both complete and made for timing.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn ms_since(&self, earlier: &OwnedEvent) -> Result<f32> {
        self.driver.elapsed_ms(earlier.event, self.event)
    }
}

impl Drop for OwnedEvent {
    fn drop(&mut self) {
        if let Err(e) = self.driver.destroy_event(self.event) {
            tracing::debug!("{e}");
        }
    }
}

fn check(range: &Range<usize>, bytes: usize, what: &str) -> Result<()> {
    if range.start <= range.end && range.end <= bytes {
        return Ok(());
    }
    let (start, end) = (range.start, range.end);
    Err(Error::failed(format_args!(
        "internal error: bytes {start}..{end} of {bytes} bytes of {what}"
    )))
}
