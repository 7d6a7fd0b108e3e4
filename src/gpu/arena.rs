//! One allocation for all step buffers: after the start nothing is allocated any more.

use super::driver::{DevicePtr, Driver};
use super::memory::DeviceBuffer;
use crate::Result;
use crate::layout::StepBuffers;
use std::sync::Arc;

/// The allocation, handed out front to back by the list.
pub struct Arena {
    memory: DeviceBuffer,
    places: Vec<(&'static str, usize)>,
}

impl Arena {
    /// Allocates everything on the list.
    ///
    /// # Errors
    /// The device has not that much left.
    pub fn new(driver: &Arc<dyn Driver>, buffers: &StepBuffers) -> Result<Arena> {
        let memory = DeviceBuffer::new(driver, buffers.bytes(), "step buffers")?;
        let places = buffers.offsets().collect();
        Ok(Arena { memory, places })
    }

    /// Where a buffer of the list begins.
    pub fn get(&self, name: &str) -> DevicePtr {
        let place = self.places.iter().find(|(n, _)| *n == name);
        debug_assert!(place.is_some(), "{name} is not on the list");
        self.memory.ptr().offset(place.map_or(0, |p| p.1))
    }

    /// The whole allocation, for copies by offset.
    pub fn memory(&self) -> &DeviceBuffer {
        &self.memory
    }

    /// Offset in the allocation of a pointer that [`Arena::get`] gave.
    pub fn offset(&self, ptr: DevicePtr) -> usize {
        (ptr.0 - self.memory.ptr().0) as usize
    }
}
