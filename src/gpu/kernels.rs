//! The kernels: CUDA C++ in the binary, compiled by NVRTC for the GPU at hand, kept as cubins in a cache.

use super::cache::{Cache, fnv1a};
use super::nvrtc::{ARCHITECTURE, Nvrtc};
use crate::{Error, Result};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One `.cu` file.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// File name without `.cu`.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
}

/// A file that kernels include.
#[derive(Debug)]
pub struct Header {
    /// File name.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source {
            name: $name,
            text: include_str!(concat!("../../kernels/", $name, ".cu")),
        }
    };
}

macro_rules! header {
    ($name:literal) => {
        Header {
            name: concat!($name, ".cuh"),
            text: include_str!(concat!("../../kernels/", $name, ".cuh")),
        }
    };
}

/// What the kernels include.
pub const HEADERS: &[Header] = &[
    header!("common"),
    header!("gemv_out"),
    header!("rope"),
    header!("rows"),
    header!("softmax"),
    header!("wgmma"),
];

/// RMSNorm behind the residual add.
pub static NORM: Source = source!("norm");
/// The embedding's rows.
pub static EMBED: Source = source!("embed");
/// Products for one to three rows, and for up to eight with weights in the order of host memory.
pub static GEMV: Source = source!("gemv");
/// Products for four to eight rows.
pub static GEMV_BATCH: Source = source!("gemv_batch");
/// What follows the q/k/v product.
pub static QKV: Source = source!("qkv");
/// Element-wise work around large products.
pub static ACTIVATION: Source = source!("activation");
/// Attention of many tokens a sequence.
pub static ATTENTION_PREFILL: Source = source!("attention_prefill");
/// The same on Hopper's own products.
pub static ATTENTION_PREFILL_WGMMA: Source = source!("attention_prefill_wgmma");
/// Attention of one token a sequence.
pub static ATTENTION_DECODE: Source = source!("attention_decode");

/// Greedy choice.
pub static SAMPLE: Source = source!("sample");
/// The hand-over of products to the host's cores.
pub static HANDOVER: Source = source!("handover");
/// The most likely tokens.
pub static CANDIDATES: Source = source!("candidates");
/// One-shot all-reduce over peer memory.
pub static ALL_REDUCE: Source = source!("all_reduce");
/// How fast memory is read; measures, and is no part of the forward pass.
pub static READ: Source = source!("read");

/// Every kernel file.
pub static SOURCES: &[&Source] = &[
    &NORM,
    &EMBED,
    &GEMV,
    &GEMV_BATCH,
    &QKV,
    &ACTIVATION,
    &ATTENTION_PREFILL,
    &ATTENTION_PREFILL_WGMMA,
    &ATTENTION_DECODE,
    &SAMPLE,
    &HANDOVER,
    &CANDIDATES,
    &ALL_REDUCE,
    &READ,
];

/// What a run on a device of this compute capability may ask for.
pub fn of_a_run(compute: (u32, u32)) -> Vec<&'static Source> {
    let hopper = compute == (9, 0);
    let wanted =
        |s: &&Source| s.name != READ.name && (hopper || s.name != ATTENTION_PREFILL_WGMMA.name);
    SOURCES.iter().copied().filter(wanted).collect()
}

/// Options besides the architecture; part of the cache's key.
pub const OPTIONS: &[&str] = &[
    "-std=c++17",
    "--device-as-default-execution-space",
    "-lineinfo",
];

/// The architecture to compile for: the one with every instruction where a compute capability has such a variant.
pub fn architecture(compute: (u32, u32)) -> String {
    let (major, minor) = compute;
    let all = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{all}")
}

/// Compiled kernels of one architecture, made when they are not in the cache.
pub struct Compiler {
    arch: String,
    cache: Option<Cache>,
    nvrtc: OnceLock<Nvrtc>,
}

impl Compiler {
    /// A compiler for `arch`; NVRTC is opened when something is not in the cache.
    pub fn new(arch: String, cache: Option<Cache>) -> Compiler {
        Compiler {
            arch,
            cache,
            nvrtc: OnceLock::new(),
        }
    }

    /// The cubin of a source.
    ///
    /// # Errors
    /// No NVRTC, or one that refuses the source or the architecture. A cache that cannot be written is only a warning.
    pub fn cubin(&self, source: &Source) -> Result<Vec<u8>> {
        let name = self.entry(source);
        if let Some(cubin) = self.cache.as_ref().and_then(|c| c.get(&name)) {
            return Ok(cubin);
        }
        tracing::info!("compiling {}.cu for {}", source.name, self.arch);
        let cubin = self.nvrtc()?.compile(source, HEADERS, &self.options())?;
        if let Some(cache) = &self.cache
            && let Err(e) = cache.put(&name, &cubin)
        {
            tracing::warn!("{e}: kernels are compiled anew in every run");
        }
        Ok(cubin)
    }

    /// Whether anything had to be compiled.
    pub fn has_opened_nvrtc(&self) -> bool {
        self.nvrtc.get().is_some()
    }

    fn nvrtc(&self) -> Result<&Nvrtc> {
        if let Some(nvrtc) = self.nvrtc.get() {
            return Ok(nvrtc);
        }
        let opened = Nvrtc::open()?;
        Ok(self.nvrtc.get_or_init(|| opened))
    }

    fn options(&self) -> Vec<String> {
        let arch = format!("{ARCHITECTURE}{}", self.arch);
        std::iter::once(arch)
            .chain(OPTIONS.iter().map(|o| o.to_string()))
            .collect()
    }

    /// A name that changes with everything that the cubin depends on but NVRTC's version: what one NVRTC made, another
    /// need not make again, and a machine whose cache was filled beforehand needs none at all.
    fn entry(&self, source: &Source) -> String {
        let options = self.options();
        let mut parts: Vec<&[u8]> = vec![source.text.as_bytes()];
        parts.extend(
            HEADERS
                .iter()
                .flat_map(|h| [h.name.as_bytes(), h.text.as_bytes()]),
        );
        parts.extend(options.iter().map(|o| o.as_bytes()));
        format!("{}-{}-{:016x}.cubin", source.name, self.arch, fnv1a(&parts))
    }
}

/// Fills the cache for architectures such as `sm_80` and `sm_90a`; needs NVRTC and no GPU. Returns the kernel files made.
///
/// # Errors
/// An architecture that is not one, no cache folder, or what [`Compiler::cubin`] says.
pub fn build(archs: &[String], cache: &Cache) -> Result<usize> {
    for arch in archs {
        let digits = arch
            .strip_prefix("sm_")
            .map(|a| a.trim_end_matches(['a', 'f']));
        if !digits
            .is_some_and(|d| (2..=3).contains(&d.len()) && d.bytes().all(|b| b.is_ascii_digit()))
        {
            return Err(Error::usage(format_args!(
                "--arch {arch}: not an architecture such as sm_80 or sm_90a"
            )));
        }
    }
    for arch in archs {
        let compiler = Compiler::new(arch.clone(), Some(cache.clone()));
        side_by_side(SOURCES, |source| {
            compiler.cubin(source)?;
            match cache.get(&compiler.entry(source)) {
                Some(_) => Ok(()),
                None => Err(Error::file(
                    cache.dir(),
                    "the compiled kernels could not be stored",
                )),
            }
        })?;
    }
    Ok(archs.len() * SOURCES.len())
}

/// Does `f` to every source on as many threads as there are cores, to the longest first; the first error in the order of
/// `sources`.
///
/// # Errors
/// Those of `f`.
pub fn side_by_side(
    sources: &[&'static Source],
    f: impl Fn(&'static Source) -> Result<()> + Sync,
) -> Result<()> {
    let mut longest_first: Vec<usize> = (0..sources.len()).collect();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(sources[i].text.len()));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut errors = Vec::new();
        while let Some(&i) = longest_first.get(next.fetch_add(1, Ordering::Relaxed)) {
            errors.extend(f(sources[i]).err().map(|e| (i, e)));
        }
        errors
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let errors = std::thread::scope(|scope| {
        // A thread that the system refuses is no reason to fail: this one works too.
        let start = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads.min(sources.len())).map_while(start).collect();
        let mut errors = work();
        for thread in others {
            errors.extend(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        errors
    });
    let first = errors.into_iter().min_by_key(|(i, _)| *i);
    first.map_or(Ok(()), |(_, e)| Err(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn side_by_side_takes_every_source_once_and_gives_the_first_error() {
        let seen = Mutex::new(Vec::new());
        let visit = |source: &'static Source| {
            seen.lock().unwrap().push(source.name);
            match source.name {
                "gemv" | "sample" => Err(Error::failed(source.name)),
                _ => Ok(()),
            }
        };
        assert!(side_by_side(&[], visit).is_ok());
        let e = side_by_side(SOURCES, visit).unwrap_err();
        assert_eq!(e.to_string(), "gemv");
        let mut seen = seen.into_inner().unwrap();
        let mut all: Vec<_> = SOURCES.iter().map(|s| s.name).collect();
        seen.sort_unstable();
        all.sort_unstable();
        assert_eq!(seen, all);
    }

    #[test]
    fn a_run_prepares_what_its_device_can_use() {
        let names = |compute| of_a_run(compute).iter().map(|s| s.name).collect::<Vec<_>>();
        let (hopper, ampere) = (names((9, 0)), names((8, 0)));
        assert!(hopper.contains(&"attention_prefill_wgmma") && hopper.contains(&"gemv"));
        assert!(
            !ampere.contains(&"attention_prefill_wgmma") && ampere.contains(&"attention_prefill")
        );
    }
}
