//! From flags to a loaded model on every rank: world → config → rendezvous → plan → load → engine.
//!
//! Each rank looks at its own files and machine first, then they meet, so that whatever is wrong anywhere is shown
//! once, before a byte of weights is read.

mod load;
mod probe;
mod site;

use crate::cli::{ModelArgs, RankArgs, Weights};
use crate::config::{ModelConfig, named_shape};
use crate::engine::{Engine, Scheduler, Step, serve};
use crate::logging;
use crate::model::check_tensors;
use crate::output::RankReport;
use crate::panics::caught;
use crate::plan::{self, DeviceKind, Plan, Prediction};
use crate::weights::{Checkpoint, Dtype};
use crate::world::{Group, Hello, MeetOptions, World, WorldFlags};
use crate::{Error, Result};
use load::Loading;
pub use load::{Place, load_rank};
pub use probe::probe;
use serde::{Deserialize, Serialize};
use site::Site;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What rank 0's work needs of the model; it decides the plan of every rank.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Demand {
    /// Longest sequence, prompt and answer together.
    pub context: usize,
    /// Sequences at a time that would be useful.
    pub sequences: usize,
    /// Tokens that the tokenizer knows: further rows of the vocabulary are padding.
    pub n_tokens_known: usize,
    /// Whether [`Engine::kept_logits`] is wanted at the end.
    pub keep_logits: bool,
}

/// What a run can say of itself.
#[derive(Debug, Clone)]
pub struct Report {
    /// Seconds from process start until everything was ready for the first step.
    pub load_s: f64,
    /// Every rank.
    pub ranks: Vec<RankReport>,
    /// How fast the plan says that it should be, by what was measured at the start where anything was.
    pub predicted: Prediction,
    /// Link and cores of this rank together, in GB/s, where they were measured for an offload.
    pub host_gbs: Option<f64>,
}

/// The model as this rank found it.
struct Model {
    config: ModelConfig,
    checkpoint: Option<Arc<Checkpoint>>,
    dtype: Dtype,
    /// Of configuration and arguments, and of the weights.
    fingerprint: (u64, u64),
    site: Site,
}

/// Sequences that share a step; more would only wait for each other.
const MAX_SEQUENCES: usize = 64;

/// Runs `lead` on rank 0 with a ready engine, and the other ranks beside it, until the work is done.
///
/// `read` looks at rank 0's input before anything is loaded and says what it needs.
///
/// # Errors
/// The first failure of any rank, on every rank; it has then reached all of them.
pub fn run<W>(
    args: &ModelArgs,
    read: impl FnOnce(&Path, &ModelConfig) -> Result<(Demand, W)>,
    lead: impl FnOnce(&mut Engine<'_>, W, Report) -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    let world = start_world(args.ranks, &args.rank)?;
    let found = caught(|| {
        let model = find(args, &world)?;
        let work = if world.rank == 0 {
            Some(read(&args.model, &model.config)?)
        } else {
            None
        };
        Ok((model, work))
    });
    let hello = hello(&world, &found);
    let options = MeetOptions {
        timeout: Duration::from_secs(args.rendezvous_timeout),
        ..MeetOptions::default()
    };
    let group = Group::meet(&world, hello, &options)?;
    let (model, work) = found?;
    let outcome = caught(|| {
        let (mut replica, scheduler, report) = prepare(args, model, &work, &group, start)?;
        match work {
            Some((_, work)) => {
                let mut engine = Engine::new(scheduler, &mut *replica, &group);
                lead(&mut engine, work, report)?;
                engine.finish()
            }
            None => serve(&mut *replica, &group),
        }
    });
    match outcome {
        Ok(()) => group.finish(),
        Err(e) => Err(group.fail(e)),
    }
}

/// Who this process is among the ranks; its log lines say so from here on.
fn start_world(ranks: Option<usize>, flags: &RankArgs) -> Result<World> {
    let world = World::start(&WorldFlags {
        ranks,
        rank: flags.rank,
        world_size: flags.world_size,
        rendezvous: flags.rendezvous.clone(),
    })?;
    logging::set_rank(world.rank, world.size);
    Ok(world)
}

fn find(args: &ModelArgs, world: &World) -> Result<Model> {
    let site = Site::choose(args.device, world)?;
    let named = args
        .model
        .to_str()
        .and_then(named_shape)
        .filter(|_| !args.model.exists());
    let mut config = match (args.weights, named) {
        (Weights::Random, Some(config)) => config,
        (Weights::Checkpoint, Some(_)) => {
            let shape = args.model.display();
            return Err(Error::usage(format!(
                "--model {shape} names a shape, not a folder: add --weights random"
            )));
        }
        (_, None) => ModelConfig::from_dir(&args.model)?,
    };
    let (checkpoint, dtype) = match args.weights {
        Weights::Random => (None, config.dtype),
        Weights::Checkpoint => {
            let mut checkpoint = Checkpoint::open(&args.model)?;
            let dtype = check_tensors(&mut config, &mut checkpoint)?;
            (Some(Arc::new(checkpoint)), dtype)
        }
    };
    let weights = match &checkpoint {
        Some(checkpoint) if world.size > 1 => checkpoint.fingerprint()?,
        _ => 0,
    };
    let mut hasher = std::hash::DefaultHasher::new();
    let kind = site.kind();
    format!("{config:?} {dtype} {kind} {:?}", args.weights).hash(&mut hasher);
    let fingerprint = (hasher.finish(), weights);
    Ok(Model {
        config,
        checkpoint,
        dtype,
        fingerprint,
        site,
    })
}

fn hello<W>(world: &World, found: &Result<(Model, W)>) -> Hello {
    let hello = Hello::new(world.rank);
    match found {
        Ok((model, _)) => {
            let hello = model.site.describe(hello, world.local_size.unwrap_or(1));
            Hello {
                fingerprint: model.fingerprint.0,
                weights: model.fingerprint.1,
                ..hello
            }
        }
        Err(e) => hello.with_error(e),
    }
}

type Ready = (Box<dyn Step>, Scheduler, Report);

fn prepare<W>(
    args: &ModelArgs,
    model: Model,
    work: &Option<(Demand, W)>,
    group: &Group,
    start: Instant,
) -> Result<Ready> {
    let demand = share_demand(work.as_ref().map(|w| w.0), group)?;
    let plan = make_plan(args, &model, &demand, group)?;
    tracing::info!("{}", plan.in_a_line());
    let loading = Loading {
        args,
        config: &model.config,
        checkpoint: &model.checkpoint,
        dtype: model.dtype,
        plan: &plan,
        demand: &demand,
        group,
    };
    let (mut replica, host_gbs, predicted): (Box<dyn Step>, _, _) = match model.site {
        Site::Cpu => (Box::new(loading.on_cpu()?), None, plan.predicted),
        Site::Gpu(cuda) => loading.on_gpu(*cuda)?,
    };
    if demand.keep_logits {
        replica.keep_logits();
    }
    let scheduler = Scheduler::new(
        plan.n_kv_blocks,
        plan.max_step_tokens,
        plan.request.max_seqs,
        demand.context,
    )
    .with_vocab_size(model.config.vocab_size);
    let report = Report {
        load_s: start.elapsed().as_secs_f64(),
        ranks: report(group, &plan),
        predicted,
        host_gbs,
    };
    Ok((replica, scheduler, report))
}

/// Rank 0 tells the others what its input needs.
fn share_demand(mine: Option<Demand>, group: &Group) -> Result<Demand> {
    let bad = |e: postcard::Error| Error::failed(format!("start message: {e}"));
    match mine {
        Some(demand) => {
            if group.size() > 1 {
                group.broadcast(&postcard::to_stdvec(&demand).map_err(bad)?)?;
            }
            Ok(demand)
        }
        None => postcard::from_bytes(&group.receive()?).map_err(bad),
    }
}

/// The plan for as many sequences at a time as the input has and memory allows: fewer where that keeps all weights on
/// the GPU, but where they cannot be, every pass over them should serve as many as possible.
fn make_plan(args: &ModelArgs, model: &Model, demand: &Demand, group: &Group) -> Result<Plan> {
    let parse = |text: &Option<String>| text.as_deref().map(crate::bytes::parse).transpose();
    let (gpu_typed, host_typed) = (parse(&args.gpu_memory)?, parse(&args.host_memory)?);
    // The scarcest host, or GPU, decides.
    let least = |of: fn(&Hello) -> u64| group.hellos().iter().map(of).min();
    let name = args.model.display().to_string();
    let kind = model.site.kind();
    let on_gpu = kind == DeviceKind::Cuda;
    if gpu_typed.is_some() && !on_gpu {
        return Err(Error::usage("--gpu-memory: the ranks run on CPU cores"));
    }
    if args.host_share.is_some_and(|x| !(0.0..=1.0).contains(&x)) {
        return Err(Error::usage("--host-share: must be from 0 to 1"));
    }
    let mut request = plan::Request {
        dtype: model.dtype,
        context: demand.context,
        max_seqs: demand.sequences.clamp(1, MAX_SEQUENCES),
        gpu_memory: gpu_typed.or(least(|h| h.memory)).filter(|_| on_gpu),
        host_memory: host_typed.or(least(|h| h.host_memory)),
        files: model.checkpoint.is_some(),
        sm_count: model.site.sm_count(),
        ranks_per_node: group.local_rank_and_size().1,
        rates: plan::Rates::assumed(kind, least(|h| h.memory)),
        ..plan::Request::new(&name, &model.config, kind, group.size())
    };
    let mut widest = None;
    loop {
        let plan = Plan::for_run(&model.config, &request);
        if plan.as_ref().is_ok_and(Plan::fits) {
            return plan;
        }
        // The first that works at all, or the last one's reason why none does.
        widest = match widest {
            Some(Ok(plan)) => Some(Ok(plan)),
            _ => Some(plan),
        };
        if request.max_seqs == 1 {
            break;
        }
        request.max_seqs /= 2;
    }
    widest.unwrap_or_else(|| Err(Error::failed("internal error: nothing was planned")))
}

fn report(group: &Group, plan: &Plan) -> Vec<RankReport> {
    let one = |(hello, rank): (&Hello, &plan::RankPlan)| RankReport {
        rank: hello.rank,
        host: hello.host.clone(),
        device: hello.device.clone(),
        bytes: rank.bytes,
        tiers: rank.tiers,
    };
    group.hellos().iter().zip(&plan.ranks).map(one).collect()
}
