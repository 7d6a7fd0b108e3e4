//! **tandem** runs a Qwen model across all the GPUs, or CPU ranks, of an allocation: one process each,
//! every process holding its column or row slice of every layer.
//!
//! The modules, in the order in which a request meets them:
#![warn(missing_docs)]

pub mod comm;
pub mod config;
pub mod cpu;
pub mod error;
pub mod plan;
pub mod text;
pub mod weights;
pub mod world;

pub use error::{Error, Result};
