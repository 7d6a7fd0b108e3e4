//! The kernels' own sources as shared objects of the host: `kernels/*.cu` against `kernels/emulate.hpp`, by the C++
//! compiler of the machine.

use crate::gpu::cache::{Cache, fnv1a};
use crate::gpu::driver::Launch;
use crate::gpu::kernels::{HEADERS, Source};
use crate::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What kernels are compiled against here: CUDA's words in the host's C++.
const EMULATION: &[(&str, &str)] = &[
    ("emulate.hpp", include_str!("../../../kernels/emulate.hpp")),
    (
        "emulate_fiber.hpp",
        include_str!("../../../kernels/emulate_fiber.hpp"),
    ),
    (
        "emulate_names.hpp",
        include_str!("../../../kernels/emulate_names.hpp"),
    ),
    (
        "emulate_wgmma.hpp",
        include_str!("../../../kernels/emulate_wgmma.hpp"),
    ),
];

/// Options of the compiler; part of the cache's key.
const OPTIONS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fno-gnu-unique",
    "-w",
    "-DTANDEM_EMULATE",
];

type RegisterFn = unsafe extern "C" fn(*const c_void, usize);
type UnregisterFn = unsafe extern "C" fn(*const c_void);
type HasFn = unsafe extern "C" fn(*const c_char) -> c_int;
type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    u32,
    *mut *mut c_void,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// A change to a kernel file or header, to see whether it is noticed.
#[derive(Debug, Clone)]
pub struct Edit {
    /// File name, e.g. `norm.cu`.
    pub file: &'static str,
    /// What stands there.
    pub old: &'static str,
    /// What to put in its first place instead.
    pub new: &'static str,
}

/// Name and text of everything that an object is made from, the kernel file first.
fn files(source: &Source, edit: Option<&Edit>) -> Result<Vec<(String, String)>> {
    let mut files = vec![(format!("{}.cu", source.name), source.text.to_owned())];
    let headers = HEADERS.iter().map(|h| (h.name, h.text));
    let included = headers.chain(EMULATION.iter().copied());
    files.extend(included.map(|(name, text)| (name.to_owned(), text.to_owned())));
    let Some(edit) = edit else { return Ok(files) };
    for (_, text) in files.iter_mut().filter(|f| f.0 == edit.file) {
        if !text.contains(edit.old) {
            return Err(Error::failed(format_args!(
                "{}: no longer has {:?}",
                edit.file, edit.old
            )));
        }
        *text = text.replacen(edit.old, edit.new, 1);
    }
    Ok(files)
}

/// One compiled source, and the C interface at the end of `emulate.hpp`.
pub struct Module {
    source: &'static Source,
    register: RegisterFn,
    unregister: UnregisterFn,
    has: HasFn,
    launch: LaunchFn,
    /// Keeps the functions above in memory.
    _library: Library,
}

/// A kernel of a compiled source.
pub struct Kernel {
    module: Arc<Module>,
    name: CString,
}

impl Module {
    /// Compiles `source`, with `edit` where it concerns it, or finds it compiled in `cache`.
    ///
    /// # Errors
    /// No C++ compiler, a source that it refuses, or an object that does not load.
    pub fn load(
        source: &'static Source,
        cache: &Cache,
        edit: Option<&Edit>,
    ) -> Result<Arc<Module>> {
        let compiler = find_compiler()?;
        let files = files(source, edit)?;
        let mut key = vec![compiler.as_bytes()];
        key.extend(files.iter().flat_map(|f| [f.0.as_bytes(), f.1.as_bytes()]));
        key.extend(OPTIONS.iter().map(|o| o.as_bytes()));
        let name = format!("standin-{}-{:016x}.so", source.name, fnv1a(&key));
        let path = cache.path(&name);
        {
            // Ranks as threads want the same kernels at the same time: one compiles, the others find the object.
            static COMPILING: Mutex<()> = Mutex::new(());
            let _one_at_a_time = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
            if cache.own(&name).is_none() {
                compile(&files, compiler, cache, &name)?;
            }
        }
        // SAFETY: our own object; all that it runs when loaded is the registration of its kernels.
        let library = unsafe { Library::new(&path) }.map_err(|e| Error::file(&path, e))?;
        // SAFETY: the types are those of `emulate.hpp`.
        unsafe {
            Ok(Arc::new(Module {
                source,
                register: function(&library, "tandem_emulate_register")?,
                unregister: function(&library, "tandem_emulate_unregister")?,
                has: function(&library, "tandem_emulate_has")?,
                launch: function(&library, "tandem_emulate_launch")?,
                _library: library,
            }))
        }
    }

    /// Lets kernels touch `[begin, end)`.
    pub fn register(&self, (begin, end): (u64, u64)) {
        // SAFETY: only keeps the two numbers.
        unsafe { (self.register)(begin as *const c_void, (end - begin) as usize) }
    }

    /// Ends what [`Module::register`] began.
    pub fn unregister(&self, begin: u64) {
        // SAFETY: only forgets a number.
        unsafe { (self.unregister)(begin as *const c_void) }
    }

    /// A kernel by name.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn kernel(self: &Arc<Self>, name: &str) -> Result<Kernel> {
        let missing = || {
            Error::failed(format_args!(
                "there is no kernel {name} in {}.cu",
                self.source.name
            ))
        };
        let c_name = CString::new(name).map_err(|_| missing())?;
        // SAFETY: a NUL-terminated string that outlives the call.
        let has = unsafe { (self.has)(c_name.as_ptr()) } != 0;
        has.then(|| Kernel {
            module: self.clone(),
            name: c_name,
        })
        .ok_or_else(missing)
    }
}

/// # Safety
/// `F` is the type of the function `name`; it is not called after `library` is gone.
unsafe fn function<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: passed on to the caller.
    unsafe { library.get::<F>(name) }
        .map(|f| *f)
        .map_err(Error::failed)
}

impl Kernel {
    /// Runs it to its end on this thread; it may touch what is registered and nothing else.
    ///
    /// # Safety
    /// `args` are its parameters in number, order and size.
    ///
    /// # Errors
    /// An access outside the registered ranges, a race, or whatever else the emulation finds.
    pub unsafe fn run(&self, launch: &Launch, args: &[u64], seed: u64) -> Result<()> {
        let mut values = args.to_vec();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|v| (v as *mut u64).cast()).collect();
        let mut error = [0u8; 640];
        // SAFETY: all pointers outlive the call; the rest is the caller's.
        let status = unsafe {
            let (grid, block) = (launch.grid.as_ptr(), launch.block.as_ptr());
            let args = pointers.as_mut_ptr();
            let text = error.as_mut_ptr().cast();
            (self.module.launch)(
                self.name.as_ptr(),
                grid,
                block,
                launch.shared,
                args,
                seed,
                text,
                error.len(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        let text =
            CStr::from_bytes_until_nul(&error).map_or_else(|_| "?".into(), CStr::to_string_lossy);
        Err(Error::failed(format_args!("kernel {text}")))
    }
}

/// The C++ compiler of the machine: `CXX`, else the usual names.
fn find_compiler() -> Result<&'static str> {
    static FOUND: OnceLock<Result<String>> = OnceLock::new();
    FOUND
        .get_or_init(search_compiler)
        .as_deref()
        .map_err(Error::clone)
}

fn search_compiler() -> Result<String> {
    let named = std::env::var("CXX").ok().filter(|c| !c.is_empty());
    let works = |c: &String| {
        Command::new(c)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    let candidates = named.map_or_else(
        || ["c++", "g++", "clang++"].map(str::to_owned).to_vec(),
        |c| vec![c],
    );
    let tried = candidates.join(", ");
    let found = candidates.into_iter().find(works);
    found.ok_or_else(|| {
        Error::failed(format_args!(
            "the stand-in needs a C++ compiler; tried {tried}"
        ))
    })
}

fn compile(files: &[(String, String)], compiler: &str, cache: &Cache, name: &str) -> Result<()> {
    let object = cache.temporary(name)?;
    let dir = object.with_extension("src");
    std::fs::create_dir_all(&dir).map_err(|e| Error::file(&dir, e))?;
    for (file, text) in files {
        std::fs::write(dir.join(file), text).map_err(|e| Error::file(&dir, e))?;
    }
    let cu = &files[0].0;
    let mut command = Command::new(compiler);
    command
        .args(OPTIONS)
        .args(["-I.", "-x", "c++", cu, "-o"])
        .arg(&object)
        .current_dir(&dir);
    let ran = command.output();
    let outcome = match ran {
        Ok(o) if o.status.success() => {
            let own = std::fs::Permissions::from_mode(0o700);
            std::fs::set_permissions(&object, own)
                .and_then(|()| std::fs::rename(&object, cache.path(name)))
                .map_err(|e| Error::file(cache.path(name), e))
        }
        Ok(o) => {
            let text = String::from_utf8_lossy(&o.stderr);
            let first = text
                .lines()
                .find(|l| l.contains("error"))
                .or(text.lines().next())
                .unwrap_or("no message");
            Err(Error::failed(format_args!(
                "{compiler} refuses {cu}: {first}"
            )))
        }
        Err(e) => Err(Error::failed(format_args!("{compiler}: {e}"))),
    };
    // Only this call's own folder; a leftover would do no harm.
    let _ = std::fs::remove_dir_all(&dir);
    outcome
}
