//! Collectives between GPUs by NCCL. All calls into the library are in this file.
//!
//! There is no NCCL crate to build on (the crate `nccl` is a configuration language); cudarc has types, but searches
//! the library as `libnccl.so`, which a runtime installation does not have.

use super::collective::DeviceCollective;
use super::driver::{DevicePtr, Driver, Stream};
use super::libraries::{self, symbol};
use crate::{Error, Result};
use cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_int, c_void};

type Status = c_int;
type Comm = *mut c_void;

/// What rank 0 makes and every rank needs to join: 128 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

#[derive(Clone, Copy)]
#[repr(C)]
struct RawId([u8; 128]);

/// The functions of the library that are used.
#[derive(Clone, Copy)]
struct Api {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    unique_id: unsafe extern "C" fn(*mut RawId) -> Status,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, RawId, c_int) -> Status,
    finalize: unsafe extern "C" fn(Comm) -> Status,
    destroy: unsafe extern "C" fn(Comm) -> Status,
    abort: unsafe extern "C" fn(Comm) -> Status,
    async_error: unsafe extern "C" fn(Comm, *mut Status) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    all_reduce: unsafe extern "C" fn(u64, u64, usize, u32, u32, Comm, u64) -> Status,
    broadcast: unsafe extern "C" fn(u64, u64, usize, u32, c_int, Comm, u64) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
}

/// The opened library.
#[derive(Clone, Copy)]
pub struct Library {
    api: Api,
}

impl Library {
    /// Opens the library.
    ///
    /// # Errors
    /// It is missing (with the places searched) or too old.
    pub fn open() -> Result<Library> {
        let lib = libraries::NCCL.open()?;
        let what = libraries::NCCL.what;
        // SAFETY: the types are those of nccl.h, with enumerations as 32-bit integers and device pointers as numbers.
        let api = unsafe {
            Api {
                version: symbol(lib, what, "ncclGetVersion")?,
                unique_id: symbol(lib, what, "ncclGetUniqueId")?,
                init_rank: symbol(lib, what, "ncclCommInitRank")?,
                finalize: symbol(lib, what, "ncclCommFinalize")?,
                destroy: symbol(lib, what, "ncclCommDestroy")?,
                abort: symbol(lib, what, "ncclCommAbort")?,
                async_error: symbol(lib, what, "ncclCommGetAsyncError")?,
                error_string: symbol(lib, what, "ncclGetErrorString")?,
                all_reduce: symbol(lib, what, "ncclAllReduce")?,
                broadcast: symbol(lib, what, "ncclBroadcast")?,
                group_start: symbol(lib, what, "ncclGroupStart")?,
                group_end: symbol(lib, what, "ncclGroupEnd")?,
            }
        };
        Ok(Library { api })
    }

    /// Version as NCCL counts it: 22809 is 2.28.9.
    ///
    /// # Errors
    /// Those of the library.
    pub fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: an out-parameter.
        self.check("ncclGetVersion", unsafe {
            (self.api.version)(&mut version)
        })?;
        Ok(version)
    }

    /// A new id, for rank 0 to send to the others.
    ///
    /// # Errors
    /// Those of the library.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = RawId([0; 128]);
        // SAFETY: an out-parameter of the documented size.
        self.check("ncclGetUniqueId", unsafe { (self.api.unique_id)(&mut id) })?;
        Ok(UniqueId(id.0))
    }

    fn check(&self, call: &str, code: Status) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the library returns a constant string for any code.
        let what = unsafe { CStr::from_ptr((self.api.error_string)(code)) }.to_string_lossy();
        Err(Error::failed(format_args!(
            "{call}: {what}; NCCL_DEBUG=WARN says more"
        )))
    }
}

/// This rank's end of a communicator.
pub struct Nccl {
    library: Library,
    comm: Comm,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Joins the other ranks; returns when all have. The device's context is current on this thread.
    ///
    /// # Errors
    /// A rank that does not come, or devices that cannot reach each other.
    pub fn join(
        library: Library,
        id: UniqueId,
        rank: usize,
        size: usize,
        driver: &dyn Driver,
    ) -> Result<Nccl> {
        let mut comm = std::ptr::null_mut();
        // The library works in the thread's current context, which any call of the driver sets.
        driver.memory()?;
        // SAFETY: an out-parameter; the id is passed by value as documented.
        let code = unsafe {
            (library.api.init_rank)(&mut comm, size as c_int, RawId(id.0), rank as c_int)
        };
        library.check("ncclCommInitRank", code)?;
        Ok(Nccl { library, comm })
    }
}

impl DeviceCollective for Nccl {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    unsafe fn all_reduce(&mut self, x: DevicePtr, n: usize, stream: Stream) -> Result<()> {
        let kind = sys::ncclDataType_t::ncclBfloat16;
        let sum = sys::ncclRedOp_t::ncclSum as u32;
        // SAFETY: passed on to the caller.
        let code = unsafe {
            (self.library.api.all_reduce)(x.0, x.0, n, kind as u32, sum, self.comm, stream.0)
        };
        self.library.check("ncclAllReduce", code)
    }

    unsafe fn all_gather(
        &mut self,
        local: DevicePtr,
        counts: &[usize],
        out: DevicePtr,
        stream: Stream,
    ) -> Result<()> {
        let api = &self.library.api;
        let kind = sys::ncclDataType_t::ncclFloat32 as u32;
        let mut at = 0;
        // The parts differ in length, so every rank sends its own to all: one group, one launch.
        // SAFETY: passed on to the caller.
        unsafe {
            self.library.check("ncclGroupStart", (api.group_start)())?;
            for (root, &n) in counts.iter().enumerate() {
                let to = out.offset(4 * at).0;
                let sent =
                    (api.broadcast)(local.0, to, n, kind, root as c_int, self.comm, stream.0);
                self.library.check("ncclBroadcast", sent)?;
                at += n;
            }
            self.library.check("ncclGroupEnd", (api.group_end)())
        }
    }

    fn check(&mut self) -> Result<()> {
        let mut error = 0;
        // SAFETY: an out-parameter and a live communicator.
        let code = unsafe { (self.library.api.async_error)(self.comm, &mut error) };
        self.library.check("ncclCommGetAsyncError", code)?;
        self.library.check("another rank, seen by NCCL", error)
    }

    fn finish(&mut self) -> Result<()> {
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if comm.is_null() {
            return Ok(());
        }
        let api = &self.library.api;
        // SAFETY: a live communicator, given up here; both calls are made on every rank.
        unsafe {
            self.library
                .check("ncclCommFinalize", (api.finalize)(comm))?;
            self.library.check("ncclCommDestroy", (api.destroy)(comm))
        }
    }

    fn abandon(&mut self) {
        // Abort and not destroy: after a failure the other ranks may never come to the end of theirs.
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: a live communicator, given up once.
            unsafe { (self.library.api.abort)(comm) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abandon();
    }
}
