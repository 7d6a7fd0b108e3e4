//! `tandem doctor`: what this machine offers, what is missing, and what that costs.

use crate::Result;
use crate::bench::ceilings::Ceilings;
use crate::bench::report::ceilings_text;
use crate::cli::DEFAULT_HIDDEN;
use crate::cli::{Device, DoctorArgs, ProbeArgs, RankArgs};
use crate::doctor;
use crate::gpu::cuda::device_count;
use crate::output::{write_json, write_stdout};
use crate::session;
use crate::world::{DEFAULT_TIMEOUT, launched_rank};
use serde::Serialize;

/// The report with what was measured.
#[derive(Serialize)]
struct Measured<'a> {
    #[serde(flatten)]
    report: &'a doctor::Report,
    measured: &'a Ceilings,
}

/// Runs the command.
///
/// # Errors
/// Output that cannot be written, or a measurement that fails; a machine without anything is no error.
pub fn run(args: &DoctorArgs) -> Result<()> {
    if !args.measure {
        let report = doctor::inspect();
        return match args.json {
            true => write_json(&report),
            false => write_stdout(&doctor::text(&report)),
        };
    }
    // One rank for each GPU.
    let ranks = device_count().unwrap_or(0).max(1);
    let Some(measured) = session::probe(&probe_args(Device::Auto, ranks))? else {
        return Ok(());
    };
    let (report, measured) = (&doctor::inspect(), &measured);
    if args.json {
        return write_json(&Measured { report, measured });
    }
    write_stdout(&format!(
        "{}\nmeasured\n{}",
        doctor::text(report),
        ceilings_text(measured)
    ))
}

/// So many ranks, unless a launcher has decided how many there are.
pub(super) fn probe_args(device: Device, ranks: usize) -> ProbeArgs {
    ProbeArgs {
        device,
        ranks: launched_rank().is_none().then_some(ranks),
        hidden: DEFAULT_HIDDEN,
        rendezvous_timeout: DEFAULT_TIMEOUT.as_secs(),
        rank: RankArgs {
            rank: None,
            world_size: None,
            rendezvous: None,
        },
        json: false,
    }
}
