//! Slots of device memory through which weights pass on their way to use, filled ahead by a stream of their own.
//!
//! A step uses the same weights in the same order every time, so the last copies of a step already fetch the beginning of
//! the next: the link rests only while nothing may be overwritten.

use super::files::Files;
use super::{From, HostPart, Mode, Transfer};
use crate::gpu::driver::{DevicePtr, Driver, Stream};
use crate::gpu::memory::{DeviceBuffer, LockedMemory, OwnedEvent};
use crate::layout::{RING_SLOT_BYTES, RING_SLOTS};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The slots, and where a step is in its list of transfers.
pub struct Ring {
    driver: Arc<dyn Driver>,
    /// Uses what has arrived.
    compute: Stream,
    /// Copies.
    link: Stream,
    slots: Vec<Slot>,
    memory: Option<DeviceBuffer>,
    /// Of [`Mode::Stream`] and [`Mode::Share`].
    transfers: [Vec<Transfer>; 2],
    mode: Mode,
    /// The slots hold the beginning of this mode's step.
    primed: Option<Mode>,
    /// The transfer that is used next.
    next: usize,
    forked: OwnedEvent,
}

struct Slot {
    arrived: OwnedEvent,
    free: OwnedEvent,
    /// What it holds is ordered before all later work on the compute stream.
    settled: bool,
}

impl Ring {
    /// A ring without transfers; it takes device memory when it is given some.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(driver: &Arc<dyn Driver>, compute: Stream) -> Result<Ring> {
        let slot = |_| -> Result<Slot> {
            Ok(Slot {
                arrived: OwnedEvent::new(driver, false)?,
                free: OwnedEvent::new(driver, false)?,
                settled: true,
            })
        };
        Ok(Ring {
            driver: driver.clone(),
            compute,
            link: driver.create_stream()?,
            slots: (0..RING_SLOTS).map(slot).collect::<Result<_>>()?,
            memory: None,
            transfers: [Vec::new(), Vec::new()],
            mode: Mode::Stream,
            primed: None,
            next: 0,
            forked: OwnedEvent::new(driver, false)?,
        })
    }

    /// What the steps of the two modes transfer.
    ///
    /// # Errors
    /// Too little device memory.
    pub fn set_transfers(&mut self, stream: Vec<Transfer>, share: Vec<Transfer>) -> Result<()> {
        let all = || stream.iter().chain(&share);
        if let Some(t) = all().find(|t| t.bytes > RING_SLOT_BYTES) {
            return Err(Error::failed(format_args!(
                "a row of {} bytes does not fit a slot of {RING_SLOT_BYTES}",
                t.bytes / t.units.max(1)
            )));
        }
        if self.memory.is_none() && all().next().is_some() {
            let bytes = RING_SLOTS * RING_SLOT_BYTES;
            self.memory = Some(DeviceBuffer::new(&self.driver, bytes, "streaming ring")?);
        }
        self.transfers = [stream, share];
        self.primed = None;
        Ok(())
    }

    fn list(&self) -> &[Transfer] {
        &self.transfers[self.mode as usize]
    }

    /// Begins a step; where it is launched `whole`, everything that the slots hold must have arrived before.
    ///
    /// # Errors
    /// Those of the driver and of files.
    pub fn begin(
        &mut self,
        mode: Mode,
        whole: bool,
        memory: &LockedMemory,
        mut files: Option<&mut Files>,
        parts: &[HostPart],
    ) -> Result<()> {
        if self.next != 0 {
            return Err(Error::failed(format_args!(
                "internal error: the last step used {} of its {} transfers",
                self.next,
                self.list().len()
            )));
        }
        // Recorded work has used the slots without their events.
        self.forked.record(self.compute)?;
        self.forked.wait(self.link)?;
        self.mode = mode;
        if self.primed != Some(mode) {
            if let Some(files) = &mut files {
                files.restart(self.list(), parts);
            }
            for index in 0..self.list().len().min(RING_SLOTS) {
                self.copy(index, memory, files.as_deref_mut())?;
            }
            self.primed = Some(mode);
        }
        if whole {
            for slot in self.slots.iter_mut().filter(|s| !s.settled) {
                slot.arrived.wait(self.compute)?;
                slot.settled = true;
            }
        }
        Ok(())
    }

    /// The link's stream joins the recording.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn begin_recording(&mut self) -> Result<()> {
        self.forked.record(self.compute)?;
        self.forked.wait(self.link)
    }

    /// The link's stream leaves the recording: the step ends with the slots full for the next.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn end_recording(&mut self) -> Result<()> {
        self.forked.record(self.link)?;
        self.forked.wait(self.compute)?;
        self.slots.iter_mut().for_each(|s| s.settled = true);
        Ok(())
    }

    /// The next transfer, if it is one of `part`: where it is, for everything enqueued from here on.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn arrive(&mut self, part: usize) -> Result<Option<(Transfer, DevicePtr)>> {
        let Some(transfer) = self
            .list()
            .get(self.next)
            .filter(|t| t.part == part)
            .cloned()
        else {
            return Ok(None);
        };
        let at = self.place(self.next % RING_SLOTS)?;
        let slot = &mut self.slots[self.next % RING_SLOTS];
        if !slot.settled {
            slot.arrived.wait(self.compute)?;
            slot.settled = true;
        }
        Ok(Some((transfer, at)))
    }

    /// The transfer that arrived last has been used; its slot is filled with the next that belongs there, which near the
    /// end of a step is one of the next step's.
    ///
    /// # Errors
    /// Those of the driver and of files.
    pub fn used(&mut self, memory: &LockedMemory, files: Option<&mut Files>) -> Result<()> {
        let (used, n) = (self.next, self.list().len());
        self.slots[used % RING_SLOTS].free.record(self.compute)?;
        self.slots[used % RING_SLOTS].free.wait(self.link)?;
        let follows = used + RING_SLOTS;
        let index = if follows < n {
            follows
        } else {
            used % RING_SLOTS
        };
        self.copy(index, memory, files)?;
        self.next = (used + 1) % n;
        Ok(())
    }

    fn copy(
        &mut self,
        index: usize,
        memory: &LockedMemory,
        files: Option<&mut Files>,
    ) -> Result<()> {
        let (bytes, from) = {
            let t = &self.list()[index];
            (t.bytes, t.from.clone())
        };
        let to = self.place(index % RING_SLOTS)?;
        let slot = &mut self.slots[index % RING_SLOTS];
        match (from, files) {
            (From::Host(offset), _) => {
                memory.upload(&self.driver, offset..offset + bytes, to, self.link)?
            }
            (From::File(_), Some(files)) => files.upload(bytes, to, self.link)?,
            (From::File(_), None) => {
                return Err(Error::failed("internal error: no files are open"));
            }
        }
        slot.arrived.record(self.link)?;
        slot.settled = false;
        Ok(())
    }

    fn place(&self, slot: usize) -> Result<DevicePtr> {
        let begin = slot * RING_SLOT_BYTES;
        let none = || Error::failed("internal error: no streaming ring");
        let memory = self.memory.as_ref().ok_or_else(none)?;
        memory.range(begin..begin + RING_SLOT_BYTES)
    }

    /// How fast the link brings what the steps stream, in GB/s, over as long as `go_on` says and at least 50 ms.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn measure(&mut self, memory: &LockedMemory, go_on: &dyn Fn() -> bool) -> Result<f64> {
        let transfers = std::mem::take(&mut self.transfers[0]);
        let host: Vec<&Transfer> = transfers
            .iter()
            .filter(|t| matches!(t.from, From::Host(_)))
            .collect();
        let (start, mut bytes) = (Instant::now(), 0);
        for (i, t) in host.iter().cycle().enumerate() {
            if i % RING_SLOTS == 0 && i > 0 {
                self.driver.synchronize(self.link)?;
                if start.elapsed() > Duration::from_millis(50) && !go_on() {
                    break;
                }
            }
            if let From::Host(offset) = t.from {
                let to = self.place(i % RING_SLOTS)?;
                memory.upload(&self.driver, offset..offset + t.bytes, to, self.link)?;
                bytes += t.bytes;
            }
        }
        self.driver.synchronize(self.link)?;
        let seconds = start.elapsed().as_secs_f64();
        self.transfers[0] = transfers;
        self.primed = None;
        Ok(bytes as f64 / seconds / 1e9)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(e) = self.driver.destroy_stream(self.link) {
            tracing::debug!("{e}");
        }
    }
}
