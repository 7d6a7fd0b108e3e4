//! Which rows of a GPU rank's matrices stay on the device, which lie in pinned host memory and which in the files.
//!
//! In this order: everything on the GPU; an embedding that is only looked up in pinned memory; the same fraction of all
//! other matrices, so that link and cores have something to do in every layer. What host memory cannot hold of the rest
//! is left in the files, again the same fraction of every matrix.
//!
//! [`fill`] takes granules of rows in one fixed order, as long as they fit. So more room never holds fewer bytes: where
//! two fillings part, the one with more room takes a granule that the other has no room for.

use super::gpu::{DEVICE_PAGE, GpuNeed, Rows};
use crate::layout::RING_BYTES;
use crate::layout::{CUT_ROWS, KINDS};

/// The embedding's place in [`KINDS`].
const EMBED: usize = 0;

/// What becomes of the embedding where not everything fits; it never lies in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Embed {
    /// It is cut as the others are, where it is the head as well, else it leaves the GPU first.
    Leaves,
    /// It stays on the GPU, for want of pinned memory.
    Stays,
}

/// The rows that stay on the device with `limit` bytes of memory; `None` where even those that must do not fit.
pub(super) fn resident(need: &GpuNeed, limit: Option<u64>, embed: Embed) -> Option<Rows> {
    let all = need.rows();
    let Some(limit) = limit else {
        return Some(all);
    };
    let takes = |rows: &Rows, offloaded| {
        need.weights_on_device(rows)
            .saturating_add(need.besides_weights(offloaded))
    };
    if takes(&all, false) <= limit {
        return Some(all);
    }
    // What is set aside is not cut: it lies wholly on the device, or wholly off it.
    let mut aside = [0; KINDS.len()];
    let mut cut = all;
    if embed == Embed::Stays || !need.tied {
        cut[EMBED] = 0;
    }
    if embed == Embed::Stays {
        aside[EMBED] = all[EMBED];
    }
    if takes(&aside, true) > limit {
        return None;
    }
    let pages = (limit - need.besides_weights(true)) / DEVICE_PAGE * DEVICE_PAGE;
    let unpaged = need.vectors + need.kinds[EMBED].on_device(aside[EMBED]);
    let filled = fill(&cut, pages - unpaged, |kind, rows| {
        need.kinds[kind].on_device(rows)
    });
    Some(std::array::from_fn(|i| aside[i] + filled[i]))
}

/// What the ranks of a node ask of its host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostAsk {
    /// Bytes of all rows that are not on the device.
    pub wanted: u64,
    /// Those of them that cannot lie in files.
    pub least: u64,
    /// Staging that the rank needs in any case.
    pub staging: u64,
}

impl HostAsk {
    pub fn new(need: &GpuNeed, resident: &Rows) -> HostAsk {
        let off = offloaded(need, resident);
        let wanted = need.pinned(&off);
        HostAsk {
            wanted,
            least: need.kinds[EMBED].pinned(off[EMBED]),
            staging: need.staging + if wanted > 0 { need.hand_over } else { 0 },
        }
    }
}

/// Bytes that each rank of a node may pin for weights when together they may fill `host`; `None` where that is too
/// little, given whether there are `files` for the rest.
///
/// All are met, or all that want more than they must have are short in the same proportion: no rank waits for another
/// that has more to read from files.
pub(super) fn shares(host: u64, asks: &[HostAsk], files: bool) -> Option<Vec<u64>> {
    let sum = |of: &dyn Fn(&HostAsk) -> u64| asks.iter().map(|a| u128::from(of(a))).sum::<u128>();
    let room = u128::from(host).checked_sub(sum(&|a| a.staging))?;
    if let Some(left) = room.checked_sub(sum(&|a| a.wanted)) {
        let extra = (left / asks.len().max(1) as u128) as u64;
        return Some(asks.iter().map(|a| a.wanted + extra).collect());
    }
    if !files {
        return None;
    }
    let rings = sum(&|a| {
        if a.wanted > 0 { RING_BYTES } else { 0 }
    });
    let left = room.checked_sub(rings)?.checked_sub(sum(&|a| a.least))?;
    // Not 0: what is wanted is more than what there is, and that is no less than what must be.
    let optional = sum(&|a| a.wanted - a.least).max(1);
    let more = |a: &HostAsk| (left * u128::from(a.wanted - a.least) / optional) as u64;
    Some(
        asks.iter()
            .map(|a| (a.least + more(a)).min(a.wanted))
            .collect(),
    )
}

/// The rows that are pinned when `share` bytes may be.
pub(super) fn pinned(need: &GpuNeed, resident: &Rows, share: u64) -> Rows {
    let mut cut = offloaded(need, resident);
    let embed = std::mem::take(&mut cut[EMBED]);
    let room = share.saturating_sub(need.kinds[EMBED].pinned(embed));
    let mut rows = fill(&cut, room, |kind, rows| need.kinds[kind].pinned(rows));
    rows[EMBED] = embed;
    rows
}

fn offloaded(need: &GpuNeed, resident: &Rows) -> Rows {
    std::array::from_fn(|i| need.kinds[i].rows - resident[i])
}

/// Steps in which [`fill`] looks for the fraction that fits.
const LEVELS: u64 = 1 << 20;

/// As many rows of each kind as fit `room` bytes, the same fraction of all, and then as many granules more as fit, the
/// kinds with the smallest fraction first. `bytes(kind, rows)` says what rows take.
fn fill(all: &Rows, room: u64, bytes: impl Fn(usize, usize) -> u64) -> Rows {
    let granules = all.map(|rows| rows.div_ceil(CUT_ROWS) as u64);
    let rows_of = |kind: usize, n: u64| all[kind].min(n as usize * CUT_ROWS);
    let at = |level: u64| granules.map(|n| n * level / LEVELS);
    let size = |taken: &[u64; KINDS.len()]| -> u64 {
        let kinds = taken.iter().enumerate();
        kinds.map(|(kind, &n)| bytes(kind, rows_of(kind, n))).sum()
    };
    if size(&granules) <= room {
        return *all;
    }
    let (mut fits, mut too_much) = (0, LEVELS);
    while too_much - fits > 1 {
        let middle = fits.midpoint(too_much);
        if size(&at(middle)) <= room {
            fits = middle;
        } else {
            too_much = middle;
        }
    }
    let mut taken = at(fits);
    let mut used = size(&taken);
    let mut open: Vec<usize> = (0..KINDS.len())
        .filter(|&kind| taken[kind] < granules[kind])
        .collect();
    // The next in the fixed order is the one whose fraction is the smallest once it is taken.
    let fraction = |&kind: &usize, taken: &[u64; KINDS.len()]| {
        // Rounded up, so that what a level takes is the beginning of this order.
        (u128::from(taken[kind] + 1) * u128::from(LEVELS) * u128::from(LEVELS))
            .div_ceil(u128::from(granules[kind]))
    };
    while let Some(kind) = open.iter().copied().min_by_key(|k| fraction(k, &taken)) {
        let more =
            bytes(kind, rows_of(kind, taken[kind] + 1)) - bytes(kind, rows_of(kind, taken[kind]));
        let fits = used + more <= room;
        if fits {
            taken[kind] += 1;
            used += more;
        }
        if !fits || taken[kind] == granules[kind] {
            open.retain(|&k| k != kind);
        }
    }
    std::array::from_fn(|kind| rows_of(kind, taken[kind]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kinds() -> impl Strategy<Value = ([usize; 6], [u64; 6])> {
        (
            prop::array::uniform6(0usize..500),
            prop::array::uniform6(0u64..50),
        )
    }

    proptest! {
        #[test]
        fn more_room_never_holds_less(
            (all, row_bytes) in any_kinds(), room in 0u64..60_000, more in 0u64..5_000,
        ) {
            let bytes = |kind: usize, rows: usize| rows as u64 * row_bytes[kind];
            let size = |rows: &Rows| (0..6).map(|k| bytes(k, rows[k])).sum::<u64>();
            let (a, b) = (fill(&all, room, bytes), fill(&all, room + more, bytes));
            prop_assert!(size(&a) <= room && size(&b) <= room + more);
            prop_assert!(size(&b) >= size(&a), "{:?} {:?}", a, b);
            for kind in 0..6 {
                prop_assert!(a[kind].is_multiple_of(CUT_ROWS) || a[kind] == all[kind]);
            }
            // Filled well: no kind has room for a granule more.
            for kind in (0..6).filter(|&k| a[k] < all[k]) {
                let next = (a[kind] + CUT_ROWS).min(all[kind]);
                prop_assert!(size(&a) + bytes(kind, next) - bytes(kind, a[kind]) > room);
            }
        }

        #[test]
        fn shares_never_pass_the_node(
            host in 0u64..2_000_000_000,
            asks in prop::collection::vec((0u64..1_000_000_000, 0u64..100, 0u64..200_000_000), 1..9),
            files: bool,
        ) {
            let ask = |&(wanted, part, staging): &(u64, u64, u64)| HostAsk {
                wanted, least: wanted / 100 * part, staging,
            };
            let asks: Vec<HostAsk> = asks.iter().map(ask).collect();
            let Some(shares) = shares(host, &asks, files) else { return Ok(()) };
            let mut sum = 0;
            for (share, ask) in shares.iter().zip(&asks) {
                prop_assert!(*share >= ask.least && (files || *share >= ask.wanted));
                let ring = if *share < ask.wanted { RING_BYTES } else { 0 };
                sum += share + ask.staging + ring;
            }
            prop_assert!(sum <= host);
        }
    }
}
