//! `tandem kernels build`: the GPU kernels compiled ahead of time, so that a job's first start does not wait for it.

use crate::cli::{KernelsArgs, KernelsCommand};
use crate::{Result, gpu, logging};

/// Runs the command.
///
/// # Errors
/// NVRTC is missing, an architecture that it does not know, or a cache that cannot be written.
pub fn run(args: &KernelsArgs) -> Result<()> {
    let KernelsCommand::Build { arch } = &args.command;
    let (n, cache) = gpu::build_kernels(arch)?;
    logging::say(format_args!(
        "{n} files compiled into {}",
        cache.dir().display()
    ));
    Ok(())
}
