//! The model: its weights by name, what it asks of a backend, its one forward pass, and the paged KV cache's blocks.

pub mod backend;
mod checkpoint;
pub mod kv;
pub mod qwen;

pub use backend::{Activations, Backend, Batch, BatchSeq, CHOSEN, Choice, Draw, Fetch};
pub use checkpoint::check_tensors;
pub use kv::BlockPool;
pub use qwen::{Layer, Qwen, forward};
