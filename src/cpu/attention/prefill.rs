//! Attention for many query rows: the lanes of a vector are rows, keys and values are broadcast from where they lie.

use super::super::simd::Simd;
use super::super::tile::{Product, transpose};
use super::{MASKED, Task, View};
use crate::layout::KV_BLOCK;

/// The running state of a task's rows.
pub(super) struct State<'a> {
    /// `[head_dim][width]`, scaled.
    pub(super) queries: &'a mut [f32],
    /// `[head_dim][width]`.
    pub(super) sums: &'a mut [f32],
    /// `[CHUNK][width]`: scores, then weights.
    pub(super) scores: &'a mut [f32],
    pub(super) maximum: &'a mut [f32],
    pub(super) total: &'a mut [f32],
    /// Positions that a row may see.
    pub(super) limit: &'a mut [f32],
}

impl State<'_> {
    /// Gathers the queries, scaled and transposed, and sets the rows' limits.
    #[inline(always)]
    pub(super) fn begin<S: Simd>(&mut self, s: S, view: &View<'_>, task: &Task) {
        let (hd, width) = (view.shape.head_dim, 2 * S::LANES);
        let rows = view.rows(task, width);
        view.scaled_queries(task, rows, self.sums);
        if rows < width {
            self.queries.fill(0.0);
        }
        // SAFETY: `sums` holds `rows` rows of `hd`, `queries` room for `hd` rows of `width`.
        unsafe {
            let (src, dst) = (self.sums.as_ptr(), self.queries.as_mut_ptr());
            transpose(s, (rows, hd), src, hd, dst, width);
        }
        self.sums.fill(0.0);
        self.maximum.fill(MASKED);
        self.total.fill(0.0);
        for (r, limit) in self.limit.iter_mut().enumerate() {
            *limit = view.limit(task, r.min(rows - 1)) as f32;
        }
    }

    /// Adds the positions `start..start + n`.
    #[inline(always)]
    pub(super) fn chunk<S: Simd>(
        &mut self,
        s: S,
        view: &View<'_>,
        task: &Task,
        start: usize,
        n: usize,
        wide: bool,
    ) {
        let (hd, width) = (view.shape.head_dim, 2 * S::LANES);
        let offsets = view.offsets(task, start);
        for (b, &offset) in offsets[..n.div_ceil(KV_BLOCK)].iter().enumerate() {
            let product = Product {
                w: view.k_cache.as_ptr(),
                w_row: hd,
                w_step: 1,
                segments: &[offset],
                steps: hd,
                x: self.queries.as_ptr(),
                x_stride: width,
                c: self.scores[b * KV_BLOCK * width..].as_mut_ptr(),
                c_stride: width,
                accumulate: false,
            };
            // SAFETY: `check` has seen that every block lies in the cache; `scores` has room for CHUNK rows.
            unsafe { product.rows(s, KV_BLOCK.min(n - b * KV_BLOCK), wide) };
        }
        if (start + n) as f32 > self.limit[0] {
            self.mask(start, n, width);
        }
        for lane in (0..if wide { width } else { S::LANES }).step_by(S::LANES) {
            self.weigh(s, n, lane);
        }
        // Whole blocks together, so that the sums stay in registers; then what a last block has of positions.
        let (whole, rest) = (n / KV_BLOCK, n % KV_BLOCK);
        for (first, blocks, steps) in [(0, whole, KV_BLOCK), (whole, 1, rest)] {
            if blocks * steps == 0 {
                continue;
            }
            let values = Product {
                w: view.v_cache.as_ptr(),
                w_row: 1,
                w_step: hd,
                segments: &offsets[first..first + blocks],
                steps,
                x: self.scores[first * KV_BLOCK * width..].as_ptr(),
                x_stride: width,
                c: self.sums.as_mut_ptr(),
                c_stride: width,
                accumulate: true,
            };
            // SAFETY: as above; `sums` has `hd` rows.
            unsafe { values.rows(s, hd, wide) };
        }
    }

    /// Hides the positions past each row's limit.
    #[inline(always)]
    fn mask(&mut self, start: usize, n: usize, width: usize) {
        for (i, scores) in self.scores.chunks_exact_mut(width).take(n).enumerate() {
            let position = (start + i) as f32;
            for (score, &limit) in scores.iter_mut().zip(&*self.limit) {
                *score = if position < limit { *score } else { MASKED };
            }
        }
    }

    /// Turns `n` scores of a vector of rows into weights, and rescales what was summed before.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, n: usize, lane: usize) {
        let width = 2 * S::LANES;
        let scores = self.scores[..n * width].as_mut_ptr();
        let sums = self.sums.as_mut_ptr();
        let hd = self.sums.len() / width;
        // SAFETY: `lane + LANES ≤ width`, the stride of `n` rows of scores and `hd` rows of sums.
        unsafe {
            let old = s.load(self.maximum.as_ptr().add(lane));
            let mut max = old;
            for i in 0..n {
                max = s.max(max, s.load(scores.add(i * width + lane)));
            }
            let factor = s.exp(s.sub(old, max));
            let mut total = s.mul(s.load(self.total.as_ptr().add(lane)), factor);
            for i in 0..n {
                let p = scores.add(i * width + lane);
                let weight = s.exp(s.sub(s.load(p), max));
                s.store(p, weight);
                total = s.add(total, weight);
            }
            s.store(self.maximum.as_mut_ptr().add(lane), max);
            s.store(self.total.as_mut_ptr().add(lane), total);
            for i in 0..hd {
                let p = sums.add(i * width + lane);
                s.store(p, s.mul(s.load(p), factor));
            }
        }
    }
}
