//! NVRTC, the run-time compiler of CUDA C++: the eight functions of it that are used. All calls into it are in this file.
//!
//! cudarc has bindings too, but loads the library by names that a pip installation does not have.

use super::kernels::{Header, Source};
use super::libraries::{self, symbol};
use crate::{Error, Result};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;

type Program = *mut c_void;

/// The option that names what to compile for.
pub const ARCHITECTURE: &str = "--gpu-architecture=";

/// The opened library.
#[derive(Debug, Clone, Copy)]
pub struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Nvrtc {
    /// Opens the library.
    ///
    /// # Errors
    /// It is missing (with the places searched) or too old.
    pub fn open() -> Result<Nvrtc> {
        Nvrtc::open_in(&libraries::folders())
    }

    /// Opens the library in the loader's path or one of `folders`.
    ///
    /// # Errors
    /// As for [`Nvrtc::open`].
    pub fn open_in(folders: &[PathBuf]) -> Result<Nvrtc> {
        let lib = libraries::NVRTC.open_in(folders)?;
        // SAFETY: the types are those of nvrtc.h.
        unsafe {
            Ok(Nvrtc {
                version: symbol(lib, "NVRTC", "nvrtcVersion")?,
                error_string: symbol(lib, "NVRTC", "nvrtcGetErrorString")?,
                create: symbol(lib, "NVRTC", "nvrtcCreateProgram")?,
                compile: symbol(lib, "NVRTC", "nvrtcCompileProgram")?,
                cubin_size: symbol(lib, "NVRTC", "nvrtcGetCUBINSize")?,
                cubin: symbol(lib, "NVRTC", "nvrtcGetCUBIN")?,
                log_size: symbol(lib, "NVRTC", "nvrtcGetProgramLogSize")?,
                log: symbol(lib, "NVRTC", "nvrtcGetProgramLog")?,
                destroy: symbol(lib, "NVRTC", "nvrtcDestroyProgram")?,
            })
        }
    }

    /// Major and minor version.
    ///
    /// # Errors
    /// Those of the library.
    pub fn version(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both out-parameters live across the call.
        let code = unsafe { (self.version)(&mut major, &mut minor) };
        self.check(code, "nvrtcVersion").map(|()| (major, minor))
    }

    /// Compiles a source to a cubin.
    ///
    /// # Errors
    /// What the compiler says, its first error on one line.
    pub fn compile(
        &self,
        source: &Source,
        headers: &[Header],
        options: &[String],
    ) -> Result<Vec<u8>> {
        let c = |s: &str| CString::new(s).map_err(|_| Error::failed("a kernel source holds a NUL"));
        let (text, name) = (c(source.text)?, c(&format!("{}.cu", source.name))?);
        let texts = headers
            .iter()
            .map(|h| c(h.text))
            .collect::<Result<Vec<_>>>()?;
        let names = headers
            .iter()
            .map(|h| c(h.name))
            .collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|o| c(o)).collect::<Result<Vec<_>>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (texts, names, args) = (pointers(&texts), pointers(&names), pointers(&options));
        let mut program = std::ptr::null_mut();
        let n = headers.len() as c_int;
        // SAFETY: NUL-terminated strings and arrays of `n` of them, all alive across the call, which copies them.
        let code = unsafe {
            (self.create)(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                n,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check(code, "nvrtcCreateProgram")?;
        let made = self.run(program, &args).map_err(|e| {
            let mut arch = options
                .iter()
                .filter_map(|o| o.to_str().ok()?.strip_prefix(ARCHITECTURE));
            let arch = arch.next_back().unwrap_or("its default architecture");
            let (major, minor) = self.version().unwrap_or_default();
            let name = source.name;
            Error::failed(format_args!(
                "NVRTC {major}.{minor} refuses {name}.cu for {arch}: {e}"
            ))
        });
        // SAFETY: a program of `create`, destroyed once.
        unsafe { (self.destroy)(&mut program) };
        made
    }

    fn run(&self, program: Program, args: &[*const c_char]) -> Result<Vec<u8>> {
        // SAFETY: a live program; `args` point to NUL-terminated strings.
        let code = unsafe { (self.compile)(program, args.len() as c_int, args.as_ptr()) };
        if code != 0 {
            let log = self
                .read(program, self.log_size, self.log, "nvrtcGetProgramLog")
                .unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let first = log
                .lines()
                .find(|l| l.contains("error"))
                .map_or_else(|| self.text(code), str::to_owned);
            return Err(Error::failed(first));
        }
        self.read(program, self.cubin_size, self.cubin, "nvrtcGetCUBIN")
    }

    fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
        call: &str,
    ) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: a live program and an out-parameter.
        self.check(unsafe { size(program, &mut n) }, call)?;
        let mut bytes = vec![0u8; n];
        // SAFETY: `bytes` has the size that the library asked for.
        self.check(unsafe { get(program, bytes.as_mut_ptr().cast()) }, call)?;
        Ok(bytes)
    }

    fn text(&self, code: c_int) -> String {
        // SAFETY: the library returns a constant string for any code.
        unsafe { CStr::from_ptr((self.error_string)(code)) }
            .to_string_lossy()
            .into_owned()
    }

    fn check(&self, code: c_int, call: &str) -> Result<()> {
        if code == 0 {
            Ok(())
        } else {
            Err(Error::failed(format_args!("{call}: {}", self.text(code))))
        }
    }
}
