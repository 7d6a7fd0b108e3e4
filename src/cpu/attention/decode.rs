//! Attention for a few query rows: the lanes of a vector are elements of a head, so that none idles.
//!
//! With query rows as lanes, a decode step would use as many lanes of sixteen as heads share a KV head (3 for SmolLM2, 7 for
//! Qwen2.5-7B). Here keys and values are read as vectors, once for all rows; the sums across lanes that scores need are
//! sixteen at a time, by a transposition. (SmolLM2, one token after 512, one Zen 4 core: 32 µs a layer, 68 µs with rows as lanes.)

use super::super::simd::{MAX_LANES, Simd, prefetch};
use super::{CHUNK, MASKED};
use crate::layout::KV_BLOCK;

/// Most rows that this way serves.
pub(super) const MAX_ROWS: usize = 8;

/// What the rows of a task attend to.
pub(super) struct Narrow<'a> {
    pub(super) head_dim: usize,
    pub(super) k_cache: &'a [f32],
    pub(super) v_cache: &'a [f32],
    /// Of each row: how many positions it may see.
    pub(super) limits: [usize; MAX_ROWS],
}

/// The running state of up to [`MAX_ROWS`] rows.
pub(super) struct NarrowState<'a> {
    /// `[row][head_dim]`, scaled.
    pub(super) queries: &'a [f32],
    /// `[row][head_dim]`.
    pub(super) sums: &'a mut [f32],
    pub(super) maximum: [f32; MAX_ROWS],
    pub(super) total: [f32; MAX_ROWS],
}

/// Where a chunk's blocks lie in the cache, and the one after them.
type Offsets = [usize; CHUNK / KV_BLOCK + 1];

/// Scores, then weights, of a chunk's positions.
type Scores = [[f32; CHUNK]; MAX_ROWS];

impl Narrow<'_> {
    /// Adds the positions `start..start + n`, which lie in the cache at `offsets`.
    #[inline(always)]
    pub(super) fn chunk<S: Simd>(
        &self,
        s: S,
        rows: usize,
        state: &mut NarrowState<'_>,
        offsets: &Offsets,
        start: usize,
        n: usize,
    ) {
        match rows {
            1 => self.rows::<S, 1>(s, state, offsets, start, n),
            2 => self.rows::<S, 2>(s, state, offsets, start, n),
            3 => self.rows::<S, 3>(s, state, offsets, start, n),
            4 => self.rows::<S, 4>(s, state, offsets, start, n),
            5 => self.rows::<S, 5>(s, state, offsets, start, n),
            6 => self.rows::<S, 6>(s, state, offsets, start, n),
            7 => self.rows::<S, 7>(s, state, offsets, start, n),
            _ => self.rows::<S, MAX_ROWS>(s, state, offsets, start, n),
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const R: usize>(
        &self,
        s: S,
        state: &mut NarrowState<'_>,
        offsets: &Offsets,
        start: usize,
        n: usize,
    ) {
        let mut scores: Scores = [[MASKED; CHUNK]; MAX_ROWS];
        for first in (0..n).step_by(S::LANES) {
            let (block, within) = (first / KV_BLOCK, first % KV_BLOCK * self.head_dim);
            let at = [offsets[block] + within, offsets[block + 1] + within];
            let count = S::LANES.min(n - first);
            self.scores::<S, R>(s, state, at, first, count, &mut scores);
        }
        for (r, scores) in scores.iter_mut().enumerate().take(R) {
            let visible = self.limits[r].saturating_sub(start).min(n);
            scores[visible..].fill(MASKED);
            let factor = self.weigh(s, scores, state, r);
            for sum in &mut state.sums[r * self.head_dim..][..self.head_dim] {
                *sum *= factor;
            }
        }
        let mut lane = 0;
        while lane < self.head_dim {
            let left = self.head_dim - lane;
            lane += if left >= 2 * S::LANES {
                self.values::<S, R, 2>(s, state, offsets, lane, n, &scores)
            } else {
                self.values::<S, R, 1>(s, state, offsets, lane, n, &scores)
            };
        }
    }

    /// The scores of `count` positions that lie one after the other from `at`, into `scores[row][first..]`.
    ///
    /// On the way it asks for what is read next: these positions' values, and the keys of the block at `next`. Blocks are
    /// scattered and short, so hardware prefetchers come late. (SmolLM2 at 550 positions, cache in memory, one Zen 4 core,
    /// a step of 15 ms: attention takes 3.8 ms with this, 4.5 ms without, where the memory's bandwidth would allow 1.)
    #[inline(always)]
    fn scores<S: Simd, const R: usize>(
        &self,
        s: S,
        state: &NarrowState<'_>,
        [at, next]: [usize; 2],
        first: usize,
        count: usize,
        scores: &mut Scores,
    ) {
        let hd = self.head_dim;
        let keys = &self.k_cache[at..at + count * hd];
        let queries = &state.queries[..R * hd];
        let mut sums = [[0.0; MAX_LANES * MAX_LANES]; R];
        let mut turned = [0.0; MAX_LANES * MAX_LANES];
        // SAFETY: the slices above bound what is read; `hd` is a multiple of `LANES`, and so is every offset.
        unsafe {
            for p in 0..count {
                let mut acc = [s.zero(); R];
                let key = keys.as_ptr().add(p * hd);
                prefetch(self.v_cache.as_ptr().wrapping_add(at + p * hd), hd);
                prefetch(self.k_cache.as_ptr().wrapping_add(next + p * hd), hd);
                for lane in (0..hd).step_by(S::LANES) {
                    let k = s.load(key.add(lane));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let q = s.load(queries.as_ptr().add(r.wrapping_mul(hd)).add(lane));
                        *acc = s.fma(q, k, *acc);
                    }
                }
                for (sums, acc) in sums.iter_mut().zip(acc) {
                    s.store(sums.as_mut_ptr().add(p * S::LANES), acc);
                }
            }
            for (sums, scores) in sums.iter().zip(scores) {
                s.transpose(sums.as_ptr(), S::LANES, turned.as_mut_ptr(), S::LANES);
                let mut total = s.zero();
                for i in 0..S::LANES {
                    total = s.add(total, s.load(turned.as_ptr().add(i * S::LANES)));
                }
                s.store(scores[first..first + S::LANES].as_mut_ptr(), total);
            }
        }
    }

    /// Turns a row's scores into weights; returns the factor on what was summed before.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        s: S,
        scores: &mut [f32; CHUNK],
        state: &mut NarrowState<'_>,
        r: usize,
    ) -> f32 {
        let old = state.maximum[r];
        let mut lanes = [MASKED; MAX_LANES];
        let mut factor = [0.0; MAX_LANES];
        // SAFETY: CHUNK is a multiple of `LANES`, and MAX_LANES no less than it.
        unsafe {
            let mut max = s.splat(old);
            for i in (0..CHUNK).step_by(S::LANES) {
                max = s.max(max, s.load(scores.as_ptr().add(i)));
            }
            s.store(lanes.as_mut_ptr(), max);
            let new = lanes.iter().fold(old, |a, &b| if b > a { b } else { a });
            s.store(factor.as_mut_ptr(), s.exp(s.splat(old - new)));
            let mut total = s.zero();
            for i in (0..CHUNK).step_by(S::LANES) {
                let p = scores.as_mut_ptr().add(i);
                let weight = s.exp(s.sub(s.load(p), s.splat(new)));
                s.store(p, weight);
                total = s.add(total, weight);
            }
            state.maximum[r] = new;
            state.total[r] = state.total[r] * factor[0] + s.sum(total);
        }
        factor[0]
    }

    /// Adds the weighted values' elements `lane..lane + V · LANES` to the sums.
    #[inline(always)]
    fn values<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        state: &mut NarrowState<'_>,
        offsets: &Offsets,
        lane: usize,
        n: usize,
        weights: &Scores,
    ) -> usize {
        let hd = self.head_dim;
        let sums = state.sums[..R * hd].as_mut_ptr();
        let mut acc = [[s.zero(); V]; R];
        // SAFETY: `sums` has `R` rows of `hd`, `lane + V · LANES ≤ hd`, and each block's slice bounds its values.
        unsafe {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = s.load(sums.add(r * hd + lane + v * S::LANES));
                }
            }
            for (b, &offset) in offsets[..n.div_ceil(KV_BLOCK)].iter().enumerate() {
                let count = KV_BLOCK.min(n - b * KV_BLOCK);
                let mut value = self.v_cache[offset..offset + count * hd].as_ptr().add(lane);
                for p in b * KV_BLOCK..b * KV_BLOCK + count {
                    let mut x = [s.zero(); V];
                    for (v, x) in x.iter_mut().enumerate() {
                        *x = s.load(value.add(v * S::LANES));
                    }
                    for (acc, weights) in acc.iter_mut().zip(weights) {
                        let weight = s.splat(*weights.as_ptr().add(p));
                        for (acc, x) in acc.iter_mut().zip(x) {
                            *acc = s.fma(weight, x, *acc);
                        }
                    }
                    value = value.wrapping_add(hd);
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    s.store(sums.add(r * hd + lane + v * S::LANES), acc);
                }
            }
        }
        V * S::LANES
    }
}
