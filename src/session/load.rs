//! Behind the plan: one rank loads its slices and is ready to step.

use super::Demand;
use crate::cli::ModelArgs;
use crate::comm::HostCollective;
use crate::config::ModelConfig;
use crate::cpu::{self, CpuBackend, HostWeight, Pool};
use crate::engine::{Replica, Step};
use crate::gpu::{self, cuda::Cuda};
use crate::layout::{Limits, Shard};
use crate::logging;
use crate::model::Qwen;
use crate::plan::{self, Plan, Prediction};
use crate::weights::{self, Arena, Checkpoint, Dtype, LoadStats, LocalMatrix, Source};
use crate::world::{Group, Hello};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// All that decides what this rank loads.
pub(super) struct Loading<'a> {
    pub args: &'a ModelArgs,
    pub config: &'a ModelConfig,
    /// None: random weights.
    pub checkpoint: &'a Option<Arc<Checkpoint>>,
    pub dtype: Dtype,
    pub plan: &'a Plan,
    pub demand: &'a Demand,
    pub group: &'a Group,
}

impl Loading<'_> {
    fn source(&self) -> Source<'_> {
        match self.checkpoint {
            Some(checkpoint) => Source::Checkpoint(checkpoint),
            None => Source::Random { seed: 0 },
        }
    }

    fn rank(&self) -> &plan::RankPlan {
        &self.plan.ranks[self.group.rank()]
    }

    fn limits(&self) -> Limits {
        Limits {
            max_step_tokens: self.plan.max_step_tokens,
            max_logit_rows: self.plan.request.max_seqs,
            n_kv_blocks: self.plan.n_kv_blocks,
        }
    }

    /// Into host memory, for this rank's cores.
    pub fn on_cpu(&self) -> Result<Replica<CpuBackend>> {
        let place = Place {
            shard: &self.rank().shard,
            limits: self.limits(),
            pool: make_pool(self.group)?,
            comm: self.group.take_collective(),
        };
        let known = self.demand.n_tokens_known;
        load_rank(self.config, self.source(), self.dtype, place, known)
    }

    /// Onto a GPU, and where that is too small into host memory; also GB/s of link and cores together, where these
    /// were measured, and how fast the plan says that it should be by what is known then.
    pub fn on_gpu(&self, cuda: Cuda) -> Result<(Box<dyn Step>, Option<f64>, Prediction)> {
        let mut loaded = self.load_gpu(cuda)?;
        tracing::info!("memory after the load: {}", loaded.memory_line()?);
        let (mut predicted, mut host_gbs) = (self.plan.predicted, None);
        if let Some((link, cores)) = loaded.host_rates {
            host_gbs = Some(link + cores);
            predicted = self
                .plan
                .predicted_at(measured_rates(self.plan, link, cores))?;
            tracing::info!("by these rates {:.1} ms a token", 1e3 * predicted.tpot_s);
        }
        let known = self.demand.n_tokens_known;
        loaded.warm_up(known)?;
        tracing::info!("memory when warm: {}", loaded.memory_line()?);
        let replica = Replica::new(
            loaded.backend,
            loaded.model,
            loaded.activations,
            self.config.vocab_size,
            known,
        );
        Ok((Box::new(replica), host_gbs, predicted))
    }

    fn load_gpu(&self, cuda: Cuda) -> Result<gpu::LoadedRank> {
        let (args, group, rank) = (self.args, self.group, self.rank());
        let ranks = (group.size() > 1).then(|| group.take_collective());
        let parts = gpu::Coming::cuda(cuda, ranks, self.config.hidden_size)?;
        let host = gpu::Host {
            placement: rank.placement,
            on_any_rank: !self.plan.fits(),
            cores: (args.host_share != Some(0.0)).then(|| host_cores(group)),
            share: args.host_share,
            files: self.checkpoint.clone(),
        };
        let bar = logging::byte_bar(rank.bytes.weights, group.rank() == 0);
        let loaded = gpu::load_rank(
            self.config,
            self.source(),
            self.dtype,
            &rank.shard,
            self.limits(),
            parts,
            host,
            pool_share(group).len(),
            &|n| bar.inc(n),
        )?;
        bar.finish_and_clear();
        say_loaded(&loaded.stats);
        Ok(loaded)
    }
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
pub(super) fn make_pool(group: &Group) -> Result<Pool> {
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
        crate::bytes::format(stats.bytes_placed),
        stats.seconds,
        stats.bytes_placed as f64 / stats.seconds / 1e9
    );
}
