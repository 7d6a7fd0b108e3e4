//! Where a rank computes: on the GPU that it is given, or on CPU cores.

use crate::cli::Device;
use crate::cpu::Isa;
use crate::gpu::cache::Cache;
use crate::gpu::cuda::{Cuda, device_count};
use crate::gpu::{Driver, libraries};
use crate::plan::{DEFAULT_SM_COUNT, DeviceKind, GPU_CONTEXT_BYTES};
use crate::world::{Hello, World};
use crate::{Error, Result};

/// What this rank's process was given to compute on.
pub(super) enum Site {
    Cpu,
    Gpu(Box<Cuda>),
}

/// Device memory that the default budget leaves free, for what other processes may take meanwhile. What the driver and
/// the libraries take for this process is in the plan itself ([`crate::plan::GPU_RUNTIME_BYTES`]).
const GPU_RESERVE: u64 = 256 << 20;

/// Host memory of each GPU rank besides what the plan counts and every process has: the driver's and the libraries' own.
const CUDA_HOST_RESERVE: u64 = 768 << 20;

impl Site {
    /// The device that was asked for; `auto` takes a GPU where there is one that works.
    ///
    /// # Errors
    /// `cuda` without a usable GPU: what is missing and where it was looked for.
    pub fn choose(wanted: Device, world: &World) -> Result<Site> {
        match wanted {
            Device::Cpu => Ok(Site::Cpu),
            Device::Cuda => Site::gpu(world),
            Device::Auto => match device_count() {
                Ok(n) if n > 0 => Site::gpu(world).or_else(|e| {
                    tracing::warn!("the CPU computes, because the GPU cannot: {e}");
                    Ok(Site::Cpu)
                }),
                _ => Ok(Site::Cpu),
            },
        }
    }

    fn gpu(world: &World) -> Result<Site> {
        let ordinal = ordinal(world, device_count()?)?;
        for library in [libraries::NVRTC, libraries::CUBLASLT] {
            library.open()?;
        }
        Ok(Site::Gpu(Box::new(Cuda::open(ordinal, Cache::of_user())?)))
    }

    pub fn kind(&self) -> DeviceKind {
        match self {
            Site::Cpu => DeviceKind::Cpu,
            Site::Gpu(_) => DeviceKind::Cuda,
        }
    }

    /// Multiprocessors of its GPU; what a plan assumes where there is none.
    pub fn sm_count(&self) -> usize {
        match self {
            Site::Cpu => DEFAULT_SM_COUNT,
            Site::Gpu(cuda) => cuda.properties().sm_count as usize,
        }
    }

    /// What the other ranks are told of it; on the CPU the memory is shared by the `local_size` ranks of this machine.
    pub fn describe(&self, hello: Hello, local_size: usize) -> Hello {
        let host = crate::doctor::host_memory();
        let hello = Hello {
            memory_limit: host.cgroup_limit,
            ..hello
        };
        let host_memory = host.budget(local_size).unwrap_or(u64::MAX);
        match self {
            Site::Cpu => Hello {
                device: format!("cpu ({})", Isa::detect()),
                memory: host_memory,
                host_memory,
                ..hello
            },
            Site::Gpu(cuda) => {
                let uuid = cuda
                    .properties()
                    .uuid
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                // The context exists already and is no longer free, but the plan counts it as this process's own.
                let free = cuda.memory().map_or(0, |m| m.free);
                let own = if free > 0 { GPU_CONTEXT_BYTES } else { 0 };
                let libraries = CUDA_HOST_RESERVE.saturating_mul(local_size as u64);
                Hello {
                    device: format!("{} (GPU {})", cuda.properties().name, cuda.ordinal()),
                    gpu_uuid: Some(uuid),
                    memory: (free + own).saturating_sub(GPU_RESERVE),
                    host_memory: host_memory.saturating_sub(libraries),
                    ..hello
                }
            }
        }
    }
}

/// Which of the visible GPUs is this rank's: a launcher that isolates GPUs shows each rank one, and it is number 0.
fn ordinal(world: &World, visible: usize) -> Result<usize> {
    let local_rank = world.local_rank.unwrap_or(world.rank);
    match visible {
        0 => Err(Error::failed(
            "no GPU is visible to this process; --device cpu runs without",
        )),
        1 => Ok(0),
        n if local_rank < n => Ok(local_rank),
        n => Err(Error::failed(format!(
            "rank {} is number {local_rank} (from 0) on its machine, which has {n} GPUs: start at most {n} ranks there",
            world.rank
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_never_indexed_by_rank_where_one_is_visible() {
        let world = |rank, local_rank| World {
            rank,
            local_rank,
            ..World::alone()
        };
        assert_eq!(ordinal(&world(3, Some(3)), 1).unwrap(), 0);
        assert_eq!(ordinal(&world(9, Some(1)), 4).unwrap(), 1);
        assert_eq!(ordinal(&world(2, None), 4).unwrap(), 2);
        let e = ordinal(&world(6, Some(2)), 2).unwrap_err().to_string();
        assert!(e.contains("at most 2 ranks"), "{e}");
        assert!(
            ordinal(&world(0, Some(0)), 0)
                .unwrap_err()
                .to_string()
                .contains("--device cpu")
        );
    }
}
