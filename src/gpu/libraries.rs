//! NVIDIA's libraries, opened at run time: the same binary starts on a machine that has none of them.
//!
//! A library is looked for in the loader's own path, under `CUDA_HOME`, and in the `nvidia/*/lib` folders of Python
//! installations, where pip puts it. Function tables are resolved once, so that what is missing is an error at the start
//! and no panic later.

use crate::{Error, Result};
use libloading::Library;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One library, as its files are named.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// For the person at the terminal, e.g. `NVRTC`.
    pub what: &'static str,
    /// File name up to `.so`, e.g. `libnvrtc`.
    pub stem: &'static str,
    /// Major versions, the preferred one first.
    pub majors: &'static [u32],
    /// How to get it.
    pub hint: &'static str,
}

/// The driver: it comes with the kernel module and is always in the loader's path.
pub const DRIVER: Wanted = Wanted {
    what: "the CUDA driver",
    stem: "libcuda",
    majors: &[1],
    hint: "this machine has no NVIDIA driver, or its folder is not in the loader's path; --device cpu runs without",
};
/// The kernel compiler.
pub const NVRTC: Wanted = Wanted {
    what: "NVRTC",
    stem: "libnvrtc",
    majors: &[13, 12],
    hint: "load a CUDA module, set CUDA_HOME, or: pip install nvidia-cuda-nvrtc",
};
/// Large matrix products.
pub const CUBLASLT: Wanted = Wanted {
    what: "cublasLt",
    stem: "libcublasLt",
    majors: &[13, 12],
    hint: "load a CUDA module, set CUDA_HOME, or: pip install nvidia-cublas",
};
/// Collectives between GPUs.
pub const NCCL: Wanted = Wanted {
    what: "NCCL",
    stem: "libnccl",
    majors: &[2],
    hint: "load an NCCL module, set CUDA_HOME, or: pip install nvidia-nccl-cu13 (or -cu12)",
};

impl Wanted {
    /// Opens the library wherever it is found first; it stays open until the process ends, because CUDA's libraries do
    /// not survive being closed while their threads run.
    ///
    /// # Errors
    /// Not found, with the places that were searched, or found and not loadable.
    pub fn open(&self) -> Result<&'static Library> {
        self.open_in(&folders())
    }

    /// As [`Wanted::open`], with the loader's path first and then these folders.
    ///
    /// # Errors
    /// As for [`Wanted::open`].
    pub fn open_in(&self, folders: &[PathBuf]) -> Result<&'static Library> {
        let versioned = self
            .majors
            .iter()
            .map(|major| format!("{}.so.{major}", self.stem));
        let names: Vec<String> = versioned.chain([format!("{}.so", self.stem)]).collect();
        if let Some(library) = names.iter().find_map(|name| load(Path::new(name)).ok()) {
            return Ok(library);
        }
        let mut refused = None;
        for path in folders
            .iter()
            .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        {
            if !path.exists() {
                continue;
            }
            open_companions(&path);
            match load(&path) {
                Ok(library) => {
                    tracing::debug!("{} from {}", self.what, path.display());
                    return Ok(library);
                }
                Err(e) => {
                    refused = refused.or(Some(Error::file(
                        &path,
                        format_args!("{} cannot be loaded: {e}", self.what),
                    )))
                }
            }
        }
        Err(refused.unwrap_or_else(|| self.missing(folders)))
    }

    fn missing(&self, folders: &[PathBuf]) -> Error {
        let (what, hint) = (self.what, self.hint);
        let names: Vec<_> = self
            .majors
            .iter()
            .map(|m| format!("{}.so.{m}", self.stem))
            .collect();
        let shown = folders.iter().map(|f| f.display().to_string());
        let places: Vec<_> = std::iter::once("the loader's path".to_owned())
            .chain(shown)
            .collect();
        Error::failed(format_args!(
            "{what} is missing: no {} in {}; {hint}",
            names.join(" or "),
            places.join(", ")
        ))
    }
}

/// The address of a function of `library`.
///
/// # Safety
/// `F` is the type of a pointer to that very function.
///
/// # Errors
/// The library has none of that name: it is too old.
pub unsafe fn symbol<F: Copy>(library: &'static Library, what: &str, name: &str) -> Result<F> {
    // SAFETY: passed on to the caller.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found
        .map(|f| *f)
        .map_err(|_| Error::failed(format_args!("{what} has no {name}: it is too old")))
}

fn load(path: &Path) -> Result<&'static Library, libloading::Error> {
    // SAFETY: the initializers of NVIDIA's libraries are safe to run from any thread.
    let library = unsafe { Library::new(path) }?;
    Ok(Box::leak(Box::new(library)))
}

/// NVRTC opens its `libnvrtc-builtins.so.*` by bare name: outside of the loader's path it only finds the one that is
/// open already.
fn open_companions(path: &Path) {
    let is_nvrtc = path
        .file_name()
        .is_some_and(|n| n.to_string_lossy().starts_with("libnvrtc.so"));
    let Some(folder) = path.parent().filter(|_| is_nvrtc) else {
        return;
    };
    for file in entries(folder) {
        if file
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("libnvrtc-builtins.so"))
            && let Err(e) = load(&file)
        {
            tracing::debug!("{}: {e}", file.display());
        }
    }
}

/// Where CUDA's libraries are besides the loader's path, most wanted first; only folders that exist.
pub fn folders() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "NCCL_HOME"]
        .into_iter()
        .filter_map(variable);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda")]);
    let of_toolkit =
        |dir: PathBuf| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|sub| dir.join(sub));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(variable);
    let interpreters = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .filter(|bin| bin.join("python3").exists())
        .filter_map(|bin| bin.parent().map(Path::to_owned))
        .collect::<Vec<_>>();
    let home = variable("HOME").map(|home| home.join(".local"));
    let prefixes = environments
        .chain(interpreters)
        .chain(home)
        .chain([PathBuf::from("/usr/local")]);
    let mut seen = BTreeSet::new();
    let all = toolkits
        .flat_map(of_toolkit)
        .chain(prefixes.flat_map(|p| pip_folders(&p)));
    all.filter(|folder| folder.is_dir() && seen.insert(folder.clone()))
        .collect()
}

/// `PREFIX/lib/python3.*/{site,dist}-packages/nvidia/*/lib`.
fn pip_folders(prefix: &Path) -> Vec<PathBuf> {
    let is_python = |p: &PathBuf| {
        p.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("python3"))
    };
    let pythons = ["lib", "lib64"]
        .into_iter()
        .flat_map(|lib| entries(&prefix.join(lib)))
        .filter(is_python);
    let packages = pythons
        .flat_map(|p| ["site-packages", "dist-packages"].map(|sub| p.join(sub).join("nvidia")));
    let mut folders: Vec<_> = packages
        .flat_map(|p| entries(&p))
        .map(|p| p.join("lib"))
        .collect();
    // `cu13` before `cuda_nvrtc`, whatever order the file system has.
    folders.sort();
    folders
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: Wanted = Wanted {
        what: "Frob",
        stem: "libtandemfrob",
        majors: &[7],
        hint: "install it",
    };

    #[test]
    fn a_missing_library_is_named_with_the_places() {
        let e = NOWHERE
            .open_in(&[PathBuf::from("/a/lib")])
            .unwrap_err()
            .to_string();
        assert_eq!(
            e,
            "Frob is missing: no libtandemfrob.so.7 in the loader's path, /a/lib; install it"
        );
    }

    #[test]
    fn a_file_that_is_no_library_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libtandemfrob.so.7"), "no library").unwrap();
        let e = NOWHERE
            .open_in(&[dir.path().to_owned()])
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("libtandemfrob.so.7: Frob cannot be loaded"),
            "{e}"
        );
    }

    #[test]
    fn pip_folders_are_found_under_a_prefix() {
        let dir = tempfile::tempdir().unwrap();
        for sub in [
            "python3.11/site-packages/nvidia/nccl/lib",
            "python3.12/dist-packages/nvidia/cu13/lib",
        ] {
            std::fs::create_dir_all(dir.path().join("lib").join(sub)).unwrap();
        }
        let found = pip_folders(dir.path());
        assert_eq!(found.len(), 2);
        assert!(found[0].ends_with("python3.11/site-packages/nvidia/nccl/lib"));
    }

    #[test]
    fn a_missing_symbol_says_too_old() {
        let libc = Wanted {
            what: "libc",
            stem: "libc",
            majors: &[6],
            hint: "",
        }
        .open_in(&[])
        .unwrap();
        // SAFETY: the type is that of the function, which is not called.
        let e =
            unsafe { symbol::<unsafe extern "C" fn()>(libc, "libc", "tandem_no_such_function") }
                .unwrap_err();
        assert_eq!(
            e.to_string(),
            "libc has no tandem_no_such_function: it is too old"
        );
    }
}
