//! The GPU path: one small driver interface, the kernels, and the forward pass's operations over them.
//!
//! Everything that runs on the device goes through [`Driver`]; the CUDA driver is one implementation of it, the stand-in
//! that runs on the CPU for tests the other.

pub mod arena;
mod attention;
mod backend;
pub mod cache;
mod candidates;
mod chain;
pub mod collective;
pub mod cublaslt;
pub mod cuda;
pub mod driver;
pub mod gemm;
mod graphs;
pub mod kernels;
mod launch;
pub mod libraries;
pub mod load;
pub mod memory;
pub mod nccl;
pub mod nvrtc;
pub mod offload;
mod one_shot;
pub mod probe;
mod products;
mod rank;
pub mod regions;
mod sampling;
#[cfg(test)]
pub mod standin;
mod step;
mod warm;
pub mod ways;

#[cfg(test)]
mod tests;

pub use backend::{GpuBackend, GpuBuf};
pub use driver::Driver;
pub use offload::Cores;
pub use rank::{Coming, Host, LoadedRank, Parts, build_kernels, load_rank};
