//! Which memory holds the bytes of each rank: its GPU, then its node's host memory, then the model's files.

use super::{DeviceKind, RankBytes, Request, bytes};
use crate::{Error, Result};
use serde::Serialize;

/// What a rank may fill, in bytes; `None` where there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Budget {
    /// Its GPU's memory.
    pub device: Option<u64>,
    /// Its share of the node's memory, which the ranks of a node divide by what each of them needs.
    pub host: Option<u64>,
}

/// Bytes of a rank by the memory that holds them; together they are all its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tiers {
    /// In its GPU's memory.
    pub device: u64,
    /// In host memory.
    pub host: u64,
    /// Left in the model's files and read from there in every step.
    pub file: u64,
}

/// The budget of every rank and where its bytes lie.
///
/// # Errors
/// CPU ranks that overfill their node's memory, and GPUs too small for the KV cache and the step buffers, which never
/// leave the device; with the numbers per rank.
pub fn place(request: &Request, ranks: &[RankBytes]) -> Result<Vec<(Budget, Tiers)>> {
    let gpu = match request.device {
        DeviceKind::Cuda => request.gpu_memory,
        DeviceKind::Cpu => Some(0),
    };
    let mut placed = Vec::with_capacity(ranks.len());
    for node in ranks.chunks(request.ranks_per_node) {
        let need = |r: &RankBytes| r.total.saturating_sub(gpu.unwrap_or(u64::MAX));
        let node_need: u128 = node.iter().map(|r| u128::from(need(r))).sum();
        for rank in node {
            let budget = Budget {
                device: request.gpu_memory,
                host: request
                    .host_memory
                    .map(|host| share(host, need(rank), node_need, node.len())),
            };
            placed.push((budget, tiers(rank.total, gpu, budget.host)));
        }
    }
    refuse_overfull(request, ranks, &placed)?;
    Ok(placed)
}

/// A rank's part of its node's host memory, by need. All needs are met or all are short in the same proportion: no rank
/// waits for another that has more bytes to fetch than its share.
fn share(host: u64, need: u64, node_need: u128, n_ranks: usize) -> u64 {
    let part = match node_need {
        0 => u128::from(host) / n_ranks as u128,
        _ => u128::from(host) * u128::from(need) / node_need,
    };
    part as u64
}

/// Fills the fastest memory first.
fn tiers(total: u64, device: Option<u64>, host: Option<u64>) -> Tiers {
    let on_device = total.min(device.unwrap_or(u64::MAX));
    let on_host = (total - on_device).min(host.unwrap_or(u64::MAX));
    Tiers {
        device: on_device,
        host: on_host,
        file: total - on_device - on_host,
    }
}

fn refuse_overfull(
    request: &Request,
    ranks: &[RankBytes],
    placed: &[(Budget, Tiers)],
) -> Result<()> {
    let stays = |r: &RankBytes| match request.device {
        DeviceKind::Cpu => r.total,
        DeviceKind::Cuda => r.kv.saturating_add(r.activations),
    };
    let fits = |(rank, (budget, tiers)): (&RankBytes, &(Budget, Tiers))| match request.device {
        DeviceKind::Cpu => tiers.file == 0,
        DeviceKind::Cuda => budget.device.is_none_or(|device| stays(rank) <= device),
    };
    if ranks.iter().zip(placed).all(fits) {
        return Ok(());
    }
    Err(Error::failed(match request.device {
        DeviceKind::Cpu => format!(
            "{}: over the {} of host memory that the {} of a node may fill; raise --host-memory, or lower --context, or spread over more nodes",
            needs(ranks, |r| r.total),
            bytes::format(request.host_memory.unwrap_or(0)),
            super::count(request.ranks_per_node.min(ranks.len()), "rank"),
        ),
        DeviceKind::Cuda => format!(
            "{}: the KV cache and the step buffers stay on the GPU, and --gpu-memory is {}; lower --context, or use more ranks",
            needs(ranks, stays),
            bytes::format(request.gpu_memory.unwrap_or(0)),
        ),
    }))
}

/// `rank 0 needs 1.20 GiB (weights …), ranks 1-3 need …`
fn needs(ranks: &[RankBytes], of: impl Fn(&RankBytes) -> u64) -> String {
    let groups = super::fold(ranks, |r| *r);
    let line = |(r, members): &(RankBytes, Vec<usize>)| {
        format!(
            "{} {} {} (weights {}, KV cache {}, step buffers {})",
            super::rank_list(members),
            if members.len() == 1 {
                "needs"
            } else {
                "need each"
            },
            bytes::format(of(r)),
            bytes::format(r.weights),
            bytes::format(r.kv),
            bytes::format(r.activations),
        )
    };
    groups.iter().map(line).collect::<Vec<_>>().join(", ")
}
