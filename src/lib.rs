//! **tandem** runs a Qwen model across all the GPUs, or CPU ranks, of an allocation: one process each,
//! every process holding its column or row slice of every layer.
//!
//! The modules, in the order in which a request meets them:
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | what was typed; touches no file and no device |
//! | [`commands`] | the subcommands, one file each |
//! | [`session`] | from flags to a loaded model on every rank |
//! | [`config`] | what the model is: `config.json`, validated, or a named shape |
//! | [`world`] | who am I among the ranks, how do we meet, how do we end together |
//! | [`layout`] | who holds which part of every weight, and how many bytes of what; pure |
//! | [`plan`] | what each rank will do: where its bytes lie, predicted speed; pure |
//! | [`weights`] | safetensors headers → this rank's byte ranges → their final place |
//! | [`cpu`] | the CPU backend: thread pool, kernels by run-time dispatch |
//! | [`gpu`] | the GPU backend: one driver interface, kernels, collectives |
//! | [`comm`] | what the ranks say to each other in a forward pass |
//! | [`model`] | the one forward pass, over any backend, and the paged KV cache |
//! | [`engine`] | schedule → forward → sample → emit |
//! | [`text`] | tokenizer, chat template, streamed detokenization, stop strings |
//! | [`output`] | the answer on stdout, the summary on stderr |
//! | [`mod@bench`] | what a machine gives at best, and what a run makes of it |
//! | [`doctor`] | what this machine offers, what is missing |
//! | `files` | files of a model folder, opened as a stranger's |
//! | [`bytes`] | sizes as people write them |
//! | [`logging`] | log lines tagged with rank and host, the progress bar |
//! | [`panics`] | a panic as an error of one line |
//! | [`error`] | the one error type |
#![warn(missing_docs)]

pub mod bench;
pub mod bytes;
pub mod cli;
pub mod comm;
pub mod commands;
pub mod config;
pub mod cpu;
pub mod doctor;
pub mod engine;
pub mod error;
mod files;
pub mod gpu;
pub mod layout;
pub mod logging;
pub mod model;
pub mod output;
pub mod panics;
pub mod plan;
pub mod session;
pub mod text;
pub mod weights;
pub mod world;

pub use error::{Error, Result};
