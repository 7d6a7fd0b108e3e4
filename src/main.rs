//! Parse, run, and be the only place that prints errors and sets exit codes.

use clap::Parser;
use clap::error::ErrorKind;
use std::process::ExitCode;
use tandem::cli::{self, Cli};
use tandem::world::{World, WorldFlags};
use tandem::{Error, commands, logging, panics};

fn main() -> ExitCode {
    if let Some(code) = tandem::text::serve_if_asked() {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return not_understood(&e),
    };
    let typed = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let typed: Vec<String> = typed.collect();
    if let Some(what) = cli::missing_text(&typed) {
        return misused(&what);
    }
    logging::init(cli.verbose);
    match panics::caught(|| commands::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // A rank whose error rank 0 shows leaves quietly.
            if !matches!(e, Error::Told(_)) {
                logging::say(format_args!("tandem: {e}"));
            }
            ExitCode::from(e.exit_code())
        }
    }
}

/// Help and version go to stdout; a mistake is one line, shown by one rank.
fn not_understood(e: &clap::Error) -> ExitCode {
    match e.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe (`tandem --help | head`) is no failure of help.
            let _ = e.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            logging::say("tandem: no command given; see tandem --help");
            ExitCode::from(2)
        }
        _ => misused(&first_paragraph(&e.to_string())),
    }
}

/// A mistake in the command line, which all ranks have made: one shows it.
fn misused(what: &str) -> ExitCode {
    let world = World::detect(&WorldFlags::default(), &|name| std::env::var(name).ok());
    if world.map_or(0, |w| w.rank) == 0 {
        logging::say(format_args!("tandem: {what}; see tandem --help"));
    }
    ExitCode::from(2)
}

fn first_paragraph(text: &str) -> String {
    let lines = text.lines().take_while(|l| !l.trim().is_empty());
    let line = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    line.trim_start_matches("error: ").to_string()
}
