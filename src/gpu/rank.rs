//! One GPU rank from its parts: a device, its libraries, its weights, ready to step.

use super::backend::{GpuBackend, GpuBuf};
use super::cache::Cache;
use super::collective::{DeviceCollective, Solo};
use super::cublaslt::CublasLt;
use super::cuda::Cuda;
use super::driver::{Driver, Stream};
use super::gemm::Gemm;
use super::kernels;
use super::load::{self, GpuWeight};
use super::nccl::{Library, Nccl, UniqueId};
use super::offload::{Cores, FileSource, Offload};
use super::one_shot::{OneShot, exchange_bytes, ranks_agree};
use crate::comm::HostCollective;
use crate::config::ModelConfig;
use crate::layout::{Geometry, Limits, Placement, Shard};
use crate::model::{Activations, Qwen};
use crate::weights::{Dtype, LoadStats, Source};
use crate::{Error, Result};
use std::sync::Arc;
use std::thread::JoinHandle;

/// What a rank's backend is made of.
pub struct Parts {
    /// The device.
    pub driver: Arc<dyn Driver>,
    /// Large products on it.
    pub gemm: Box<dyn Gemm>,
    /// The other ranks.
    pub comm: Box<dyn DeviceCollective>,
    /// All work goes here.
    pub stream: Stream,
}

/// A rank's device, and the rest of its [`Parts`] on their way: libraries take a second to open and ranks to meet, which
/// passes while the weights load.
pub struct Coming {
    driver: Arc<dyn Driver>,
    stream: Stream,
    rest: Rest,
}

enum Rest {
    Here(Parts),
    Coming(JoinHandle<Result<Parts>>),
}

impl From<Parts> for Coming {
    fn from(parts: Parts) -> Coming {
        Coming {
            driver: parts.driver.clone(),
            stream: parts.stream,
            rest: Rest::Here(parts),
        }
    }
}

impl Coming {
    /// Begins [`Parts::cuda`] on a thread of its own. When the caller fails meanwhile, that thread is left alone: it may
    /// be waiting for a rank that never comes.
    ///
    /// # Errors
    /// Those of the device.
    pub fn cuda(
        device: Cuda,
        ranks: Option<Box<dyn HostCollective>>,
        hidden: usize,
    ) -> Result<Coming> {
        let driver: Arc<dyn Driver> = Arc::new(device);
        let stream = driver.create_stream()?;
        let on_it = driver.clone();
        let coming = std::thread::Builder::new()
            .name("libraries".into())
            .spawn(move || Parts::on(on_it, stream, ranks, hidden))
            .map_err(|e| Error::failed(format_args!("a thread for the libraries: {e}")))?;
        Ok(Coming {
            driver,
            stream,
            rest: Rest::Coming(coming),
        })
    }

    /// Waits for the rest, and measures which way the sums over ranks take: the weights are there, nothing else runs.
    ///
    /// # Errors
    /// Those of [`Parts::cuda`].
    fn wait(self) -> Result<Parts> {
        let thread = match self.rest {
            Rest::Here(parts) => return Ok(parts),
            Rest::Coming(thread) => thread,
        };
        let panicked = |_| {
            Err(Error::failed(
                "internal error: opening the libraries panicked",
            ))
        };
        let mut parts = thread.join().unwrap_or_else(panicked)?;
        parts.comm.measure(parts.stream)?;
        Ok(parts)
    }
}

/// A peer that does not answer for this long is lost.
const TIMEOUT_MS: u32 = 8_000;

impl Parts {
    /// A device and its libraries; `ranks` is the way to the other ranks, `None` for one rank alone.
    ///
    /// `hidden` is the width of the residual stream, whose sums over ranks go over peer memory where they can.
    ///
    /// # Errors
    /// A library that is missing or too old, on any rank, or ranks that do not meet.
    pub fn cuda(
        device: Cuda,
        ranks: Option<Box<dyn HostCollective>>,
        hidden: usize,
    ) -> Result<Parts> {
        Coming::cuda(device, ranks, hidden)?.wait()
    }

    fn on(
        driver: Arc<dyn Driver>,
        stream: Stream,
        ranks: Option<Box<dyn HostCollective>>,
        hidden: usize,
    ) -> Result<Parts> {
        std::thread::scope(|scope| {
            let sources = kernels::of_a_run(driver.properties().compute);
            let on_it = driver.clone();
            let prepare = move || on_it.prepare(&sources);
            // Where the system refuses a thread, kernels are compiled when they are asked for.
            let prepared = std::thread::Builder::new().spawn_scoped(scope, prepare);
            let parts = Parts::libraries(driver, stream, ranks, hidden)?;
            if let Ok(prepared) = prepared {
                let panicked = |_| Err(Error::failed("internal error: compiling panicked"));
                prepared.join().unwrap_or_else(panicked)?;
            }
            Ok(parts)
        })
    }

    fn libraries(
        driver: Arc<dyn Driver>,
        stream: Stream,
        ranks: Option<Box<dyn HostCollective>>,
        hidden: usize,
    ) -> Result<Parts> {
        // The libraries work in the thread's current context, which any call of the driver sets.
        driver.memory()?;
        let gemm = Box::new(CublasLt::open()?);
        let Some(mut ranks) = ranks else {
            let comm = Box::new(Solo(driver.clone()));
            return Ok(Parts {
                driver,
                gemm,
                comm,
                stream,
            });
        };
        // Only when it is there on every rank does anybody begin to wait for the others in it.
        let library = Library::open();
        if !ranks_agree(&mut *ranks, library.is_ok())? {
            let elsewhere = || Error::failed("NCCL is missing on another rank");
            return Err(library.err().unwrap_or_else(elsewhere));
        }
        let library = library?;
        let mine = if ranks.rank() == 0 {
            library.unique_id()?.0
        } else {
            [0; 128]
        };
        let ids = exchange_bytes(&mut *ranks, &mine)?;
        let id = UniqueId(std::array::from_fn(|i| ids[i]));
        let nccl = Nccl::join(library, id, ranks.rank(), ranks.size(), &*driver)?;
        let comm = OneShot::over(Box::new(nccl), &driver, ranks, hidden, TIMEOUT_MS, stream)?;
        Ok(Parts {
            driver,
            gemm,
            comm,
            stream,
        })
    }

    /// The stand-in `device`; as for [`Parts::cuda`] otherwise.
    ///
    /// # Errors
    /// Those of the stand-in.
    #[cfg(test)]
    pub fn standin(
        device: &Arc<super::standin::Standin>,
        ranks: Option<Box<dyn HostCollective>>,
        hidden: usize,
    ) -> Result<Parts> {
        use super::collective::{HostRanks, Shared};
        let driver: Arc<dyn Driver> = device.clone();
        let stream = driver.create_stream()?;
        let comm: Box<dyn DeviceCollective> = match ranks {
            None => Box::new(Solo(driver.clone())),
            Some(ranks) => {
                let ranks = Shared::new(ranks);
                let host = Box::new(HostRanks::new(device.clone(), ranks.clone()));
                let timeout_ms = device.patience().as_millis() as u32;
                OneShot::over(host, &driver, Box::new(ranks), hidden, timeout_ms, stream)?
            }
        };
        let gemm = Box::new(super::gemm::HostGemm(device.clone()));
        Ok(Parts {
            driver,
            gemm,
            comm,
            stream,
        })
    }
}

/// What the host holds and does for a rank; by default nothing.
#[derive(Default)]
pub struct Host {
    /// Which rows of every matrix lie where.
    pub placement: Placement,
    /// Whether any rank of the run has rows that are not on its GPU.
    pub on_any_rank: bool,
    /// What multiplies rows in host memory; `None` streams all of them.
    pub cores: Option<Cores>,
    /// The cores' part of what is in host memory; `None` measures it.
    pub share: Option<f64>,
    /// Where rows that are in no memory are read from.
    pub files: Option<FileSource>,
}

/// A loaded rank.
pub struct LoadedRank {
    /// Runs the forward pass.
    pub backend: GpuBackend,
    /// The weights by name.
    pub model: Qwen<GpuWeight>,
    /// The step buffers.
    pub activations: Activations<GpuBuf>,
    /// What the load took.
    pub stats: LoadStats,
    /// GB/s of the link and of the cores while both are at work, where that was measured.
    pub host_rates: Option<(f64, f64)>,
}

/// Loads one rank's slices and makes everything ready to step.
///
/// # Errors
/// A model that the kernels do not take, too little memory, or files that fail.
#[allow(
    clippy::too_many_arguments,
    reason = "each is another thing; a struct would only rename them"
)]
pub fn load_rank(
    config: &ModelConfig,
    source: Source<'_>,
    dtype: Dtype,
    shard: &Shard,
    limits: Limits,
    parts: impl Into<Coming>,
    host: Host,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<LoadedRank> {
    let geometry = Geometry::new(config, shard)?;
    let matrices = shard.matrices(config, dtype);
    if dtype != Dtype::Bf16 && shard.tp_rank == 0 {
        tracing::warn!("the checkpoint is {dtype}; on the GPU its weights are rounded to bf16");
    }
    let parts = parts.into();
    let loaded = load::load(
        &parts.driver,
        source,
        &matrices,
        &geometry,
        &host.placement,
        threads,
        parts.stream,
        progress,
    )?;
    let (memory, weights, stats) = (loaded.memory, loaded.weights, loaded.stats);
    let model = Qwen::assemble(config, |name| load::take(&weights, name))?;
    let mut parts = parts.wait()?;
    let offload = loaded.host.map(|(locked, elsewhere)| {
        let (driver, stream) = (&parts.driver, parts.stream);
        Offload::new(driver, stream, locked, elsewhere, host.cores, host.files)
    });
    let mut offload = offload.transpose()?;
    if host.on_any_rank {
        // The ranks of a node share its memory: a rank that measured alone would find what it will never have.
        parts.comm.meet()?;
    }
    let host_rates = match (&mut offload, host.share) {
        (None, _) => None,
        (Some(offload), Some(share)) => offload.set_share(share).map(|()| None)?,
        (Some(offload), None) => offload.balance()?,
    };
    let (mut backend, activations) =
        GpuBackend::new(config, geometry, limits, parts, memory, offload)?;
    backend.steps_offload |= host.on_any_rank;
    Ok(LoadedRank {
        backend,
        model,
        activations,
        stats,
        host_rates,
    })
}

impl LoadedRank {
    /// What is taken where, now: `9.21 GiB of the GPU (all processes), 4.10 GiB of host memory locked, 1.00 GiB in files`.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn memory_line(&self) -> Result<String> {
        let memory = self.backend.driver.memory()?;
        let (locked, in_files) = self.backend.offload.as_ref().map_or((0, 0), Offload::bytes);
        let size = |n: usize| crate::bytes::format(n as u64);
        Ok(format!(
            "{} of the GPU (all processes), {} of host memory locked, {} in files",
            crate::bytes::format(memory.total - memory.free),
            size(locked),
            size(in_files)
        ))
    }
}

/// `tandem kernels build`: fills the user's cache for architectures such as `sm_80`, without a GPU.
///
/// # Errors
/// No cache folder can be found, or those of [`kernels::build`].
pub fn build_kernels(archs: &[String]) -> Result<(usize, Cache)> {
    let nowhere = || Error::failed("no folder for compiled kernels: set XDG_CACHE_HOME or HOME");
    let cache = Cache::of_user().ok_or_else(nowhere)?;
    kernels::build(archs, &cache).map(|n| (n, cache))
}
