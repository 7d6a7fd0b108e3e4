//! The ceilings of the ranks' machine, measured by the ranks in the places that a model would have.

use super::Site;
use super::load::make_pool;
use crate::bench::ceilings::{
    AllReduce, AtStart, Ceilings, DECODE_ROWS, GpuCeilings, LARGE_SUMS, RankCeilings,
};
use crate::cli::ProbeArgs;
use crate::comm::HostCollective;
use crate::cpu::{Pool, ReadBuffer, STREAMS, measure_fma_rate};
use crate::gpu::probe::{Probe, Sizes};
use crate::gpu::{Parts, cuda::Cuda};
use crate::panics::caught;
use crate::world::{Group, Hello, MeetOptions};
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// Host memory that the ranks of a machine read together, in bytes: several times any last-level cache.
const HOST_BYTES: usize = 1 << 30;
/// Passes over it; the best counts.
const HOST_PASSES: usize = 5;
/// Seconds that sums of one size over CPU ranks are repeated for.
const SUM_S: f64 = 0.05;

/// Measures on every rank; rank 0 gets what all have found.
///
/// # Errors
/// The first failure of any rank, on every rank.
pub fn probe(args: &ProbeArgs) -> Result<Option<Ceilings>> {
    if !(1..=1 << 24).contains(&args.hidden) {
        return Err(Error::usage(format!(
            "--hidden {}: must be 1 to 16777216",
            args.hidden
        )));
    }
    let world = super::start_world(args.ranks, &args.rank)?;
    let site = Site::choose(args.device, &world);
    let hello = Hello::new(world.rank);
    let hello = match &site {
        Ok(site) => Hello {
            fingerprint: (args.hidden as u64) << 1 | u64::from(matches!(site, Site::Gpu(_))),
            ..site.describe(hello, world.local_size.unwrap_or(1))
        },
        Err(e) => hello.with_error(e),
    };
    let options = MeetOptions {
        timeout: Duration::from_secs(args.rendezvous_timeout),
        ..MeetOptions::default()
    };
    let group = Group::meet(&world, hello, &options)?;
    let site = site?;
    let measured = caught(|| match site {
        Site::Cpu => on_cores(&group, args.hidden),
        Site::Gpu(device) => on_gpus(&group, *device, args.hidden),
    });
    match measured {
        Ok(ceilings) => {
            let mine = (group.rank() == 0).then_some(ceilings);
            group.finish().map(|()| mine)
        }
        Err(e) => Err(group.fail(e)),
    }
}

fn on_cores(group: &Group, hidden: usize) -> Result<Ceilings> {
    let pool = make_pool(group)?;
    let mut ranks = group.take_collective();
    ranks.all_reduce(&mut [0.0])?;
    let mine = [host_read_gbs(group, &pool), measure_fma_rate(&pool)].map(|v| v as f32);
    let mut all = vec![0.0; 2 * group.size()];
    ranks.all_gather(&mine, &vec![2; group.size()], &mut all)?;
    let mut sums = Vec::new();
    if group.size() > 1 {
        let decode = DECODE_ROWS.map(|rows| (Some(rows), rows * hidden));
        let large = LARGE_SUMS.map(|bytes| (None, bytes / 4));
        for (rows, n) in decode.into_iter().chain(large) {
            sums.push(AllReduce {
                bytes: 4 * n,
                rows,
                fused_us: None,
                library_us: host_sum_us(&mut *ranks, n)?,
                at_start: None,
            });
        }
    }
    let rank = |(r, f): (usize, &[f32; 2])| RankCeilings {
        host_read_gbs: f[0].into(),
        host_gflops: f[1].into(),
        ..unmeasured(&group.hellos()[r])
    };
    Ok(Ceilings {
        hidden,
        collective: ranks.name().to_owned(),
        ranks: all.as_chunks().0.iter().enumerate().map(rank).collect(),
        all_reduce: sums,
    })
}

/// A rank as it has described itself, before any figure.
fn unmeasured(hello: &Hello) -> RankCeilings {
    RankCeilings {
        host: hello.host.clone(),
        device: hello.device.clone(),
        memory: hello.memory,
        gpu_uuid: hello.gpu_uuid.clone(),
        gpu: None,
        host_read_gbs: 0.0,
        host_gflops: 0.0,
    }
}

/// Median time of a sum of `n` numbers over the ranks, in microseconds.
fn host_sum_us(ranks: &mut dyn HostCollective, n: usize) -> Result<f64> {
    let mut x = vec![0.0; n];
    let mut once = |ranks: &mut dyn HostCollective| -> Result<f64> {
        let start = Instant::now();
        ranks.all_reduce(&mut x)?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The ranks take the same number of turns: the one that follows from the slowest first guess.
    once(ranks)?;
    let mut guess = vec![0.0; ranks.size()];
    let mine = [once(ranks)? as f32];
    ranks.all_gather(&mine, &vec![1; ranks.size()], &mut guess)?;
    let slowest = guess.iter().copied().fold(1e-6, f32::max);
    let turns = ((SUM_S / f64::from(slowest)) as usize).clamp(5, 1000);
    let mut times = (0..turns)
        .map(|_| once(ranks))
        .collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[turns / 2] * 1e6)
}

fn host_buffer(group: &Group, pool: &Pool) -> ReadBuffer {
    let sharers = group.local_rank_and_size().1.max(1);
    ReadBuffer::new(pool, HOST_BYTES / sharers)
}

fn host_read_gbs(group: &Group, pool: &Pool) -> f64 {
    best_pass(&mut host_buffer(group, pool), pool)
}

fn best_pass(buffer: &mut ReadBuffer, pool: &Pool) -> f64 {
    let passes = (0..HOST_PASSES).flat_map(|_| STREAMS);
    let best = passes.fold(f64::INFINITY, |best, streams| {
        best.min(buffer.pass(pool, streams))
    });
    buffer.bytes() as f64 / best / 1e9
}

/// What one GPU rank has measured, as it goes over the wire: the fields of [`GpuCeilings`], then those of the host.
const N_FIGURES: usize = 8;

fn on_gpus(group: &Group, device: Cuda, hidden: usize) -> Result<Ceilings> {
    let ranks = (group.size() > 1).then(|| group.take_collective());
    let parts = Parts::cuda(device, ranks, hidden)?;
    let pool = make_pool(group)?;
    let mut probe = Probe::new(parts, Sizes::FULL);
    let mine = measure_gpu(group, &mut probe, &pool)?.map(|v| v as f32);
    let all = probe.gather(&mine, &vec![N_FIGURES; group.size()])?;
    let all_reduce = if group.size() > 1 {
        gpu_sums(&mut probe, hidden)?
    } else {
        Vec::new()
    };
    let rank = |(r, f): (usize, &[f32; N_FIGURES])| {
        let f = f.map(f64::from);
        RankCeilings {
            gpu: Some(GpuCeilings {
                read_gbs: f[0],
                gemm_tflops: f[1],
                link_gbs: f[2],
                link_all_gbs: f[3],
                link_beside_cores_gbs: f[4],
                cores_beside_link_gbs: f[5],
            }),
            host_read_gbs: f[6],
            host_gflops: f[7],
            ..unmeasured(&group.hellos()[r])
        }
    };
    Ok(Ceilings {
        hidden,
        collective: probe.collective_name().to_owned(),
        ranks: all.as_chunks().0.iter().enumerate().map(rank).collect(),
        all_reduce,
    })
}

fn measure_gpu(group: &Group, probe: &mut Probe, pool: &Pool) -> Result<[f64; N_FIGURES]> {
    let (rank, size) = (group.rank(), group.size());
    let all = vec![1; size];
    let read = probe.read_gbs()?;
    let gemm = probe.gemm_tflops()?;
    let mut link = 0.0;
    for turn in 0..size {
        probe.gather(&[0.0], &all)?;
        if turn == rank {
            link = probe.link_gbs()?;
        }
    }
    probe.gather(&[0.0], &all)?;
    let link_all = probe.link_gbs()?;
    let gflops = measure_fma_rate(pool);
    let mut buffer = host_buffer(group, pool);
    probe.gather(&[0.0], &all)?;
    let host = best_pass(&mut buffer, pool);
    probe.gather(&[0.0], &all)?;
    let (beside_cores, beside_link) = probe.link_beside(link_all, || {
        buffer.pass(pool, STREAMS[1]);
        buffer.bytes()
    })?;
    Ok([
        read,
        gemm,
        link,
        link_all,
        beside_cores,
        beside_link,
        host,
        gflops,
    ])
}

fn gpu_sums(probe: &mut Probe, hidden: usize) -> Result<Vec<AllReduce>> {
    let decode = DECODE_ROWS.map(|rows| (Some(rows), 2 * rows * hidden));
    let large = LARGE_SUMS.map(|bytes| (None, bytes));
    let one = |(rows, bytes): (Option<usize>, usize)| -> Result<AllReduce> {
        let fused_us = match rows {
            Some(rows) => probe.fused_all_reduce_us(rows, hidden)?,
            None => None,
        };
        Ok(AllReduce {
            bytes,
            rows,
            fused_us,
            library_us: probe.all_reduce_us(bytes)?,
            at_start: rows.and_then(|rows| probe.way(rows)).map(|w| AtStart {
                fused_us: w.fused_us,
                library_us: w.library_us,
                is_fused: w.is_fused(),
            }),
        })
    };
    decode.into_iter().chain(large).map(one).collect()
}
