//! The same model over numbers of ranks, lengths of prompts and sizes of batches.

use super::ceilings::Ceilings;
use super::limits::{Limits, MOST, Size, limits};
use super::runs::Runs;
use crate::cli::{BenchModelArgs, Device};
use crate::config::{ModelConfig, SHAPES, named_shape};
use crate::model::check_tensors;
use crate::weights::{Checkpoint, Dtype};
use crate::{Error, Result};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

/// The model of a bench.
pub struct Model {
    /// As typed.
    pub name: String,
    /// What it is.
    pub config: ModelConfig,
    /// Element type of its weights.
    pub dtype: Dtype,
    /// A shape without files: its weights are random.
    pub is_shape: bool,
}

/// Memory that a rank of a run may use, as its flags say it.
#[derive(Debug, Clone, Default)]
pub struct Budgets {
    /// `--gpu-memory`
    pub gpu: Option<String>,
    /// `--host-memory`
    pub host: Option<String>,
}

/// What one run took, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// From process start until the weights were in place on rank 0.
    pub load_s: f64,
    /// From process start to the first token.
    pub ready_s: f64,
    /// From the request to the first token of the first sequence.
    pub ttft_s: f64,
    /// A further token of a sequence: the median over sequences of each one's p50.
    pub tpot_p50_s: f64,
    /// The slowest sequence's p99.
    pub tpot_p99_s: f64,
    /// Further tokens of all sequences in a second, at p50.
    pub tokens_per_s: f64,
    /// From the first token of the first sequence to the last of the last.
    pub decode_s: f64,
    /// A further token as the run itself predicted it.
    pub predicted_tpot_s: Option<f64>,
    /// Link and cores of rank 0 together, in GB/s, where the run offloads and has measured them.
    pub host_gbs: Option<f64>,
    /// What every rank says of itself.
    pub ranks: Value,
}

/// One configuration: what was run, how it went, and what bounds it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Its size.
    pub size: Size,
    /// The figures, unless it failed.
    pub measured: Option<Measured>,
    /// Why it failed, in one line.
    pub error: Option<String>,
    /// The least it could take, where the ceilings are known.
    pub limits: Option<Limits>,
}

/// The ceilings of one number of ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probed {
    /// How many ranks.
    pub ranks: usize,
    /// What they measured, unless that failed.
    pub ceilings: Option<Ceilings>,
    /// Why it failed, in one line.
    pub error: Option<String>,
}

/// All that a sweep has measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sweep {
    /// The model's folder or shape.
    pub model: String,
    /// This program's version.
    pub version: &'static str,
    /// The ceilings, one entry for each number of ranks.
    pub ceilings: Vec<Probed>,
    /// The runs, in the order in which they were made.
    pub rows: Vec<Row>,
}

impl Probed {
    /// What became of a run of [`probe`].
    pub fn new(ranks: usize, outcome: Result<Ceilings>) -> Probed {
        Probed {
            ranks,
            error: outcome.as_ref().err().map(Error::to_string),
            ceilings: outcome.ok(),
        }
    }
}

impl Model {
    /// Reads the configuration of a folder or names a shape.
    ///
    /// # Errors
    /// Neither a folder nor a shape; a folder that is no model.
    pub fn find(args: &BenchModelArgs) -> Result<Model> {
        let name = args.model.to_str().ok_or_else(|| {
            Error::file(
                &args.model,
                "the name is not UTF-8, which a run's flag must be",
            )
        })?;
        let named = named_shape(name).filter(|_| !args.model.exists());
        let (is_shape, (config, dtype)) = match named {
            Some(config) => (true, (config.clone(), config.dtype)),
            None if args.model.is_dir() => {
                let mut config = ModelConfig::from_dir(&args.model)?;
                let dtype = check_tensors(&mut config, &mut Checkpoint::open(&args.model)?)?;
                (false, (config, dtype))
            }
            None => {
                let shapes = SHAPES.join(", ");
                let what = format!("neither a model folder nor a known shape ({shapes})");
                return Err(Error::file(&args.model, what));
            }
        };
        Ok(Model {
            name: name.to_owned(),
            config,
            dtype,
            is_shape,
        })
    }
}

/// Measures the ceilings of each number of ranks, then every combination; a run that fails is a row that says why.
/// `keep` sees what there is after each of them.
///
/// # Errors
/// Sizes of zero, or ranks that the bench itself has lost.
pub fn sweep(
    runs: &Runs<'_>,
    args: &BenchModelArgs,
    model: &Model,
    ranks: &[usize],
    prompts: &[usize],
    batches: &[usize],
    keep: &mut dyn FnMut(&Sweep) -> Result<()>,
) -> Result<Sweep> {
    for (flag, values) in [
        ("ranks", ranks),
        ("prompt-tokens", prompts),
        ("batch", batches),
        ("max-tokens", &[args.max_tokens]),
    ] {
        if values.contains(&0) {
            return Err(Error::usage(format!("--{flag} 0: at least 1")));
        }
        if let Some(n) = values.iter().find(|&&n| n > MOST) {
            return Err(Error::usage(format!("--{flag} {n}: at most {MOST}")));
        }
    }
    let budgets = Budgets {
        gpu: args.gpu_memory.clone(),
        host: args.host_memory.clone(),
    };
    let mut all = Sweep {
        model: model.name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        ceilings: Vec::new(),
        rows: Vec::new(),
    };
    for &n in ranks {
        say(&format!("ceilings of {n} rank(s)"));
        let probed = probe(runs, args.device, n, model.config.hidden_size);
        all.ceilings.push(Probed::new(n, probed));
        keep(&all)?;
        for &prompt_tokens in prompts {
            for &batch in batches {
                let size = Size {
                    ranks: n,
                    prompt_tokens,
                    max_tokens: args.max_tokens,
                    batch,
                };
                say(&format!(
                    "{n} rank(s), prompt of {prompt_tokens}, batch of {batch}"
                ));
                let outcome = generate(runs, args.device, &budgets, model, &size);
                let ceilings = all.ceilings.last().and_then(|p| p.ceilings.as_ref());
                all.rows.push(Row {
                    size,
                    limits: ceilings.and_then(|c| limits(&model.config, model.dtype, &size, c)),
                    error: outcome.as_ref().err().map(Error::to_string),
                    measured: outcome.ok(),
                });
                keep(&all)?;
            }
        }
    }
    Ok(all)
}

/// A line on stderr: what is being run.
pub fn say(what: &str) {
    crate::logging::say(format_args!("bench: {what}"));
}

/// The ceilings of `ranks` ranks, measured by a run of their own.
///
/// # Errors
/// The run's.
pub fn probe(runs: &Runs<'_>, device: Device, ranks: usize, hidden: usize) -> Result<Ceilings> {
    let hidden = hidden.to_string();
    let mut args: Vec<String> = ["bench", "probe", "--json", "--hidden", &hidden]
        .map(str::to_owned)
        .to_vec();
    args.extend(device_flag(device));
    let text = runs.run(&args, ranks)?;
    serde_json::from_str(text.trim()).map_err(|e| Error::failed(format!("the ceilings: {e}")))
}

fn device_flag(device: Device) -> [String; 2] {
    let value = device.to_possible_value();
    let name = value.map_or("auto".to_owned(), |v| v.get_name().to_owned());
    ["--device".to_owned(), name]
}

/// One run of `tandem generate`.
///
/// # Errors
/// The run's.
pub fn generate(
    runs: &Runs<'_>,
    device: Device,
    budgets: &Budgets,
    model: &Model,
    size: &Size,
) -> Result<Measured> {
    let mut flags: Vec<String> = ["generate", "--json", "--ignore-eos", "--temperature", "0"]
        .map(str::to_owned)
        .to_vec();
    let mut flag = |name: &str, value: String| flags.extend([format!("--{name}"), value]);
    flag("model", model.name.clone());
    flag("prompt-tokens", size.prompt_tokens.to_string());
    flag("max-tokens", size.max_tokens.to_string());
    flag("batch", size.batch.to_string());
    if model.is_shape {
        flag("weights", "random".to_owned());
    }
    if let Some(budget) = &budgets.gpu {
        flag("gpu-memory", budget.clone());
    }
    if let Some(budget) = &budgets.host {
        flag("host-memory", budget.clone());
    }
    flags.extend(device_flag(device));
    measured(&runs.run(&flags, size.ranks)?, size.batch)
}

/// The figures in the JSON lines of a run, one line for each sequence.
fn measured(text: &str, batch: usize) -> Result<Measured> {
    let not_ours = |what: &str| Error::failed(format!("the run's JSON {what}"));
    let answers = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).map_err(|e| not_ours(&e.to_string())))
        .collect::<Result<Vec<_>>>()?;
    if answers.len() != batch {
        return Err(not_ours(&format!(
            "has {} answers instead of {batch}",
            answers.len()
        )));
    }
    let column = |name: &str| -> Result<Vec<f64>> {
        let mut values = answers
            .iter()
            .map(|a| a["timings"][name].as_f64())
            .collect::<Option<Vec<f64>>>()
            .ok_or_else(|| not_ours(&format!("lacks timings.{name}")))?;
        values.sort_by(f64::total_cmp);
        Ok(values)
    };
    let (load_s, ttft_s) = (column("load_s")?[0], column("ttft_s")?[0]);
    let end = |a: &Value| {
        let further = a["token_ids"].as_array()?.len().saturating_sub(1) as f64;
        Some(a["timings"]["ttft_s"].as_f64()? + further * a["timings"]["tpot_s"].as_f64()?)
    };
    let ends: Option<Vec<f64>> = answers.iter().map(end).collect();
    let last = ends.ok_or_else(|| not_ours("lacks tokens or times"))?;
    let tpot_p50_s = column("tpot_p50_s")?[batch / 2];
    Ok(Measured {
        load_s,
        ready_s: load_s + ttft_s,
        ttft_s,
        tpot_p50_s,
        tpot_p99_s: column("tpot_p99_s")?[batch - 1],
        tokens_per_s: if tpot_p50_s > 0.0 {
            batch as f64 / tpot_p50_s
        } else {
            0.0
        },
        decode_s: last.into_iter().fold(ttft_s, f64::max) - ttft_s,
        predicted_tpot_s: answers[0]["predicted"]["tpot_s"].as_f64(),
        host_gbs: answers[0]["host_gbs"].as_f64(),
        ranks: answers[0]["ranks"].clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(ttft: f64, p50: f64, p99: f64) -> String {
        serde_json::json!({
            "timings": {"load_s": 2.0, "ttft_s": ttft, "tpot_s": p50, "tpot_p50_s": p50, "tpot_p99_s": p99},
            "token_ids": [1, 2, 3],
            "ranks": [{"rank": 0}],
        })
        .to_string()
    }

    #[test]
    fn a_batch_has_the_first_token_of_its_first_and_the_worst_of_its_slowest_sequence() {
        let text = [
            line(0.5, 0.2, 0.4),
            line(0.3, 0.1, 0.9),
            line(0.7, 0.3, 0.3),
        ]
        .join("\n");
        let m = measured(&text, 3).unwrap();
        assert_eq!((m.ttft_s, m.ready_s), (0.3, 2.3));
        assert_eq!((m.tpot_p50_s, m.tpot_p99_s), (0.2, 0.9));
        assert!((m.tokens_per_s - 15.0).abs() < 1e-9);
        // The last sequence ends two tokens of 0.3 s after 0.7 s.
        assert!((m.decode_s - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_run_that_prints_something_else_is_an_error() {
        for (text, batch) in [
            ("no JSON", 1),
            ("{}", 1),
            ("", 1),
            (&*line(1.0, 1.0, 1.0), 2),
        ] {
            assert!(measured(text, batch).is_err(), "{text}");
        }
    }
}
