//! Everything that is tested from outside: the forward pass against transformers, the program against its users.

mod answers;
mod bench;
mod commands;
mod failures;
mod forward;
mod hostile;
mod house;
mod memory;
mod model_folder;
mod sampling;
mod smollm2;
mod support;
