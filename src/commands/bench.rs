//! `tandem bench`: what users get, beside what the machine could give.

use crate::bench::compare::{Comparison, compare};
use crate::bench::report;
use crate::bench::runs::{Runs, with_runs};
use crate::bench::sweep::{Model, Sweep, sweep};
use crate::cli::{BenchArgs, BenchCommand, BenchModelArgs, ProbeArgs};
use crate::output::{write_json, write_stdout};
use crate::world::last_wish;
use crate::{Error, Result, session};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Runs the command.
///
/// # Errors
/// A model that is none, files that cannot be written, ranks that do not meet. A configuration that fails is part of the
/// report, and then an error at the end.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.command {
        BenchCommand::Latency(a) => with_runs(a.model.time_limit, |runs| {
            // As many as there are: a launcher's ranks are meant to be used.
            let ranks = a.ranks.or(runs.launched()).unwrap_or(1);
            lead(runs, &a.model, &[ranks], &a.prompt_tokens, &a.batch)
        }),
        BenchCommand::Compare(a) => with_runs(a.model.time_limit, |runs| {
            let model = Model::find(&a.model)?;
            let kept = Kept::<Comparison>::new(&a.model);
            let outcome = compare(runs, &a, &model, &mut |so_far| kept.keep(so_far));
            kept.finish(outcome)
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
    let kept = Kept::<Sweep>::new(args);
    let outcome = sweep(runs, args, &model, ranks, prompts, batches, &mut |so_far| {
        kept.keep(so_far)
    });
    kept.finish(outcome)
}

/// Something measured that can be shown.
trait Shown: Serialize + Clone + Send + 'static {
    fn text(&self) -> String;
    fn plot(&self) -> Result<String>;
    /// Configurations that failed, and all of them.
    fn failed(&self) -> (usize, usize);
}

impl Shown for Sweep {
    fn text(&self) -> String {
        report::text(self)
    }
    fn plot(&self) -> Result<String> {
        report::plot(self)
    }
    fn failed(&self) -> (usize, usize) {
        let failed = self.rows.iter().filter(|r| r.measured.is_none());
        (failed.count(), self.rows.len())
    }
}

impl Shown for Comparison {
    fn text(&self) -> String {
        report::comparison_text(self)
    }
    fn plot(&self) -> Result<String> {
        report::comparison_plot(self)
    }
    fn failed(&self) -> (usize, usize) {
        let failed = self.ways.iter().filter(|w| w.measured.is_none());
        (failed.count(), self.ways.len())
    }
}

/// What has been measured so far: in its file at once, and shown at the end, whatever brings that about.
struct Kept<T> {
    files: Files,
    so_far: Arc<Mutex<Option<T>>>,
}

/// Where it goes besides stdout.
#[derive(Clone)]
struct Files {
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
}

impl<T: Shown> Kept<T> {
    fn new(args: &BenchModelArgs) -> Self {
        let so_far = Arc::new(Mutex::new(None));
        let files = Files {
            json: args.json.clone(),
            svg: args.svg.clone(),
        };
        let (left, places) = (so_far.clone(), files.clone());
        last_wish(move || {
            if let Err(e) = show(&left, &places) {
                tracing::warn!("{e}");
            }
        });
        Kept { files, so_far }
    }

    fn keep(&self, so_far: &T) -> Result<()> {
        if let Some(path) = self.files.json.as_deref().filter(|path| is_file(path)) {
            replace(path, &json(so_far)?)?;
        }
        *self.so_far.lock().unwrap_or_else(PoisonError::into_inner) = Some(so_far.clone());
        Ok(())
    }

    /// Shows what there is; then the first of: what ended the measuring, or that configurations failed.
    fn finish(&self, outcome: Result<T>) -> Result<()> {
        show(&self.so_far, &self.files)?;
        match outcome?.failed() {
            (0, _) => Ok(()),
            (failed, all) if failed == all => Err(Error::failed("none of the configurations ran")),
            (failed, all) => Err(Error::failed(format!(
                "{failed} of {all} configurations failed; the table says why"
            ))),
        }
    }
}

/// Prints and draws what there is, once.
fn show<T: Shown>(so_far: &Mutex<Option<T>>, files: &Files) -> Result<()> {
    let mut so_far = so_far.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(measured) = so_far.take() else {
        return Ok(());
    };
    write_stdout(&measured.text())?;
    if let Some(path) = files.json.as_deref().filter(|path| !is_file(path)) {
        write(path, &json(&measured)?)?;
    }
    match &files.svg {
        Some(path) => write(path, &measured.plot()?),
        None => Ok(()),
    }
}

fn json(measured: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(measured)
        .map(|text| text + "\n")
        .map_err(|e| Error::failed(format!("JSON: {e}")))
}

/// Whether `path` is, or would be, a file that can be replaced; not a pipe or a device.
fn is_file(path: &Path) -> bool {
    path.metadata().map_or(true, |m| m.is_file())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| Error::file(path, format!("cannot be written: {e}")))
}

/// Writes a file so that it is whole at any moment.
fn replace(path: &Path, text: &str) -> Result<()> {
    // A link should lead where it leads.
    let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut new = place.clone().into_os_string();
    new.push(".new");
    let new = PathBuf::from(new);
    write(&new, text)?;
    std::fs::rename(&new, &place).map_err(|e| Error::file(path, format!("cannot be replaced: {e}")))
}

fn probe(args: &ProbeArgs) -> Result<()> {
    match session::probe(args)? {
        None => Ok(()),
        Some(ceilings) if args.json => write_json(&ceilings),
        Some(ceilings) => write_stdout(&report::ceilings_text(&ceilings)),
    }
}
