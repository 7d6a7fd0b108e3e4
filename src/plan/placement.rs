//! Budgets, and which memory holds the bytes of each rank: its GPU, its node's host memory, or the model's files.

use super::gpu::GpuNeed;
use super::offload::{self, Embed, HostAsk};
use super::{RankBytes, Request};
use crate::bytes;
use crate::layout::Placement;
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

/// Bytes of a rank by the memory that holds them; `device`, `host` and `file` together are all its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tiers {
    /// In its GPU's memory: weights, KV cache, step buffers, ring, peer memory and runtime.
    pub device: u64,
    /// In host memory: pinned weights and staging; everything of a CPU rank.
    pub host: u64,
    /// Weights left in the model's files and read from there in every step.
    pub file: u64,
    /// The weights of `device`.
    pub weights_on_device: u64,
    /// The weights of `host` that a GPU rank reads there.
    pub weights_pinned: u64,
}

/// Where a rank's bytes lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub placement: Placement,
    pub bytes: RankBytes,
    pub budget: Budget,
    pub tiers: Tiers,
}

/// CPU ranks: everything lies in host memory, which the ranks of a node divide by need.
///
/// # Errors
/// More than the node's memory, with the numbers per rank.
pub(super) fn on_cpu(request: &Request, ranks: &[(RankBytes, Placement)]) -> Result<Vec<Placed>> {
    let mut placed = Vec::with_capacity(ranks.len());
    for node in ranks.chunks(request.ranks_per_node) {
        let ask = |(r, _): &(RankBytes, Placement)| HostAsk {
            wanted: r.total,
            least: r.total,
            staging: 0,
        };
        let asks: Vec<HostAsk> = node.iter().map(ask).collect();
        let shares = match request.host_memory {
            None => None,
            Some(host) => Some(offload::shares(host, &asks, false).ok_or_else(|| {
                let all: Vec<RankBytes> = ranks.iter().map(|r| r.0).collect();
                Error::failed(format!(
                    "{}: over the {} of host memory that the {} of a node may fill; raise --host-memory, or lower --context, or spread over more nodes",
                    needs(&all, |r| r.total),
                    bytes::format(host),
                    super::count(node.len(), "rank"),
                ))
            })?),
        };
        for (i, (bytes, placement)) in node.iter().enumerate() {
            placed.push(Placed {
                placement: *placement,
                bytes: *bytes,
                budget: Budget {
                    device: None,
                    host: shares.as_ref().map(|s| s[i]),
                },
                tiers: Tiers {
                    device: 0,
                    host: bytes.total,
                    file: 0,
                    weights_on_device: 0,
                    weights_pinned: 0,
                },
            });
        }
    }
    Ok(placed)
}

/// GPU ranks: what fits stays on the device, the rest goes to host memory and, where that is short, to the files.
///
/// # Errors
/// A device too small for what never leaves it, or a node too small for what then has to lie in its memory, with the
/// numbers.
pub(super) fn on_gpu(request: &Request, ranks: &[GpuNeed]) -> Result<Vec<Placed>> {
    let mut placed = Vec::with_capacity(ranks.len());
    for node in ranks.chunks(request.ranks_per_node) {
        let found = [Embed::Leaves, Embed::Stays]
            .into_iter()
            .find_map(|embed| place_node(request, node, embed));
        placed.extend(found.ok_or_else(|| refusal(request, ranks, node))?);
    }
    Ok(placed)
}

fn place_node(request: &Request, node: &[GpuNeed], embed: Embed) -> Option<Vec<Placed>> {
    let resident = node
        .iter()
        .map(|need| offload::resident(need, request.gpu_memory, embed))
        .collect::<Option<Vec<_>>>()?;
    let asks: Vec<HostAsk> = node
        .iter()
        .zip(&resident)
        .map(|(need, rows)| HostAsk::new(need, rows))
        .collect();
    let shares = match request.host_memory {
        None => None,
        Some(host) => Some(offload::shares(host, &asks, request.files)?),
    };
    let place = |(i, (need, resident)): (usize, (&GpuNeed, &_))| {
        let share = shares.as_ref().map(|s| s[i]);
        let pinned = offload::pinned(need, resident, share.unwrap_or(u64::MAX));
        let (placement, bytes, tiers) = need.bytes(resident, &pinned);
        Placed {
            placement,
            bytes,
            budget: Budget {
                device: request.gpu_memory,
                host: share.map(|share| share.saturating_add(bytes.staging)),
            },
            tiers,
        }
    };
    Some(node.iter().zip(&resident).enumerate().map(place).collect())
}

fn refusal(request: &Request, ranks: &[GpuNeed], node: &[GpuNeed]) -> Error {
    let least = |need: &GpuNeed| need.bytes(&need.rows(), &Default::default()).1;
    let gpu = request.gpu_memory.unwrap_or(u64::MAX);
    if ranks.iter().any(|need| need.least_on_device() > gpu) {
        let all: Vec<RankBytes> = ranks.iter().map(least).collect();
        let fixed: Vec<u64> = ranks.iter().map(GpuNeed::least_on_device).collect();
        let most = fixed.iter().max().copied().unwrap_or(0);
        return Error::failed(format!(
            "{}; {} of a rank can never leave the GPU, and --gpu-memory is {}: raise it, lower --context, or use more ranks",
            needs(&all, |r| r.total - r.staging),
            bytes::format(most),
            bytes::format(gpu),
        ));
    }
    let wanted = |need: &GpuNeed| {
        let rows = offload::resident(need, request.gpu_memory, Embed::Leaves);
        rows.map_or(0, |rows| HostAsk::new(need, &rows).wanted)
    };
    let staging: u64 = node.iter().map(|need| need.staging).sum();
    let rest: u64 = node.iter().map(wanted).sum();
    Error::failed(format!(
        "{} of weights that do not fit the GPUs and {} of staging for the {} of a node: over the {} of host memory that they may fill{}; raise --host-memory or --gpu-memory, or use more ranks",
        bytes::format(rest),
        bytes::format(staging),
        super::count(node.len(), "rank"),
        bytes::format(request.host_memory.unwrap_or(0)),
        if request.files {
            ""
        } else {
            ", and random weights have no files to read the rest from"
        },
    ))
}

/// `rank 0 needs 1.20 GiB (weights …), ranks 1-3 need each …`
fn needs(ranks: &[RankBytes], of: impl Fn(&RankBytes) -> u64) -> String {
    let groups = super::fold(ranks, |r| *r);
    let line = |(r, members): &(RankBytes, Vec<usize>)| {
        let parts = r.parts();
        let parts: Vec<String> = parts
            .iter()
            .filter(|(what, n)| *n > 0 && *what != "staging")
            .map(|(what, n)| format!("{what} {}", bytes::format(*n)))
            .collect();
        let need = if members.len() == 1 {
            "needs"
        } else {
            "need each"
        };
        format!(
            "{} {need} {} ({})",
            super::rank_list(members),
            bytes::format(of(r)),
            parts.join(", "),
        )
    };
    groups.iter().map(line).collect::<Vec<_>>().join(", ")
}
