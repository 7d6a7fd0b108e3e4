//! `tandem bench`: what users get, beside what the machine could give.

use crate::bench::compare::compare;
use crate::bench::report;
use crate::bench::runs::{Runs, with_runs};
use crate::bench::sweep::{Model, sweep};
use crate::cli::{BenchArgs, BenchCommand, BenchModelArgs, ProbeArgs};
use crate::output::{write_json, write_stdout};
use crate::session;
use crate::{Error, Result};
use serde::Serialize;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// A model that is none, files that cannot be written, ranks that do not meet. A configuration that fails is part of the
/// report.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.command {
        BenchCommand::Latency(a) => with_runs(a.model.time_limit, |runs| {
            // As many as there are: a launcher's ranks are meant to be used.
            let ranks = a.ranks.or(runs.launched()).unwrap_or(1);
            lead(runs, &a.model, &[ranks], &a.prompt_tokens, &a.batch)
        }),
        BenchCommand::Compare(a) => with_runs(a.model.time_limit, |runs| {
            let compared = compare(runs, &a, &Model::find(&a.model)?)?;
            write_stdout(&report::comparison_text(&compared))?;
            write_files(&a.model, &compared, || report::comparison_plot(&compared))?;
            any_ran(compared.ways.iter().any(|w| w.measured.is_some()))
        }),
        BenchCommand::Scaling(a) => with_runs(a.model.time_limit, |runs| {
            lead(runs, &a.model, &a.ranks, &a.prompt_tokens, &a.batch)
        }),
        BenchCommand::Probe(a) => probe(&a),
    }
}

fn lead(
    runs: &Runs<'_>,
    args: &BenchModelArgs,
    ranks: &[usize],
    prompts: &[usize],
    batches: &[usize],
) -> Result<()> {
    let model = Model::find(args)?;
    let swept = sweep(runs, args, &model, ranks, prompts, batches)?;
    write_stdout(&report::text(&swept))?;
    write_files(args, &swept, || report::plot(&swept))?;
    any_ran(swept.rows.iter().any(|r| r.measured.is_some()))
}

fn any_ran(any: bool) -> Result<()> {
    match any {
        true => Ok(()),
        false => Err(Error::failed("none of the configurations ran")),
    }
}

/// The files that were asked for.
fn write_files(
    args: &BenchModelArgs,
    report: &impl Serialize,
    plot: impl FnOnce() -> String,
) -> Result<()> {
    let write = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(|e| Error::file(path, format!("cannot be written: {e}")))
    };
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(report)
            .map_err(|e| Error::failed(format!("JSON: {e}")))?;
        write(path, text + "\n")?;
    }
    match &args.svg {
        Some(path) => write(path, plot()),
        None => Ok(()),
    }
}

fn probe(args: &ProbeArgs) -> Result<()> {
    match session::probe(args)? {
        None => Ok(()),
        Some(ceilings) if args.json => write_json(&ceilings),
        Some(ceilings) => write_stdout(&report::ceilings_text(&ceilings)),
    }
}
