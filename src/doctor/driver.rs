//! Raw calls into libraries opened at run time: this file holds all of the doctor's unsafe code.
//!
//! A library stays open until the process ends, so that what it registered at load time stays valid.

use super::cuda::Gpu;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::ptr::NonNull;

/// An open shared library.
pub(super) struct Library {
    handle: NonNull<c_void>,
}

impl Library {
    /// Opens `name`: a path, or a name for the loader to look up.
    ///
    /// # Errors
    /// The loader's own words.
    pub fn open(name: &str) -> Result<Library, String> {
        let c_name = CString::new(name).map_err(|_| format!("{name:?} has a zero byte"))?;
        // SAFETY: `c_name` is a C string; RTLD_LOCAL keeps the library's names out of everybody's way.
        let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
        NonNull::new(handle)
            .map(|handle| Library { handle })
            .ok_or_else(last_error)
    }

    fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle is open and `name` is a C string.
        NonNull::new(unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) })
    }

    /// The file that defines `symbol`.
    pub fn file(&self, symbol: &CStr) -> Option<PathBuf> {
        let address = self.symbol(symbol)?;
        // SAFETY: an all-zero `Dl_info` is one that nothing was found for.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is ours to write; the address is only compared.
        let found =
            unsafe { libc::dladdr(address.as_ptr(), &mut info) } != 0 && !info.dli_fname.is_null();
        // SAFETY: the loader's own name of the open library, which lives as long as it.
        found.then(|| PathBuf::from(unsafe { text(info.dli_fname) }))
    }

    /// Calls `int f(int *version)`, the version function of libcuda and NCCL.
    pub fn version_by_pointer(&self, symbol: &CStr) -> Option<c_int> {
        let f = self.symbol(symbol)?;
        // SAFETY: the signature is the one that the callers' headers document for these symbols.
        let f: extern "C" fn(*mut c_int) -> c_int = unsafe { std::mem::transmute(f.as_ptr()) };
        let mut version = 0;
        (f(&mut version) == 0).then_some(version)
    }

    /// Calls `int f(int *major, int *minor)`, the version function of NVRTC.
    pub fn version_by_two_pointers(&self, symbol: &CStr) -> Option<(c_int, c_int)> {
        let f = self.symbol(symbol)?;
        // SAFETY: as above.
        let f: extern "C" fn(*mut c_int, *mut c_int) -> c_int =
            unsafe { std::mem::transmute(f.as_ptr()) };
        let (mut major, mut minor) = (0, 0);
        (f(&mut major, &mut minor) == 0).then_some((major, minor))
    }

    /// Calls `size_t f(void)`, the version function of cublasLt.
    pub fn version_by_value(&self, symbol: &CStr) -> Option<usize> {
        let f = self.symbol(symbol)?;
        // SAFETY: as above.
        let f: extern "C" fn() -> usize = unsafe { std::mem::transmute(f.as_ptr()) };
        Some(f())
    }

    /// The GPUs that the driver shows this process, by the calls of a libcuda.
    ///
    /// # Errors
    /// The failing call and the driver's name for its error, or the name that the library lacks.
    pub fn gpus(&self) -> Result<Vec<Gpu>, String> {
        type Init = extern "C" fn(c_uint) -> c_int;
        type Count = extern "C" fn(*mut c_int) -> c_int;
        type Get = extern "C" fn(*mut c_int, c_int) -> c_int;
        type Name = extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
        type Memory = extern "C" fn(*mut usize, c_int) -> c_int;
        type Attribute = extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
        // SAFETY (all six): the signatures of cuda.h; CUdevice and the enumerations are C ints.
        let init: Init = unsafe { std::mem::transmute(self.required(c"cuInit")?) };
        let count: Count = unsafe { std::mem::transmute(self.required(c"cuDeviceGetCount")?) };
        let get: Get = unsafe { std::mem::transmute(self.required(c"cuDeviceGet")?) };
        let name: Name = unsafe { std::mem::transmute(self.required(c"cuDeviceGetName")?) };
        let memory: Memory = unsafe { std::mem::transmute(self.required(c"cuDeviceTotalMem_v2")?) };
        let attribute: Attribute =
            unsafe { std::mem::transmute(self.required(c"cuDeviceGetAttribute")?) };
        let check = |call: &str, code: c_int| match code {
            0 => Ok(()),
            _ => Err(format!("{call}: {}", self.error_name(code))),
        };
        const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];
        let mut n = 0;
        check("cuInit", init(0))?;
        check("cuDeviceGetCount", count(&mut n))?;
        (0..n)
            .map(|index| {
                let (mut device, mut total) = (0, 0);
                let mut buffer: [c_char; 256] = [0; 256];
                check("cuDeviceGet", get(&mut device, index))?;
                // One byte less than there is: the last zero stays.
                check("cuDeviceGetName", name(buffer.as_mut_ptr(), 255, device))?;
                check("cuDeviceTotalMem", memory(&mut total, device))?;
                let mut capability = [0; 2];
                for (value, which) in capability.iter_mut().zip(COMPUTE_CAPABILITY) {
                    check("cuDeviceGetAttribute", attribute(value, which, device))?;
                }
                Ok(Gpu {
                    // SAFETY: `buffer` ends with a zero.
                    name: unsafe { text(buffer.as_ptr()) },
                    memory: total as u64,
                    compute_capability: format!("{}.{}", capability[0], capability[1]),
                })
            })
            .collect()
    }

    fn required(&self, symbol: &CStr) -> Result<*mut c_void, String> {
        let found = self.symbol(symbol).map(NonNull::as_ptr);
        found.ok_or_else(|| format!("it has no {}", symbol.to_string_lossy()))
    }

    fn error_name(&self, code: c_int) -> String {
        let mut name: *const c_char = std::ptr::null();
        if let Some(f) = self.symbol(c"cuGetErrorName") {
            // SAFETY: the signature of cuda.h.
            let f: extern "C" fn(c_int, *mut *const c_char) -> c_int =
                unsafe { std::mem::transmute(f.as_ptr()) };
            f(code, &mut name);
        }
        if name.is_null() {
            return format!("error {code}");
        }
        // SAFETY: the driver's own constant text.
        unsafe { text(name) }
    }
}

fn last_error() -> String {
    // SAFETY: `dlerror` takes nothing and answers for this thread.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the loader does not say why".to_owned();
    }
    // SAFETY: a C string of the loader, valid until the next call.
    unsafe { text(message) }
}

/// # Safety
/// `c` points to a C string.
unsafe fn text(c: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(c) }.to_string_lossy().into_owned()
}
