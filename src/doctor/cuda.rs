//! The CUDA libraries and GPUs: which are here, of which version, and where they were looked for.

use super::driver::Library;
use super::launcher::Env;
use super::search::{Place, entries, places, versions_of};
use serde::Serialize;
use std::ffi::CStr;
use std::path::{Path, PathBuf};

/// A library that a run on GPUs opens at run time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaLibrary {
    /// What it is called without its version, `libnccl.so`.
    pub name: &'static str,
    /// The file that opened; `None` where none did.
    pub path: Option<PathBuf>,
    /// The version that it tells, `12.8`.
    pub version: Option<String>,
    /// Files that were found and did not open, each with the loader's words.
    pub broken: Vec<String>,
}

/// One GPU that the driver shows this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// The driver's name for it.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
    /// `9.0` for Hopper.
    pub compute_capability: String,
}

/// CUDA as this process finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cuda {
    /// The four libraries, the driver's first.
    pub libraries: Vec<CudaLibrary>,
    /// The GPUs, in the driver's order.
    pub gpus: Vec<Gpu>,
    /// Why the driver shows none, in its words.
    pub gpu_error: Option<String>,
    /// GPU nodes of the kernel, `/dev/nvidia0`.
    pub device_nodes: Vec<PathBuf>,
    /// Where libraries were looked for, in this order, beginning with the loader's own path.
    pub looked_in: Vec<String>,
}

/// How to find a library and ask for its version.
struct Wanted {
    name: &'static str,
    /// What to ask the loader for, the newest first.
    sonames: &'static [&'static str],
    version_symbol: &'static CStr,
    version: fn(&Library, &CStr) -> Option<String>,
}

const WANTED: [Wanted; 4] = [
    Wanted {
        name: "libcuda.so",
        sonames: &["libcuda.so.1"],
        version_symbol: c"cuDriverGetVersion",
        version: |lib, symbol| {
            let v = lib.version_by_pointer(symbol)?;
            Some(format!("{}.{}", v / 1000, v % 1000 / 10))
        },
    },
    Wanted {
        name: "libcublasLt.so",
        sonames: &[
            "libcublasLt.so.13",
            "libcublasLt.so.12",
            "libcublasLt.so.11",
            "libcublasLt.so",
        ],
        version_symbol: c"cublasLtGetVersion",
        version: |lib, symbol| Some(dotted(lib.version_by_value(symbol)?, 100_000)),
    },
    Wanted {
        name: "libnvrtc.so",
        sonames: &[
            "libnvrtc.so.13",
            "libnvrtc.so.12",
            "libnvrtc.so.11.2",
            "libnvrtc.so",
        ],
        version_symbol: c"nvrtcVersion",
        version: |lib, symbol| {
            let (major, minor) = lib.version_by_two_pointers(symbol)?;
            Some(format!("{major}.{minor}"))
        },
    },
    Wanted {
        name: "libnccl.so",
        sonames: &["libnccl.so.2", "libnccl.so"],
        version_symbol: c"ncclGetVersion",
        version: |lib, symbol| {
            Some(dotted(
                usize::try_from(lib.version_by_pointer(symbol)?).ok()?,
                10_000,
            ))
        },
    },
];

/// `22809` → `2.28.9`: two digits each for minor and patch, but one for minor below `wide`, as in older releases.
fn dotted(version: usize, wide: usize) -> String {
    let major_unit = if version < wide { 1_000 } else { 10_000 };
    format!(
        "{}.{}.{}",
        version / major_unit,
        version % major_unit / 100,
        version % 100
    )
}

/// Looks for the libraries and asks the driver for its GPUs.
///
/// Folders are looked up under `root`. `use_loader` says whether to ask the loader first, as a run would; a test that
/// must not see this machine's libraries does not.
pub fn inspect(root: &Path, env: Env, use_loader: bool) -> Cuda {
    let places = places(root, env);
    let mut libraries = Vec::new();
    let (mut gpus, mut gpu_error) = (Vec::new(), None);
    for wanted in &WANTED {
        let (found, open) = find(wanted, &places, use_loader);
        if let Some(driver) = open.filter(|_| wanted.name == "libcuda.so") {
            match driver.gpus() {
                Ok(list) => gpus = list,
                Err(error) => gpu_error = Some(error),
            }
        }
        libraries.push(found);
    }
    let loader = "the loader's path".to_owned();
    Cuda {
        libraries,
        gpus,
        gpu_error,
        device_nodes: device_nodes(root),
        looked_in: std::iter::once(loader)
            .chain(places.into_iter().map(|p| p.words))
            .collect(),
    }
}

fn find(wanted: &Wanted, places: &[Place], use_loader: bool) -> (CudaLibrary, Option<Library>) {
    let mut found = CudaLibrary {
        name: wanted.name,
        path: None,
        version: None,
        broken: Vec::new(),
    };
    let by_name = wanted
        .sonames
        .iter()
        .filter(|_| use_loader)
        .map(PathBuf::from);
    let files = places
        .iter()
        .flat_map(|place| &place.folders)
        .flat_map(|folder| versions_of(wanted.name, folder));
    for candidate in by_name.chain(files) {
        match Library::open(&candidate.to_string_lossy()) {
            Ok(library) => {
                found.version = (wanted.version)(&library, wanted.version_symbol);
                found.path = Some(library.file(wanted.version_symbol).unwrap_or(candidate));
                return (found, Some(library));
            }
            // A name that the loader does not know is no news; a file that is there and does not open is.
            Err(error) if candidate.is_absolute() => found.broken.push(error),
            Err(_) => {}
        }
    }
    (found, None)
}

/// `/dev/nvidia0` and its like, by number.
fn device_nodes(root: &Path) -> Vec<PathBuf> {
    let number = |path: &PathBuf| -> Option<u32> {
        path.file_name()?
            .to_str()?
            .strip_prefix("nvidia")?
            .parse()
            .ok()
    };
    let mut nodes: Vec<PathBuf> = entries(&root.join("dev"))
        .into_iter()
        .filter(|p| number(p).is_some())
        .collect();
    nodes.sort_by_key(number);
    nodes
        .into_iter()
        .map(|node| Path::new("/").join(node.strip_prefix(root).unwrap_or(&node)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{folder, shared_library};
    use super::*;

    fn nothing(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn a_machine_without_anything_is_looked_through_and_named() {
        let cuda = inspect(folder(&[]).path(), &nothing, false);
        assert!(
            cuda.libraries
                .iter()
                .all(|l| l.path.is_none() && l.broken.is_empty())
        );
        assert!(cuda.gpus.is_empty() && cuda.gpu_error.is_none() && cuda.device_nodes.is_empty());
        assert!(
            cuda.looked_in.contains(&"CUDA_HOME (not set)".to_owned()),
            "{:?}",
            cuda.looked_in
        );
        assert!(
            cuda.looked_in.contains(&"/usr/local/cuda*".to_owned()),
            "{:?}",
            cuda.looked_in
        );
    }

    #[test]
    fn a_file_that_is_no_library_is_reported_and_passed_over() {
        let root = folder(&[("usr/local/cuda-12.8/lib64/libnvrtc.so.12", "not a library")]);
        let cuda = inspect(root.path(), &nothing, false);
        let nvrtc = &cuda.libraries[2];
        assert_eq!((nvrtc.name, nvrtc.path.as_ref()), ("libnvrtc.so", None));
        assert!(
            nvrtc.broken.len() == 1 && nvrtc.broken[0].contains("libnvrtc.so.12"),
            "{:?}",
            nvrtc.broken
        );
    }

    const DRIVER: &str = r#"
        #include <string.h>
        int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
        int cuInit(unsigned flags) { return flags; }
        int cuDeviceGetCount(int *n) { *n = 2; return 0; }
        int cuDeviceGet(int *device, int i) { *device = i + 40; return 0; }
        int cuDeviceGetName(char *name, int len, int device) { memset(name, 'A' + device - 40, len); return 0; }
        int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = device; return 0; }
        int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }
    "#;

    #[test]
    fn a_driver_is_opened_and_asked_for_its_gpus() {
        let root = folder(&[
            ("dev/nvidia10", ""),
            ("dev/nvidia2", ""),
            ("dev/nvidiactl", ""),
        ]);
        shared_library(root.path(), "opt/cuda/lib64/libcuda.so.1", DRIVER);
        let env = |name: &str| (name == "CUDA_HOME").then(|| "/opt/cuda".to_owned());
        let cuda = inspect(root.path(), &env, false);
        assert_eq!(cuda.libraries[0].version.as_deref(), Some("12.8"));
        assert_eq!(
            cuda.libraries[0].path.as_deref(),
            Some(root.path().join("opt/cuda/lib64/libcuda.so.1").as_path())
        );
        assert_eq!(cuda.gpus.len(), 2, "{:?}", cuda.gpu_error);
        // A name that fills the buffer still ends.
        assert_eq!(cuda.gpus[1].name, "B".repeat(255));
        assert_eq!(
            (
                cuda.gpus[1].memory,
                cuda.gpus[1].compute_capability.as_str()
            ),
            (41, "9.0")
        );
        assert_eq!(
            cuda.device_nodes,
            [Path::new("/dev/nvidia2"), Path::new("/dev/nvidia10")]
        );
    }

    #[test]
    fn a_driver_that_refuses_is_quoted() {
        let refuses = r#"
            int cuInit(unsigned flags) { return 100; }
            int cuDeviceGetCount(int *n) { return 1; }
            int cuDeviceGet(int *d, int i) { return 1; }
            int cuDeviceGetName(char *n, int l, int d) { return 1; }
            int cuDeviceTotalMem_v2(unsigned long *b, int d) { return 1; }
            int cuDeviceGetAttribute(int *v, int w, int d) { return 1; }
            int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
        "#;
        for (source, expected) in [
            (refuses, "cuInit: CUDA_ERROR_NO_DEVICE"),
            ("int unrelated;", "it has no cuInit"),
        ] {
            let root = folder(&[]);
            shared_library(root.path(), "usr/local/nvidia/lib64/libcuda.so.1", source);
            let cuda = inspect(root.path(), &nothing, false);
            assert_eq!(cuda.gpu_error.as_deref(), Some(expected));
            assert_eq!(
                (cuda.gpus.len(), cuda.libraries[0].version.as_ref()),
                (0, None)
            );
        }
    }

    #[test]
    fn pip_s_libraries_are_found_in_each_environment_and_the_newest_is_taken() {
        let packages = "lib/python3.12/site-packages/nvidia";
        for (prefix, variable, value) in [
            ("venv", "VIRTUAL_ENV", "/venv"),
            ("conda", "CONDA_PREFIX", "/conda"),
            ("some/python", "PATH", "/nowhere:/some/python/bin"),
            (
                "pyenv/versions/3.12.1",
                "PATH",
                "/pyenv/shims:/some/python/bin",
            ),
        ] {
            let root = folder(&[("some/python/bin/python3", ""), ("pyenv/shims/python", "")]);
            let file = |name: &str| format!("{prefix}/{packages}/{name}");
            shared_library(
                root.path(),
                &file("nccl/lib/libnccl.so.2"),
                "int ncclGetVersion(int *v) { *v = 22809; return 0; }",
            );
            shared_library(
                root.path(),
                &file("cu13/lib/libnvrtc.so.13"),
                "int nvrtcVersion(int *a, int *b) { *a = 13; *b = 1; return 0; }",
            );
            let lt = |v: u32| format!("unsigned long cublasLtGetVersion(void) {{ return {v}; }}");
            shared_library(
                root.path(),
                &file("cublas/lib/libcublasLt.so.12"),
                &lt(120803),
            );
            shared_library(root.path(), &file("cublas/lib/libcublasLt.so.9"), &lt(9000));
            let env = |name: &str| (name == variable).then(|| value.to_owned());
            let cuda = inspect(root.path(), &env, false);
            let versions: Vec<_> = cuda
                .libraries
                .iter()
                .map(|l| l.version.as_deref())
                .collect();
            assert_eq!(
                versions,
                [None, Some("12.8.3"), Some("13.1"), Some("2.28.9")],
                "{variable}"
            );
        }
    }

    #[test]
    fn versions_are_told_as_people_write_them() {
        assert_eq!(dotted(130_100, 100_000), "13.1.0");
        assert_eq!(dotted(11_403, 100_000), "11.4.3");
        assert_eq!(dotted(2_804, 10_000), "2.8.4");
    }
}
