//! **tandem** runs a Qwen model across all the GPUs, or CPU ranks, of an allocation: one process each,
//! every process holding its column or row slice of every layer.
//!
//! The modules, in the order in which a request meets them:
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | what the model is: `config.json`, validated, or a named shape |
//! | [`plan`] | what each rank will do: shards, bytes, predicted speed; pure |
//! | [`weights`] | safetensors headers → this rank's byte ranges → their final place |
//! | [`text`] | tokenizer, chat template, streamed detokenization, stop strings |
//! | [`error`] | the one error type |
#![warn(missing_docs)]

pub mod config;
pub mod error;
pub mod plan;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
