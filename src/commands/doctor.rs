//! `tandem doctor`: what this machine offers, what is missing, and what that costs.

use crate::Result;
use crate::cli::DoctorArgs;
use crate::doctor;
use crate::output::{write_json, write_stdout};

/// Runs the command.
///
/// # Errors
/// Output that cannot be written; a machine without anything is no error.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let report = doctor::inspect();
    if args.json {
        write_json(&report)
    } else {
        write_stdout(&doctor::text(&report))
    }
}
