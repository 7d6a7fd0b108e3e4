//! The choice behind a request: the plan asked for, beside what else the same machines could do.

use super::table::{Row, WIDTH, align, gib, seconds, significant};
use super::{Bound, DeviceKind, Plan, Prediction, Request, count};
use crate::bytes;
use crate::config::ModelConfig;
use serde::Serialize;
use std::fmt;

/// The fewest ranks that hold everything are looked for up to this many.
const MOST_RANKS: usize = 64;

/// Whether an option can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// All weights lie in the memory of what multiplies them.
    Yes,
    /// Some pass through the host in every step.
    Offloaded,
    /// It is refused.
    No,
}

/// One way to run the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// It is what was asked for.
    pub requested: bool,
    /// What runs the ranks.
    pub device: DeviceKind,
    /// How many.
    pub ranks: usize,
    /// Whether it can run.
    pub fits: Fit,
    /// Bytes in the memory of all its GPUs; 0 if refused.
    pub gpu_bytes: u64,
    /// Bytes in host memory, of all ranks.
    pub host_bytes: u64,
    /// Bytes left in the model's files, of all ranks.
    pub file_bytes: u64,
    /// How fast it should be; `None` if refused.
    pub predicted: Option<Prediction>,
    /// Why, in a few words.
    pub why: String,
}

/// The ways to run a model, the one asked for among them. Prints as a table, serializes as a list.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Options(pub Vec<Choice>);

impl Options {
    /// What was asked for (`plan`, from [`Plan::for_run`]), the fewest ranks that hold everything, twice the ranks, and on GPUs the same number of
    /// CPU ranks. GPUs are added to the node of a request that has one node, else nodes are; CPU ranks bring their own.
    pub fn new(plan: &Plan) -> Options {
        let (config, request) = (&plan.model, &plan.request);
        let mut choices = vec![choice(config, request, Some(plan), true)];
        let mut add = |other: Request| {
            let known = |c: &Choice| (c.device, c.ranks) == (other.device, other.tp_size);
            if !choices.iter().any(known) {
                let plan = Plan::for_run(config, &other).ok();
                choices.push(choice(config, &other, plan.as_ref(), false));
            }
        };
        let fewest = fewest_that_hold_it(config, request);
        if let Some(ranks) = fewest {
            add(on_ranks(request, ranks));
        }
        add(on_ranks(request, 2 * request.tp_size));
        if request.device == DeviceKind::Cuda {
            add(on_the_host(request));
        }
        choices.sort_by_key(|c| (c.device == DeviceKind::Cpu, c.ranks));
        for c in &mut choices {
            if c.fits == Fit::Yes && Some(c.ranks) == fewest && c.device == request.device {
                c.why = format!("the fewest that hold it all; {}", c.why);
            }
        }
        Options(choices)
    }
}

fn on_ranks(request: &Request, ranks: usize) -> Request {
    let one_node = request.device == DeviceKind::Cuda && request.tp_size <= request.ranks_per_node;
    Request {
        tp_size: ranks,
        ranks_per_node: if one_node {
            ranks.max(request.ranks_per_node)
        } else {
            request.ranks_per_node
        },
        ..request.clone()
    }
}

fn on_the_host(request: &Request) -> Request {
    Request {
        device: DeviceKind::Cpu,
        gpu_memory: None,
        rates: request.rates.of_the_host(),
        ..request.clone()
    }
}

fn fewest_that_hold_it(config: &ModelConfig, request: &Request) -> Option<usize> {
    (1..=MOST_RANKS).find(|&ranks| {
        let plan = Plan::for_run(config, &on_ranks(request, ranks));
        plan.is_ok_and(|plan| plan.fits())
    })
}

fn choice(config: &ModelConfig, request: &Request, plan: Option<&Plan>, requested: bool) -> Choice {
    let refused = Choice {
        requested,
        device: request.device,
        ranks: request.tp_size,
        fits: Fit::No,
        gpu_bytes: 0,
        host_bytes: 0,
        file_bytes: 0,
        predicted: None,
        why: String::new(),
    };
    let Some(plan) = plan else {
        return Choice {
            why: why_not(config, request),
            ..refused
        };
    };
    let sum = |of: fn(&super::Tiers) -> u64| plan.ranks.iter().map(|r| of(&r.tiers)).sum();
    Choice {
        fits: if plan.fits() {
            Fit::Yes
        } else {
            Fit::Offloaded
        },
        gpu_bytes: sum(|t| t.device),
        host_bytes: sum(|t| t.host),
        file_bytes: sum(|t| t.file),
        predicted: Some(plan.predicted),
        why: why(plan, sum(|t| t.weights_pinned), sum(|t| t.file)),
        ..refused
    }
}

fn why(plan: &Plan, pinned: u64, file: u64) -> String {
    let pace = match (plan.predicted.tpot_bound, plan.request.device) {
        (Bound::HostMemory, DeviceKind::Cuda) => "paced by links and cores".to_owned(),
        (bound, _) => format!("paced by {bound}"),
    };
    match (pinned, file) {
        (0, 0) => pace,
        (_, 0) => format!("{} are on the host; {pace}", bytes::format(pinned)),
        (0, _) => format!("{} are in files; {pace}", bytes::format(file)),
        _ => format!(
            "{} are on the host, {} in files; {pace}",
            bytes::format(pinned),
            bytes::format(file)
        ),
    }
}

/// Of a request that is refused: what it needs beside what there is.
fn why_not(config: &ModelConfig, request: &Request) -> String {
    let unlimited = Request {
        gpu_memory: None,
        host_memory: None,
        ..request.clone()
    };
    let Ok(plan) = Plan::for_run(config, &unlimited) else {
        return "larger than any machine".to_owned();
    };
    let any_host = Request {
        host_memory: None,
        ..request.clone()
    };
    if let Some(gpu) = request.gpu_memory
        && Plan::for_run(config, &any_host).is_err()
    {
        return format!("what can never leave a GPU is over {}", bytes::format(gpu));
    }
    let needed: u64 = plan.ranks.iter().map(|r| r.bytes.total).sum();
    let nodes = request.tp_size.div_ceil(request.ranks_per_node) as u64;
    let host = request.host_memory.map(|b| b.saturating_mul(nodes));
    let gpus = request
        .gpu_memory
        .map(|b| b.saturating_mul(request.tp_size as u64));
    let has = |what: &str, b: Option<u64>| b.map(|b| format!("{} of {what}", bytes::format(b)));
    let budgets: Vec<String> = [has("GPU memory", gpus), has("host memory", host)]
        .into_iter()
        .flatten()
        .collect();
    format!(
        "needs {}, has {}",
        bytes::format(needed),
        budgets.join(" and ")
    )
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = [
            "options",
            "fits",
            "on GPUs",
            "on host",
            "in files",
            "first token",
            "tokens/s",
        ];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        rows.extend(self.0.iter().map(Choice::row));
        let whys = std::iter::once("why").chain(self.0.iter().map(|c| c.why.as_str()));
        let table = align(&rows);
        let width = table.lines().map(|l| l.chars().count()).max().unwrap_or(0);
        for (line, why) in table.lines().zip(whys) {
            // What is too long goes on in its own column.
            for (n, part) in textwrap::wrap(why, WIDTH - 2 - width).iter().enumerate() {
                let line = if n == 0 { line } else { "" };
                writeln!(f, "{line:<width$}  {part}")?;
            }
        }
        writeln!(f, "* asked for; bytes in GiB over all ranks")
    }
}

impl Choice {
    fn row(&self) -> Row {
        let mark = if self.requested { '*' } else { ' ' };
        let what = match self.device {
            DeviceKind::Cuda => count(self.ranks, "GPU"),
            DeviceKind::Cpu => count(self.ranks, "CPU rank"),
        };
        let fits = match self.fits {
            Fit::Yes => "yes",
            Fit::Offloaded => "offloaded",
            Fit::No => "no",
        };
        let tier = |bytes| match self.fits {
            Fit::No => "-".to_owned(),
            _ => gib(bytes),
        };
        let speed = |of: &dyn Fn(&Prediction) -> String| {
            self.predicted.as_ref().map_or_else(|| "-".to_owned(), of)
        };
        vec![
            format!("{mark} {what}"),
            fits.to_owned(),
            tier(self.gpu_bytes),
            tier(self.host_bytes),
            tier(self.file_bytes),
            speed(&|p| seconds(p.ttft_s)),
            speed(&|p| significant(p.tokens_per_s)),
        ]
    }
}
