//! The same model split over the ranks, offloaded on one, and both: figures beside what the plan predicts.

use super::ceilings::{Ceilings, RankCeilings};
use super::energy::Meter;
use super::limits::{MOST, Size, limits};
use super::runs::Runs;
use super::sweep::{Budgets, Measured, Model, Probed, generate, probe, say};
use crate::cli::CompareArgs;
use crate::plan::{self, DeviceKind, Plan, Prediction, Tiers};
use crate::{Error, Result};
use serde::Serialize;
use std::time::{Duration, Instant};

/// One way to run the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Way {
    /// E.g. `split over 2`.
    pub name: String,
    /// Its size.
    pub size: Size,
    /// Bytes of GPU memory that a rank was allowed, where that is less than there is.
    pub gpu_memory: Option<u64>,
    /// What the plan says, by the measured rates.
    pub predicted: Option<Prediction>,
    /// Where the plan puts the bytes, all ranks together.
    pub tiers: Option<Tiers>,
    /// The least that a decode step could take: each rank's device, link and cores at their measured rates at once, those of an
    /// offloaded run as it measured them itself.
    pub decode_limit_s: Option<f64>,
    /// What the rank with most of it reads from host memory in a step, in bytes.
    pub host_read_bytes: Option<f64>,
    /// The figures, unless it failed.
    pub measured: Option<Measured>,
    /// Joules of all its GPUs for one token of one sequence while decoding, where NVML counts them.
    pub joules_per_token: Option<f64>,
    /// Why it failed, in one line.
    pub error: Option<String>,
}

/// All ways, and the ceilings that they are held against.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The model's folder or shape.
    pub model: String,
    /// This program's version.
    pub version: &'static str,
    /// The ceilings, one entry for each number of ranks.
    pub ceilings: Vec<Probed>,
    /// The ways.
    pub ways: Vec<Way>,
}

/// Runs every way; one that fails is a row that says why. `keep` sees what there is after each of them.
///
/// # Errors
/// Budgets that cannot be read, sizes of zero, or ranks that the bench itself has lost.
pub fn compare(
    runs: &Runs<'_>,
    args: &CompareArgs,
    model: &Model,
    keep: &mut dyn FnMut(&Comparison) -> Result<()>,
) -> Result<Comparison> {
    let ranks = args.ranks.or(runs.launched()).unwrap_or(2);
    let sizes = [ranks, args.prompt_tokens, args.batch, args.model.max_tokens];
    if sizes.contains(&0) {
        return Err(Error::usage(
            "0 ranks, tokens or sequences: at least 1 of each",
        ));
    }
    if let Some(n) = sizes.iter().find(|&&n| n > MOST) {
        return Err(Error::usage(format!(
            "{n} ranks, tokens or sequences: at most {MOST} of each"
        )));
    }
    let size = |ranks| Size {
        ranks,
        prompt_tokens: args.prompt_tokens,
        max_tokens: args.model.max_tokens,
        batch: args.batch,
    };
    let parse = |text: &Option<String>| text.as_deref().map(crate::bytes::parse).transpose();
    let (typed, host) = (
        parse(&args.model.gpu_memory)?,
        parse(&args.model.host_memory)?,
    );
    let mut all = Comparison {
        model: model.name.clone(),
        version: env!("CARGO_PKG_VERSION"),
        ceilings: Vec::new(),
        ways: Vec::new(),
    };
    for n in if ranks > 1 { vec![1, ranks] } else { vec![1] } {
        say(&format!("ceilings of {n} rank(s)"));
        let probed = probe(runs, args.model.device, n, model.config.hidden_size);
        all.ceilings.push(Probed::new(n, probed));
        keep(&all)?;
    }
    let one = all.ceilings_of(1);
    let budget = typed.or_else(|| one.and_then(|c| default_budget(model, &size(1), c)));
    // Cores have nothing to offload from; a budget for GPUs that are not there is an error of its run.
    let on_cores = typed.is_none() && one.is_some_and(|c| c.device() == DeviceKind::Cpu);
    for (name, n, gpu_memory) in setups(ranks, budget, on_cores) {
        say(&name);
        let ceilings = all.ceilings_of(n);
        let mut way = Way::planned(name, size(n), gpu_memory, host, model, ceilings);
        way.run(runs, args, model, ceilings);
        all.ways.push(way);
        keep(&all)?;
    }
    Ok(all)
}

/// Name, ranks and budget of each way.
fn setups(ranks: usize, budget: Option<u64>, on_cores: bool) -> Vec<(String, usize, Option<u64>)> {
    let mut setups = vec![(format!("split over {ranks}"), ranks, None)];
    if on_cores {
        setups.push(("1 rank".to_owned(), 1, None));
    } else {
        setups.push(("offload on 1".to_owned(), 1, budget));
        setups.push((format!("split over {ranks} + offload"), ranks, budget));
    }
    setups
}

impl Comparison {
    /// What `n` ranks have measured.
    fn ceilings_of(&self, n: usize) -> Option<&Ceilings> {
        let found = self.ceilings.iter().find(|p| p.ranks == n);
        found.and_then(|p| p.ceilings.as_ref())
    }
}

/// The plan's request for one way.
fn request(
    model: &Model,
    size: &Size,
    gpu_memory: Option<u64>,
    host_memory: Option<u64>,
    ceilings: &Ceilings,
) -> plan::Request {
    let kind = ceilings.device();
    let base = plan::Request::new(&model.name, &model.config, kind, size.ranks);
    let first = ceilings.ranks.first().map(|r| &r.host);
    let on_node = ceilings.ranks.iter().filter(|r| Some(&r.host) == first);
    plan::Request {
        ranks_per_node: on_node.count().max(1),
        dtype: model.dtype,
        max_seqs: size.batch,
        context: size.prompt_tokens + size.max_tokens,
        max_step_tokens: match kind {
            DeviceKind::Cuda => crate::plan::GPU_STEP_TOKENS,
            DeviceKind::Cpu => base.max_step_tokens,
        },
        gpu_memory,
        host_memory,
        rates: ceilings.rates(),
        ..base
    }
}

/// The budget that stands for a smaller card where the model fits the one there is: all but three quarters of its weights.
fn default_budget(model: &Model, size: &Size, ceilings: &Ceilings) -> Option<u64> {
    let available = device_memory(ceilings)?;
    let plan = Plan::new(&model.config, &request(model, size, None, None, ceilings)).ok()?;
    let needed = plan.ranks.first()?.bytes;
    (needed.total <= available).then_some(needed.total - needed.weights / 4 * 3)
}

/// What a plan may fill of the scarcest GPU.
fn device_memory(ceilings: &Ceilings) -> Option<u64> {
    let gpus = ceilings.ranks.iter().filter(|r| r.gpu.is_some());
    gpus.map(|r| r.memory).min()
}

impl Way {
    fn planned(
        name: String,
        size: Size,
        gpu_memory: Option<u64>,
        host_memory: Option<u64>,
        model: &Model,
        ceilings: Option<&Ceilings>,
    ) -> Way {
        let plan = ceilings.and_then(|c| {
            let gpu_memory = gpu_memory.or_else(|| device_memory(c));
            Plan::for_run(
                &model.config,
                &request(model, &size, gpu_memory, host_memory, c),
            )
            .ok()
        });
        let sum = |of: fn(&Tiers) -> u64| {
            let plan = plan.as_ref()?;
            Some(plan.ranks.iter().map(|r| of(&r.tiers)).sum())
        };
        let tiers = || {
            Some(Tiers {
                device: sum(|t| t.device)?,
                host: sum(|t| t.host)?,
                file: sum(|t| t.file)?,
                weights_on_device: sum(|t| t.weights_on_device)?,
                weights_pinned: sum(|t| t.weights_pinned)?,
            })
        };
        let limit = plan
            .as_ref()
            .zip(ceilings)
            .and_then(|(plan, c)| decode_limit(model, &size, plan, c));
        Way {
            name,
            size,
            gpu_memory,
            predicted: plan.as_ref().map(|p| p.predicted),
            tiers: tiers(),
            decode_limit_s: limit.map(|l| l.0),
            host_read_bytes: limit.map(|l| l.1).filter(|&bytes| bytes > 0.0),
            measured: None,
            joules_per_token: None,
            error: None,
        }
    }

    fn run(
        &mut self,
        runs: &Runs<'_>,
        args: &CompareArgs,
        model: &Model,
        ceilings: Option<&Ceilings>,
    ) {
        let budgets = Budgets {
            gpu: self.gpu_memory.map(|bytes| bytes.to_string()),
            host: args.model.host_memory.clone(),
        };
        let work = || {
            let start = Instant::now();
            generate(runs, args.model.device, &budgets, model, &self.size).map(|m| (start, m))
        };
        let (outcome, readings) = match ceilings.and_then(meter) {
            Some(meter) => meter.during(work),
            None => (work(), Default::default()),
        };
        match outcome {
            Ok((start, m)) => {
                let tokens = self.size.max_tokens.saturating_sub(1) * self.size.batch;
                let first = start + Duration::from_secs_f64(m.ready_s);
                let last = first + Duration::from_secs_f64(m.decode_s);
                let joules = readings.between(first, last);
                self.joules_per_token = joules.filter(|_| tokens > 0).map(|j| j / tokens as f64);
                if let (Some(gbs), Some(bytes)) = (m.host_gbs, self.host_read_bytes) {
                    self.decode_limit_s = Some(bytes / gbs / 1e9);
                }
                // An offloaded run predicts by what it has measured itself.
                if let (Some(p), Some(s), Some(_)) =
                    (&mut self.predicted, m.predicted_tpot_s, m.host_gbs)
                {
                    p.tpot_s = s;
                }
                self.measured = Some(m);
            }
            Err(e) => self.error = Some(e.to_string()),
        }
    }
}

/// The energy counters of the ranks' GPUs, where they are all on this machine and counted.
fn meter(ceilings: &Ceilings) -> Option<Meter> {
    let here = |r: &RankCeilings| r.host == ceilings.ranks[0].host;
    if !ceilings.ranks.iter().all(here) {
        return None;
    }
    let uuids: Option<Vec<String>> = ceilings.ranks.iter().map(|r| r.gpu_uuid.clone()).collect();
    match Meter::open(&uuids?) {
        Ok(meter) => Some(meter),
        Err(e) => {
            tracing::info!("no energy is shown: {e}");
            None
        }
    }
}

/// The slowest rank's decode step with its device, its link and its cores at work at once, and the most bytes that a rank
/// reads from host memory in it; `None` where bytes come from files, whose rate is not measured.
fn decode_limit(
    model: &Model,
    size: &Size,
    plan: &Plan,
    ceilings: &Ceilings,
) -> Option<(f64, f64)> {
    if plan.fits() {
        return limits(&model.config, model.dtype, size, ceilings).map(|l| (l.decode_s, 0.0));
    }
    let (mut slowest, mut most): (f64, f64) = (0.0, 0.0);
    for (rank, measured) in plan.ranks.iter().zip(&ceilings.ranks) {
        let gpu = measured.gpu?;
        let Tiers { host, file, .. } = rank.tiers;
        if file > 0 {
            return None;
        }
        let read = super::limits::decode_bytes_of(&model.config, &rank.shard, size);
        // An embedding that is only looked up is not read, and leaves the GPU first.
        let host = host.saturating_sub(read.looked_up).min(read.bytes);
        let beside = gpu.link_beside_cores_gbs + gpu.cores_beside_link_gbs;
        let device_s = (read.bytes - host) as f64 / gpu.read_gbs / 1e9;
        slowest = slowest.max(device_s).max(host as f64 / beside / 1e9);
        most = most.max(host as f64);
    }
    Some((slowest, most))
}
