//! The subcommands, one file each.

pub mod bench;
pub mod chat;
pub mod doctor;
pub mod generate;
pub mod generation;
pub mod kernels;
pub mod plan;
pub mod prompts;

use crate::cli::{Cli, Command};
use crate::{Error, Result};
use clap::CommandFactory;

/// Runs what was typed.
///
/// # Errors
/// The first failure, worded for the terminal.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Plan(args) => plan::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tandem", &mut script);
            let script = String::from_utf8(script).map_err(|e| Error::failed(e.to_string()))?;
            crate::output::write_stdout(&script)
        }
    }
}
