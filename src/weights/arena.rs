//! Host memory for weights: one anonymous mapping of exactly the size that was asked for.
//!
//! An allocator may round a large request up (a power of two in several pinned-memory pools), which a rank that is
//! sized to the byte cannot afford. All unsafe code of the weights is in this file.

use crate::{Error, Result};
use half::{bf16, f16};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Every slice begins at a multiple of this: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// A transparent huge page; the mapping begins at a multiple of it.
const HUGE: usize = 2 << 20;

/// Memory for a rank's weights, handed out from the front in disjoint slices.
#[derive(Debug)]
pub struct Arena {
    map: Arc<Mapping>,
    used: usize,
}

impl Arena {
    /// Maps `bytes` of zeroed memory; pages become resident when they are first written.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new(bytes: usize) -> Result<Self> {
        let map = Arc::new(Mapping::new(bytes)?);
        Ok(Arena { map, used: 0 })
    }

    /// The arena bytes that slices of these sizes take, each padded to [`ALIGN`].
    pub fn bytes_for(sizes: impl IntoIterator<Item = usize>) -> usize {
        sizes
            .into_iter()
            .fold(0, |sum, n| sum.saturating_add(padded(n)))
    }

    /// Takes the next `bytes`, aligned to [`ALIGN`].
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn take(&mut self, bytes: usize) -> Result<Slab> {
        let left = self.map.len - self.used;
        if bytes > left {
            let len = self.map.len;
            return Err(Error::failed(format_args!(
                "weights arena: {bytes} bytes wanted, {left} of {len} left"
            )));
        }
        let at = self.used;
        self.used = (at + padded(bytes)).min(self.map.len);
        Ok(Slab {
            map: self.map.clone(),
            at,
            len: bytes,
        })
    }
}

fn padded(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX)
}

/// A slice of an [`Arena`] that nobody else holds; the memory is returned with the last slice.
#[derive(Debug)]
pub struct Slab {
    map: Arc<Mapping>,
    at: usize,
    len: usize,
}

impl Slab {
    /// The slice as bf16 elements; a trailing half element is left out.
    pub fn as_bf16(&self) -> &[bf16] {
        bytemuck::cast_slice(&self[..self.len & !1])
    }

    /// The slice as f16 elements; a trailing half element is left out.
    pub fn as_f16(&self) -> &[f16] {
        bytemuck::cast_slice(&self[..self.len & !1])
    }

    /// The slice as f32 elements; a trailing fraction of an element is left out.
    pub fn as_f32(&self) -> &[f32] {
        bytemuck::cast_slice(&self[..self.len & !3])
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `Arena::take` gave out [at, at + len) of the zeroed mapping once, to this slab, which keeps the
        // mapping alive; the borrow of `self` rules out a `&mut` at the same time.
        unsafe { std::slice::from_raw_parts(self.map.start.as_ptr().add(self.at), self.len) }
    }
}

impl DerefMut for Slab {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; slabs are disjoint and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.start.as_ptr().add(self.at), self.len) }
    }
}

/// An anonymous private mapping.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that belongs to no thread; `Slab` alone gives access to it, to disjoint parts.
unsafe impl Send for Mapping {}
// SAFETY: as above: a shared `Mapping` exposes nothing but its length.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize) -> Result<Self> {
        let refused = |why: std::io::Error| {
            let gib = len as f64 / (1u64 << 30) as f64;
            Error::failed(format_args!(
                "cannot map {len} bytes ({gib:.1} GiB) of host memory for the weights: {why}; \
                 use more ranks, or raise the job's memory limit"
            ))
        };
        if len == 0 {
            return Ok(Mapping {
                start: NonNull::<Aligned>::dangling().cast(),
                len,
            });
        }
        // Room to move the beginning up to a huge page; what is left over at both ends is given back below.
        let want = len
            .checked_add(HUGE)
            .filter(|&w| w <= isize::MAX as usize)
            .ok_or_else(|| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), want, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        // SAFETY: sysconf reads a constant.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let head = (base as usize).next_multiple_of(HUGE) - base as usize;
        let keep = len.next_multiple_of(page);
        // SAFETY: both ranges are whole pages inside [base, base + want), outside [base + head, base + head + keep),
        // and nobody has a pointer to them yet; so is the advised range, which does not change what it holds.
        let start = unsafe {
            let start = base.byte_add(head);
            unmap(base, head);
            unmap(
                start.byte_add(keep),
                (want.next_multiple_of(page)) - head - keep,
            );
            if len >= HUGE {
                // Only a hint: without huge pages it is slower, not wrong.
                libc::madvise(start, keep, libc::MADV_HUGEPAGE);
            }
            start
        };
        NonNull::new(start.cast())
            .map(|start| Mapping { start, len })
            .ok_or_else(|| refused(std::io::ErrorKind::OutOfMemory.into()))
    }
}

/// Something as aligned as an arena, for the address of an empty one.
#[repr(align(64))]
struct Aligned;

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping is ours and no slab is left, for each of them holds the `Arc`.
            unsafe { unmap(self.start.as_ptr().cast(), self.len) }
        }
    }
}

/// Unmaps `len` bytes, or nothing.
///
/// # Safety
/// The range must be mapped, begin at a page, and nobody may use it any more.
unsafe fn unmap(start: *mut libc::c_void, len: usize) {
    if len > 0 {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start, len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_disjoint_zeroed_and_outlive_the_arena() {
        let sizes = [1, 64, 65, 0, 4096, 3 * HUGE + 5];
        let mut arena = Arena::new(Arena::bytes_for(sizes)).unwrap();
        let mut slabs: Vec<Slab> = sizes.iter().map(|&n| arena.take(n).unwrap()).collect();
        assert_eq!(
            arena.take(1).unwrap_err().to_string(),
            "weights arena: 1 bytes wanted, 0 of 6295872 left"
        );
        drop(arena);
        for (i, slab) in slabs.iter_mut().enumerate() {
            assert_eq!(slab.as_ptr() as usize % ALIGN, 0);
            assert!(slab.iter().all(|&b| b == 0));
            slab.fill(i as u8 + 1);
        }
        for (i, (slab, &n)) in slabs.iter().zip(&sizes).enumerate() {
            assert!(slab.len() == n && slab.iter().all(|&b| b == i as u8 + 1));
        }
    }

    #[test]
    fn an_arena_is_exactly_as_large_as_asked_and_aligned_to_a_huge_page() {
        let mut arena = Arena::new(HUGE + 1).unwrap();
        let slab = arena.take(HUGE + 1).unwrap();
        assert_eq!(slab.as_ptr() as usize % HUGE, 0);
        assert!(Arena::new(0).unwrap().take(0).unwrap().is_empty());
    }

    #[test]
    fn a_refused_mapping_names_its_size() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 62] {
            let e = Arena::new(bytes).unwrap_err().to_string();
            assert!(e.starts_with(&format!("cannot map {bytes} bytes (")), "{e}");
        }
    }

    #[test]
    fn elements_are_seen_in_every_type() {
        let mut slab = Arena::new(8).unwrap().take(7).unwrap();
        slab[..4].copy_from_slice(&1.5f32.to_le_bytes());
        assert_eq!(slab.as_f32(), [1.5]);
        assert_eq!(slab.as_bf16(), [0.0, 1.5, 0.0].map(bf16::from_f32));
        assert_eq!(slab.as_f16().len(), 3);
    }
}
