//! The CPU as a device: a thread pool and the kernels of a forward pass, vectorised at run time for the machine.
//!
//! In the order in which one reads them:
//! - [`topology`]: which CPUs this process may use, and how ranks on one host share them
//! - [`pool`]: fork-join threads, one a CPU
//! - [`isa`]: which instruction set runs, and the one place that enters it
//! - `simd`: the vector operations that kernels are written in, with one file an instruction set
//! - `tile`: the register-blocked product at the heart of GEMM and attention
//! - [`matmul`]: `y = x·Wᵀ`, streaming (`gemv`, a few rows) or blocked (`gemm`, many), and its fused SwiGLU
//! - [`norm`], [`rope`], [`attention`], [`mod@embed`]: the rest of a layer
//! - `backend`: all of it as the forward pass asks for it ([`crate::model::Backend`])
//! - [`bandwidth`]: the ceilings that the kernels are measured against
//!
//! All activations are `f32`, row-major. Shapes are the caller's contract: a slice of the wrong length is a
//! programming error and panics before any kernel runs.

pub mod attention;
mod backend;
pub mod bandwidth;
pub mod embed;
pub mod isa;
pub mod matmul;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod topology;

mod gemm;
mod gemv;
mod scratch;
mod simd;
#[cfg(test)]
mod testing;
mod tile;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
#[cfg(target_arch = "x86_64")]
mod simd_avx512;
mod simd_portable;

pub use attention::{AttentionShape, SeqView};
pub use backend::{CpuBackend, HostBuf, HostWeight};
pub use bandwidth::{ReadBuffer, STREAMS, measure_fma_rate, measure_read_bandwidth};
pub use embed::embed;
pub use isa::Isa;
pub use matmul::{Kernels, Matrix, few_rows};
pub use norm::add_rms_norm;
pub use pool::Pool;
pub use rope::{QkvShape, Rope, qkv_epilogue};
pub use topology::{affinity_cpus, oversubscribed, physical_cores, share_of_cpus};
