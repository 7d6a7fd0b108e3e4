//! From flags to a loaded model on every rank: world → config → rendezvous → plan → load → engine.
//!
//! Each rank looks at its own files and machine first, then they meet, so that whatever is wrong anywhere is shown
//! once, before a byte of weights is read.

mod probe;
mod site;

use crate::cli::{ModelArgs, RankArgs, Weights};
use crate::comm::HostCollective;
use crate::config::{ModelConfig, named_shape};
use crate::cpu::{self, CpuBackend, HostWeight, Pool};
use crate::engine::{Engine, Replica, Scheduler, Step, serve};
use crate::gpu;
use crate::logging;
use crate::model::{Limits, Qwen, check_tensors};
use crate::output::RankReport;
use crate::plan::{self, DeviceKind, Plan, Prediction, Shard};
use crate::weights::{self, Arena, Checkpoint, Dtype, LoadStats, LocalMatrix, Source};
use crate::world::{Group, Hello, MeetOptions, World, WorldFlags};
use crate::{Error, Result};
pub use probe::probe;
use serde::{Deserialize, Serialize};
use site::Site;
use std::collections::HashMap;
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
    fingerprint: u64,
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
    let found = find(args, &world).and_then(|model| {
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
    let outcome =
        prepare(args, model, &work, &group, start).and_then(|(mut replica, scheduler, report)| {
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
    let config = match (args.weights, named) {
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
            let checkpoint = Checkpoint::open(&args.model)?;
            let dtype = check_tensors(&config, &checkpoint)?;
            (Some(Arc::new(checkpoint)), dtype)
        }
    };
    let files = checkpoint.as_ref().map_or(0, |c| c.fingerprint());
    let mut hasher = std::hash::DefaultHasher::new();
    let kind = site.kind();
    format!("{config:?} {dtype} {kind} {:?} {files:x}", args.weights).hash(&mut hasher);
    let fingerprint = hasher.finish();
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
                fingerprint: model.fingerprint,
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
    let source = match &model.checkpoint {
        Some(checkpoint) => Source::Checkpoint(checkpoint),
        None => Source::Random { seed: 0 },
    };
    let shard = &plan.ranks[group.rank()].shard;
    let limits = Limits {
        max_step_tokens: plan.max_step_tokens,
        max_logit_rows: plan.request.max_seqs,
        n_kv_blocks: plan.n_kv_blocks,
    };
    let (mut predicted, mut host_gbs) = (plan.predicted, None);
    let mut replica: Box<dyn Step> = match model.site {
        Site::Cpu => {
            let place = Place {
                shard,
                limits,
                pool: make_pool(group)?,
                comm: group.take_collective(),
            };
            let known = demand.n_tokens_known;
            Box::new(load_rank(&model.config, source, model.dtype, place, known)?)
        }
        Site::Gpu(cuda) => {
            let ranks = (group.size() > 1).then(|| group.take_collective());
            let parts = gpu::Coming::cuda(*cuda, ranks, model.config.hidden_size)?;
            let threads = pool_share(group).len();
            let host = gpu::Host {
                placement: plan.ranks[group.rank()].placement,
                on_any_rank: !plan.fits(),
                cores: (args.host_share != Some(0.0)).then(|| host_cores(group)),
                share: args.host_share,
                files: model.checkpoint.clone(),
            };
            let bytes = plan.ranks[group.rank()].bytes.weights;
            let bar = logging::byte_bar(bytes, group.rank() == 0);
            let progress = |n| bar.inc(n);
            let mut loaded = gpu::load_rank(
                &model.config,
                source,
                model.dtype,
                shard,
                limits,
                parts,
                host,
                threads,
                &progress,
            )?;
            bar.finish_and_clear();
            say_loaded(&loaded.stats);
            tracing::info!("memory after the load: {}", loaded.memory_line()?);
            if let Some((link, cores)) = loaded.host_rates {
                host_gbs = Some(link + cores);
                predicted = plan.predicted_at(measured_rates(&plan, link, cores))?;
                tracing::info!("by these rates {:.1} ms a token", 1e3 * predicted.tpot_s);
            }
            loaded.warm_up(demand.n_tokens_known)?;
            tracing::info!("memory when warm: {}", loaded.memory_line()?);
            Box::new(Replica::new(
                loaded.backend,
                loaded.model,
                loaded.activations,
                model.config.vocab_size,
                demand.n_tokens_known,
            ))
        }
    };
    if demand.keep_logits {
        replica.keep_logits();
    }
    let scheduler = Scheduler::new(
        plan.n_kv_blocks,
        plan.max_step_tokens,
        plan.request.max_seqs,
        demand.context,
    );
    let report = Report {
        load_s: start.elapsed().as_secs_f64(),
        ranks: report(group, &plan),
        predicted,
        host_gbs,
    };
    Ok((replica, scheduler, report))
}

/// The plan's rates with what one rank has measured of its link and its cores; the others of its node are taken to be alike.
fn measured_rates(plan: &Plan, link: f64, cores: f64) -> plan::Rates {
    let sharers = plan.request.ranks_per_node.min(plan.request.tp_size) as f64;
    let mut rates = plan.request.rates;
    if let Some(gpu) = &mut rates.gpu {
        gpu.link_gbs = plan::Rate::measured(gpu.link_gbs.value.max(link));
    }
    rates.host_read_gbs = plan::Rate::measured(rates.host_read_gbs.value.max(cores * sharers));
    rates.together_gbs = Some(plan::Rate::measured((link + cores) * sharers));
    rates
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
    let parse = |text: &Option<String>| text.as_deref().map(plan::bytes::parse).transpose();
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

/// The ranks on this rank's host that may run on the same CPUs, and its number among them.
fn sharers(group: &Group) -> (usize, usize) {
    let me = &group.hellos()[group.rank()];
    let same = |h: &&Hello| h.host == me.host && h.cpus == me.cpus;
    let ranks: Vec<_> = group.hellos().iter().filter(same).collect();
    let index = ranks.iter().position(|h| h.rank == me.rank);
    (index.unwrap_or(0), ranks.len())
}

/// The cores that are this rank's: ranks on one host with the same CPUs divide them.
fn pool_share(group: &Group) -> Vec<usize> {
    let (index, of) = sharers(group);
    let cores = cpu::physical_cores(&group.hellos()[group.rank()].cpus);
    cpu::share_of_cpus(&cores, index, of)
}

/// The CPUs that multiply a share of what is not on the GPU: all of this rank's but one, which drives the GPU. Unlike
/// arithmetic, reading memory gains from every hardware thread of a core.
fn host_cores(group: &Group) -> gpu::Cores {
    let mine = &group.hellos()[group.rank()].cpus;
    let (index, of) = sharers(group);
    let mut cpus = cpu::share_of_cpus(mine, index, of);
    if cpus.len() >= 4 {
        cpus.remove(0);
    }
    gpu::Cores {
        cpus,
        exclusive: !cpu::oversubscribed(mine, of),
    }
}

/// One thread a core of this rank's share.
fn make_pool(group: &Group) -> Result<Pool> {
    let cores = cpu::physical_cores(&group.hellos()[group.rank()].cpus);
    let share = pool_share(group);
    if cpu::oversubscribed(&cores, sharers(group).1) {
        Pool::sharing(&share)
    } else {
        Pool::new(&share)
    }
}

/// Where one rank's part of a model goes, and what runs it.
pub struct Place<'a> {
    /// Its slice of every divided axis.
    pub shard: &'a Shard,
    /// Sizes of its step buffers and its cache.
    pub limits: Limits,
    /// Its threads.
    pub pool: Pool,
    /// Its connection to the other ranks.
    pub comm: Box<dyn HostCollective>,
}

/// Loads one rank's slices and makes everything ready to step; logits of ids from `n_tokens_known` on are never sampled.
///
/// # Errors
/// Memory or files that fail.
pub fn load_rank(
    config: &ModelConfig,
    source: Source<'_>,
    dtype: Dtype,
    place: Place<'_>,
    n_tokens_known: usize,
) -> Result<Replica<CpuBackend>> {
    let Place {
        shard,
        limits,
        pool,
        comm,
    } = place;
    let matrices = shard.matrices(config, dtype);
    let mut loaded = load_weights(source, &matrices, pool.threads(), shard.tp_rank == 0)?;
    let qwen = Qwen::assemble(config, |name| {
        loaded
            .remove(name)
            .ok_or_else(|| Error::failed(format!("no weight {name} was loaded")))
    })?;
    let (backend, activations) = CpuBackend::new(config, shard, limits, pool, comm);
    Ok(Replica::new(
        backend,
        qwen,
        activations,
        config.vocab_size,
        n_tokens_known,
    ))
}

fn load_weights(
    source: Source<'_>,
    matrices: &[LocalMatrix],
    threads: usize,
    show: bool,
) -> Result<HashMap<String, HostWeight>> {
    let sizes = || matrices.iter().map(LocalMatrix::bytes);
    let mut arena = Arena::new(Arena::bytes_for(sizes()))?;
    let mut weights = matrices
        .iter()
        .map(|m| HostWeight::new(&mut arena, m))
        .collect::<Result<Vec<_>>>()?;
    let mut places: Vec<_> = weights.iter_mut().map(HostWeight::bytes_mut).collect();
    let bar = logging::byte_bar(sizes().sum::<usize>() as u64, show);
    let stats = weights::load(source, matrices, &mut places, threads, &|bytes| {
        bar.inc(bytes)
    })?;
    bar.finish_and_clear();
    say_loaded(&stats);
    Ok(matrices
        .iter()
        .map(|m| m.name.clone())
        .zip(weights)
        .collect())
}

fn say_loaded(stats: &LoadStats) {
    tracing::info!(
        "loaded {} in {:.2} s ({:.2} GB/s)",
        plan::bytes::format(stats.bytes_placed),
        stats.seconds,
        stats.bytes_placed as f64 / stats.seconds / 1e9
    );
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
