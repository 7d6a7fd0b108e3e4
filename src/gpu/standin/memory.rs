//! The stand-in's device memory: shared anonymous files, mapped between guard zones and poisoned when fresh.
//!
//! Everything that reads or writes it by address goes through [`Memory::check`] first. All unsafe code that touches this
//! memory is in this file.

use crate::gpu::driver::IpcHandle;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

/// How often each file's memory is mapped by devices of this process other than its own.
static IMPORTS: Mutex<Option<HashMap<u64, i64>>> = Mutex::new(None);

/// Adds to a file's count; what it is then.
fn count_import(file: &File, change: i64) -> i64 {
    let Ok(of_file) = file.metadata() else {
        return 0;
    };
    let mut counts = IMPORTS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts
        .get_or_insert_default()
        .entry(of_file.ino())
        .or_default();
    *count += change;
    *count
}

/// Bytes before and behind every allocation that nobody may write.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xA5;
/// All ones is a NaN in bf16, f16 and f32, and -1 as an index: whoever uses unwritten memory shows.
pub const POISON: u8 = 0xFF;

/// What an address range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Device memory.
    Device,
    /// Pinned host memory.
    Pinned,
    /// Another device's memory.
    Imported,
    /// Host memory that its owner has locked.
    Locked,
}

struct Block {
    /// Keeps the memory; `None` for what somebody else owns.
    file: Option<File>,
    map: *mut u8,
    map_bytes: usize,
    bytes: usize,
    kind: Kind,
}

// SAFETY: a block owns its mapping; access to its bytes is ordered by the stand-in's lock.
unsafe impl Send for Block {}

impl Block {
    fn map(file: File, bytes: usize, kind: Kind) -> Result<Block> {
        let map_bytes = bytes + 2 * GUARD;
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping of a file that is `map_bytes` long; nothing else is touched.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                read_write,
                shared,
                file.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(Error::failed(format_args!(
                "mmap of {bytes} bytes: {}",
                std::io::Error::last_os_error()
            )));
        }
        Ok(Block {
            file: Some(file),
            map: map.cast(),
            map_bytes,
            bytes,
            kind,
        })
    }

    /// Where the usable bytes begin.
    fn start(&self) -> u64 {
        self.map as u64 + GUARD as u64
    }

    /// Memory of somebody else's, without guards.
    fn locked(ptr: u64, bytes: usize) -> Block {
        Block {
            file: None,
            map: ptr as *mut u8,
            map_bytes: bytes,
            bytes,
            kind: Kind::Locked,
        }
    }

    fn all(&self) -> &[u8] {
        // SAFETY: the mapping is `map_bytes` long and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.map, self.map_bytes) }
    }

    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `all`.
        unsafe { std::slice::from_raw_parts_mut(self.map, self.map_bytes) }
    }

    /// The offset, from the first usable byte, of the first guard byte that was overwritten.
    fn damage(&self) -> Option<i64> {
        let all = self.all();
        let bad = |r: std::ops::Range<usize>| {
            all[r.clone()]
                .iter()
                .position(|&b| b != GUARD_BYTE)
                .map(|i| r.start + i)
        };
        let behind = GUARD + self.bytes;
        let first = bad(0..GUARD).or_else(|| bad(behind..self.map_bytes))?;
        Some(first as i64 - GUARD as i64)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        if self.kind == Kind::Imported {
            count_import(file, -1);
        }
        // SAFETY: the mapping is this block's own.
        unsafe { libc::munmap(self.map.cast(), self.map_bytes) };
    }
}

/// Every live range of one device.
pub struct Memory {
    blocks: BTreeMap<u64, Block>,
    total: u64,
    used: u64,
}

impl Memory {
    /// A device of `total` bytes.
    pub fn new(total: u64) -> Memory {
        Memory {
            blocks: BTreeMap::new(),
            total,
            used: 0,
        }
    }

    /// Device memory not in use.
    pub fn free_bytes(&self) -> u64 {
        self.total - self.used
    }

    /// Allocates poisoned memory between guards.
    pub fn alloc(&mut self, bytes: usize, kind: Kind) -> Result<u64> {
        if kind == Kind::Device && bytes as u64 > self.free_bytes() {
            return Err(Error::failed("out of memory"));
        }
        // SAFETY: the name is a constant string; the result is checked.
        let fd = unsafe { libc::memfd_create(c"tandem".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::failed(format_args!(
                "memfd_create: {}",
                std::io::Error::last_os_error()
            )));
        }
        // SAFETY: a descriptor that was just opened, owned from here on.
        let file = unsafe { File::from_raw_fd(fd) };
        let rounded = bytes.next_multiple_of(GUARD);
        file.set_len((rounded + 2 * GUARD) as u64)
            .map_err(|e| Error::failed(format_args!("{bytes} bytes: {e}")))?;
        let mut block = Block::map(file, rounded, kind)?;
        block.bytes = bytes;
        let all = block.all_mut();
        all.fill(GUARD_BYTE);
        all[GUARD..GUARD + bytes].fill(POISON);
        if kind == Kind::Device {
            self.used += bytes as u64;
        }
        let start = block.start();
        self.blocks.insert(start, block);
        Ok(start)
    }

    /// Adds host memory that its owner has locked.
    pub fn lock(&mut self, ptr: u64, bytes: usize) -> Result<()> {
        if self.check(ptr, 1).is_ok() || self.check(ptr + bytes as u64 - 1, 1).is_ok() {
            return Err(Error::failed(format_args!("{ptr:#x} is locked already")));
        }
        self.blocks.insert(ptr, Block::locked(ptr, bytes));
        Ok(())
    }

    /// Ends a range; an error when it never was one, or when its guards were written to.
    pub fn free(&mut self, ptr: u64, kind: Kind) -> Result<()> {
        match self.blocks.get(&ptr) {
            Some(b) if b.kind == kind => {}
            _ => {
                return Err(Error::failed(format_args!(
                    "{ptr:#x} is not an allocation (freed twice?)"
                )));
            }
        }
        let Some(block) = self.blocks.remove(&ptr) else {
            return Ok(());
        };
        if kind == Kind::Device {
            self.used -= block.bytes as u64;
        }
        if kind == Kind::Imported {
            return Ok(());
        }
        if block.file.as_ref().is_some_and(|f| count_import(f, 0) > 0) {
            return Err(Error::failed(format_args!(
                "{ptr:#x} is returned while another device maps it"
            )));
        }
        check_guards(ptr, &block)
    }

    /// An error if any guard zone was written to.
    pub fn check_all_guards(&self) -> Result<()> {
        self.blocks
            .iter()
            .try_for_each(|(&p, b)| check_guards(p, b))
    }

    /// What `bytes` bytes at `ptr` are; an error when they are not all inside one live range.
    pub fn check(&self, ptr: u64, bytes: usize) -> Result<Kind> {
        if let Some((&start, block)) = self.blocks.range(..=ptr).next_back() {
            let offset = ptr - start;
            if offset
                .checked_add(bytes as u64)
                .is_some_and(|end| end <= block.bytes as u64)
            {
                return Ok(block.kind);
            }
        }
        Err(Error::failed(format_args!(
            "illegal address: {bytes} bytes at {ptr:#x} are not inside any allocation"
        )))
    }

    /// Copies between two ranges.
    pub fn copy(&mut self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        self.check(dst, bytes)?;
        self.check(src, bytes)?;
        // SAFETY: both ranges lie inside live mappings; `copy` allows them to overlap.
        unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes) };
        Ok(())
    }

    /// Sets a range.
    pub fn fill(&mut self, dst: u64, value: u8, bytes: usize) -> Result<()> {
        self.check(dst, bytes)?;
        // SAFETY: the range lies inside a live mapping.
        unsafe { (dst as *mut u8).write_bytes(value, bytes) };
        Ok(())
    }

    /// Reads `n` elements, for host code that stands for a device library.
    pub fn read<T: bytemuck::AnyBitPattern>(&self, ptr: u64, n: usize) -> Result<Vec<T>> {
        self.check(ptr, n * size_of::<T>())?;
        // SAFETY: the range lies inside a live mapping; any bits make a `T`; unaligned reads are allowed.
        Ok((0..n)
            .map(|i| unsafe { (ptr as *const T).add(i).read_unaligned() })
            .collect())
    }

    /// Writes elements, for host code that stands for a device library.
    pub fn write<T: bytemuck::NoUninit>(&mut self, ptr: u64, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.check(ptr, bytes.len())?;
        // SAFETY: the range lies inside a live mapping, which no slice in Rust's hands overlaps.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), ptr as *mut u8, bytes.len()) };
        Ok(())
    }

    /// The 32-bit value at `ptr`, which another device may be writing.
    pub fn load(&self, ptr: u64) -> Result<u32> {
        self.check_word(ptr)?;
        // SAFETY: four aligned bytes inside a live mapping.
        Ok(unsafe { &*(ptr as *const std::sync::atomic::AtomicU32) }
            .load(std::sync::atomic::Ordering::Acquire))
    }

    /// Writes the 32-bit value at `ptr`, which another device may be reading.
    pub fn store(&mut self, ptr: u64, value: u32) -> Result<()> {
        self.check_word(ptr)?;
        // SAFETY: four aligned bytes inside a live mapping.
        unsafe { &*(ptr as *const std::sync::atomic::AtomicU32) }
            .store(value, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    fn check_word(&self, ptr: u64) -> Result<()> {
        self.check(ptr, 4)?;
        if ptr.is_multiple_of(4) {
            Ok(())
        } else {
            Err(Error::failed(format_args!("misaligned address {ptr:#x}")))
        }
    }

    /// Every live range, `[begin, end)`, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.blocks
            .iter()
            .map(|(&start, b)| (start, start + b.bytes as u64))
    }

    /// A handle by which any process of the user on this host can map the block at `ptr`.
    pub fn export(&self, ptr: u64) -> Result<IpcHandle> {
        let block = self.blocks.get(&ptr).filter(|b| b.kind == Kind::Device);
        let block = block.ok_or_else(|| {
            Error::failed(format_args!(
                "{ptr:#x} is not the beginning of an allocation"
            ))
        })?;
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
        let fd = block.file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        handle[8..16].copy_from_slice(&(fd as u64).to_le_bytes());
        handle[16..24].copy_from_slice(&(block.bytes as u64).to_le_bytes());
        Ok(IpcHandle(handle))
    }

    /// Maps the block behind a handle; where it begins, and its bytes.
    pub fn import(&mut self, handle: &IpcHandle) -> Result<(u64, usize)> {
        let word = |i: usize| {
            handle.0[8 * i..8 * i + 8]
                .iter()
                .rev()
                .fold(0, |x, &b| x << 8 | u64::from(b))
        };
        let (pid, fd, bytes) = (word(0), word(1), word(2) as usize);
        let path = format!("/proc/{pid}/fd/{fd}");
        let gone = |e: &dyn std::fmt::Display| {
            Error::failed(format_args!("the exported memory is gone: {e}"))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| gone(&e))?;
        let rounded = bytes.next_multiple_of(GUARD);
        let len = file.metadata().map_err(|e| gone(&e))?.len();
        if len != (rounded + 2 * GUARD) as u64 {
            return Err(gone(&"it has another size"));
        }
        let mut block = Block::map(file, rounded, Kind::Imported)?;
        if let Some(file) = &block.file {
            count_import(file, 1);
        }
        block.bytes = bytes;
        let start = block.start();
        self.blocks.insert(start, block);
        Ok((start, bytes))
    }
}

fn check_guards(ptr: u64, block: &Block) -> Result<()> {
    // The guards of another device's memory are its own affair; locked memory has none.
    if matches!(block.kind, Kind::Imported | Kind::Locked) {
        return Ok(());
    }
    match block.damage() {
        None => Ok(()),
        Some(at) => Err(Error::failed(format_args!(
            "out of bounds: offset {at} of the {} byte allocation at {ptr:#x} was written",
            block.bytes
        ))),
    }
}
