//! What this machine offers a run, what is missing, and what that costs.
//!
//! Everything is looked at, nothing is required: on a machine without anything the report is short of good news, not an
//! error.

pub mod cpu;
pub mod cuda;
mod driver;
pub mod launcher;
pub mod memory;
mod search;
mod text;

pub use memory::HostMemory;

use crate::bytes;
use crate::cpu::Isa;
use cuda::Cuda;
use launcher::{Env, Launcher};
use serde::Serialize;
use std::path::Path;

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// This tandem.
    pub version: &'static str,
    /// Built with the feature `mpi`.
    pub mpi: bool,
    /// The CPU.
    pub cpu: cpu::Cpu,
    /// The instruction set whose kernels run here.
    pub kernels: String,
    /// Host memory.
    pub memory: HostMemory,
    /// What a plan takes for the host memory of one rank where no flag says it, in bytes.
    pub default_host_budget: Option<u64>,
    /// Who started this process.
    pub launcher: Launcher,
    /// CUDA libraries and GPUs.
    pub cuda: Cuda,
    /// What is missing or in the way and what that costs, a line each.
    pub missing: Vec<String>,
}

/// Inspects this machine.
pub fn inspect() -> Report {
    inspect_at(Path::new("/"), &|name| std::env::var(name).ok(), true)
}

/// The report for a person.
pub fn text(report: &Report) -> String {
    report.to_string()
}

/// Host memory alone, for the budget of a plan ([`HostMemory::budget`]).
pub fn host_memory() -> HostMemory {
    memory::host_limit()
}

/// [`inspect`] with files looked up under `root`, variables by `env`, and libraries through the loader only if told to.
pub fn inspect_at(root: &Path, env: Env, use_loader: bool) -> Report {
    let memory = memory::host_limit_at(root);
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        mpi: cfg!(feature = "mpi"),
        cpu: cpu::inspect(root),
        kernels: Isa::detect().to_string(),
        default_host_budget: memory.budget(1),
        memory,
        launcher: launcher::inspect(env),
        cuda: cuda::inspect(root, env, use_loader),
        missing: Vec::new(),
    };
    report.missing = host_lines(&report)
        .into_iter()
        .chain(cuda_lines(&report.cuda))
        .chain(world_lines(&report))
        .collect();
    report
}

fn host_lines(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    let (cpu, memory) = (&report.cpu, &report.memory);
    if report.kernels == Isa::Portable.to_string() {
        lines.push(
            "no AVX2 with FMA and F16C: the portable kernels run, several times slower".to_owned(),
        );
    }
    if cpu.allowed > 0 && cpu.allowed < cpu.online {
        lines.push(format!(
            "the affinity mask allows {} of {} CPUs: the thread pool takes no more (srun: --cpus-per-task)",
            cpu.allowed, cpu.online
        ));
    }
    if let (Some(limit), Some(path)) = (memory.cgroup_limit, &memory.cgroup_path)
        && limit < memory.total
    {
        lines.push(format!(
            "the control group {} allows {} of the machine's {}: plans keep to that (Slurm: --mem)",
            path.display(),
            bytes::format(limit),
            bytes::format(memory.total),
        ));
    }
    lines
}

fn cuda_lines(cuda: &Cuda) -> Vec<String> {
    let mut lines = Vec::new();
    let looked = format!("looked in {}", cuda.looked_in.join(", "));
    for library in &cuda.libraries {
        lines.extend(
            library
                .broken
                .iter()
                .map(|error| format!("a library does not open: {error}")),
        );
    }
    let missing = |name: &str| {
        cuda.libraries
            .iter()
            .any(|l| l.name == name && l.path.is_none())
    };
    let nodes = cuda.device_nodes.len();
    if missing("libcuda.so") {
        lines.push(format!(
            "no libcuda.so.1 ({looked}): no GPU; the CPU ranks run everything"
        ));
        if nodes > 0 {
            lines.push(format!(
                "GPU nodes in /dev ({nodes}) but no driver library: a container needs its runtime's GPU option (--gpus, --nv)"
            ));
        }
        return lines;
    }
    match &cuda.gpu_error {
        Some(error) => lines.push(format!(
            "the driver shows no GPU ({error}): the CPU ranks run everything"
        )),
        None if cuda.gpus.is_empty() => {
            lines.push("the driver shows no GPU: the CPU ranks run everything".to_owned())
        }
        None => {}
    }
    let costs = [
        ("libcublasLt.so", "no large GEMM on the GPU"),
        ("libnvrtc.so", "GPU kernels must come prebuilt from a cache"),
        (
            "libnccl.so",
            "no all-reduce between GPUs of several nodes, or without peer access",
        ),
    ];
    let absent = costs.iter().filter(|(name, _)| missing(name));
    for (i, (name, cost)) in absent.enumerate() {
        let looked = if i == 0 {
            &looked
        } else {
            "looked in the same places"
        };
        lines.push(format!("no {name} ({looked}): {cost}"));
    }
    lines
}

fn world_lines(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(report.launcher.problem.clone());
    if !report.mpi {
        lines.push("built without the feature mpi: ranks meet over TCP, which needs open ports between nodes".to_owned());
    }
    lines
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
