//! Scratch memory that starts on a cache line and stays.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// Bytes of a cache line, and of the widest vector.
pub(super) const ALIGN: usize = 64;

/// A zeroed, 64-byte aligned `f32` buffer that grows on demand and never shrinks; growing discards its contents.
pub(super) struct Scratch {
    ptr: *mut f32,
    len: usize,
}

// SAFETY: `Scratch` owns its memory, as a `Vec` does.
unsafe impl Send for Scratch {}
// SAFETY: shared access only reads.
unsafe impl Sync for Scratch {}

impl Scratch {
    pub(super) const fn new() -> Self {
        Scratch {
            ptr: std::ptr::null_mut(),
            len: 0,
        }
    }

    /// The first `len` elements; what they hold is left over from the last use.
    pub(super) fn get(&mut self, len: usize) -> &mut [f32] {
        if len > self.len {
            *self = Scratch::allocate(len);
        }
        if len == 0 {
            return &mut [];
        }
        // SAFETY: `ptr` holds at least `len` initialised elements.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, len) }
    }

    /// As [`Scratch::get`], on pages of 2 MiB where the kernel has them, which a large sequential read needs for full speed.
    pub(super) fn get_on_large_pages(&mut self, len: usize) -> &mut [f32] {
        let fresh = len > self.len;
        let buffer = self.get(len);
        if fresh {
            // SAFETY: advice about whole pages within the buffer changes none of its contents.
            unsafe {
                const PAGE: usize = 4096;
                let start = (buffer.as_ptr() as usize).next_multiple_of(PAGE);
                let end = buffer.as_ptr_range().end as usize / PAGE * PAGE;
                if end > start {
                    let p = start as *mut libc::c_void;
                    libc::madvise(p, end - start, libc::MADV_HUGEPAGE);
                }
            }
        }
        buffer
    }

    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len * size_of::<f32>(), ALIGN)
            .expect("a scratch buffer fits memory")
    }

    fn allocate(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: `len` is above zero, so the layout has a size.
        let ptr = unsafe { alloc_zeroed(layout) }.cast::<f32>();
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Scratch { ptr, len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `allocate` with this layout.
            unsafe { dealloc(self.ptr.cast(), Self::layout(self.len)) };
        }
    }
}
