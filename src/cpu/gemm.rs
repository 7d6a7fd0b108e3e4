//! `y = x · Wᵀ` for many rows of `x`: blocked for caches and registers.
//!
//! The activations are packed once, transposed into tiles of two vectors of tokens; the weights are read as they lie,
//! 48 rows at a time, each block's inner dimension in pieces that fit the caches (after Goto and van de Geijn, "Anatomy of
//! High-Performance Matrix Multiplication", 2008, with the roles of the operands chosen so that it is the *activations* that
//! are rearranged). Sums stay in a thread's own tile until a block is done, where bias or SwiGLU is applied.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::embed::widen;
use super::isa::Kernel;
use super::pool::Shards;
use super::simd::{Element, Lanes, MAX_LANES, Simd, bf16_bits};
use super::tile::{PairProduct, Product, transpose};
use super::{Isa, Kernels, Matrix, Pool};
use crate::weights::Dtype;
use half::{bf16, f16};

/// Weight rows of a block: a multiple of every register tile's rows.
const BLOCK_ROWS: usize = 48;
/// Rows of the blocks that are dealt out last, so that all threads end together (a register tile's).
const LAST_BLOCK_ROWS: usize = 12;
/// Weight rows of an AMX tile; two make a block.
const AMX_ROWS: usize = 16;
/// Most steps of the inner dimension between two visits to the sums, a multiple of AMX's 32.
const BLOCK_K: usize = 384;
/// Most tokens packed at a time, and most floats: what bounds the scratch memory.
const MAX_TOKENS: usize = 512;
const MAX_PACKED: usize = (16 << 20) / size_of::<f32>();

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(super) enum Epilogue<'a> {
    /// `y = sum + bias`.
    Bias(Option<&'a [f32]>),
    /// `y = silu(sum of row i) · (sum of row n + i)`.
    SiluMul,
}

impl Epilogue<'_> {
    /// How many sums make one output.
    pub(super) fn halves(&self) -> usize {
        match self {
            Epilogue::Bias(_) => 1,
            Epilogue::SiluMul => 2,
        }
    }
}

/// How the sums are formed.
#[derive(Clone, Copy, PartialEq)]
enum Route {
    /// f32 multiply-adds; bf16 and f16 weights are widened block by block.
    Fma,
    /// bf16 dot products with activations in two parts.
    Pairs,
    /// The same on AMX tiles.
    Amx,
}

impl Route {
    fn choose(isa: Isa, w: &Matrix<'_>) -> Route {
        match (isa, w.dtype) {
            (Isa::Avx512Bf16, Dtype::Bf16) if w.cols.is_multiple_of(2) => Route::Pairs,
            (Isa::Amx, Dtype::Bf16) if w.cols.is_multiple_of(32) => Route::Amx,
            (Isa::Amx, Dtype::Bf16) if w.cols.is_multiple_of(2) => Route::Pairs,
            _ => Route::Fma,
        }
    }
}

/// A product with `n` output features.
pub(super) struct Gemm<'a> {
    pub(super) w: Matrix<'a>,
    pub(super) n: usize,
    pub(super) epilogue: Epilogue<'a>,
}

impl Gemm<'_> {
    pub(super) fn run(
        &self,
        kernels: &mut Kernels,
        pool: &Pool,
        x: &[f32],
        m: usize,
        y: &mut [f32],
    ) {
        let k = self.w.cols;
        let lanes = 2 * MAX_LANES;
        let most = (MAX_PACKED / k.max(1) / lanes * lanes).clamp(lanes, MAX_TOKENS);
        for start in (0..m).step_by(most) {
            let rows = most.min(m - start);
            let x = &x[start * k..(start + rows) * k];
            let y = &mut y[start * self.n..(start + rows) * self.n];
            self.tokens(kernels, pool, x, rows, y);
        }
    }

    fn tokens(&self, kernels: &mut Kernels, pool: &Pool, x: &[f32], m: usize, y: &mut [f32]) {
        let (isa, k) = (pool.isa(), self.w.cols);
        let route = Route::choose(isa, &self.w);
        let width = 2 * isa.dispatch(Lanes);
        let (tiles, tile_len) = (m.div_ceil(width), k * width);
        let packed = kernels.packed.get(tiles * tile_len);

        let shards = Shards::new(packed);
        pool.for_each_chunk(tiles, |_, tile| {
            let first = tile * width;
            let rows = width.min(m - first);
            isa.dispatch(Pack {
                x: &x[first * k..(first + rows) * k],
                rows,
                k,
                route,
                // SAFETY: a tile is packed by one thread.
                out: unsafe { shards.part(tile * tile_len, tile_len) },
            });
        });

        let deal = Deal::new(self.n, pool.threads(), route);
        let sums_len = tiles * width * BLOCK_ROWS;
        let (packed, y) = (&*packed, Shards::new(y));
        let local_len = BLOCK_ROWS * BLOCK_K + 2 * sums_len;
        // Which thread gets work is chance: all grow now, so that a warm step never allocates.
        kernels.locals.iter_mut().for_each(|s| {
            s.get(local_len);
        });
        let locals = Shards::new(&mut kernels.locals);
        pool.for_each_chunk(deal.blocks(), |tid, i| {
            let rows = deal.block(i);
            // SAFETY: each thread has a scratch of its own.
            let scratch = unsafe { &mut locals.part(tid, 1)[0] };
            let scratch = scratch.get(local_len);
            let (panel, sums) = scratch.split_at_mut(BLOCK_ROWS * BLOCK_K);
            isa.dispatch(Block {
                gemm: self,
                route,
                row: rows.start,
                rows: rows.len(),
                packed,
                m,
                panel,
                sums,
                y: &y,
            });
        });
    }
}

/// How `n` rows are cut into blocks: large ones first, small ones for the last share of each thread.
struct Deal {
    n: usize,
    large: usize,
    n_large: usize,
    small: usize,
}

impl Deal {
    fn new(n: usize, threads: usize, route: Route) -> Deal {
        let (large, small) = match route {
            Route::Amx => (2 * AMX_ROWS, 2 * AMX_ROWS),
            Route::Fma | Route::Pairs => (BLOCK_ROWS, LAST_BLOCK_ROWS),
        };
        let n_large = (n / large).saturating_sub(threads);
        Deal {
            n,
            large,
            n_large,
            small,
        }
    }

    fn blocks(&self) -> usize {
        self.n_large + (self.n - self.n_large * self.large).div_ceil(self.small)
    }

    fn block(&self, i: usize) -> std::ops::Range<usize> {
        if i < self.n_large {
            return i * self.large..(i + 1) * self.large;
        }
        let start = self.n_large * self.large + (i - self.n_large) * self.small;
        start..(start + self.small).min(self.n)
    }
}

/// Packs up to `2·LANES` tokens: `out[step][token]`, or `out[pair of steps][hi, lo][token]`; missing tokens are zero.
struct Pack<'a> {
    x: &'a [f32],
    rows: usize,
    k: usize,
    route: Route,
    out: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = 2 * S::LANES;
        if self.rows < width {
            self.out.fill(0.0);
        }
        if self.route == Route::Fma {
            let (x, out) = (self.x.as_ptr(), self.out.as_mut_ptr());
            // SAFETY: `x` has `rows` rows of `k`, `out` has `k` rows of `width ≥ rows`.
            unsafe { transpose(s, (self.rows, self.k), x, self.k, out, width) };
        } else {
            self.pairs(s);
        }
    }
}

impl Pack<'_> {
    #[inline(always)]
    fn pairs<S: Simd>(self, s: S) {
        let width = 2 * S::LANES;
        let mut hi = [0.0; MAX_LANES * MAX_LANES];
        let mut lo = [0.0; MAX_LANES * MAX_LANES];
        for row in (0..self.rows).step_by(S::LANES) {
            let rows = S::LANES.min(self.rows - row);
            for step in (0..self.k).step_by(2 * S::LANES) {
                let pairs = S::LANES.min((self.k - step) / 2);
                for r in 0..rows {
                    let x = &self.x[(row + r) * self.k + step..][..2 * pairs];
                    let (hi, lo) = (&mut hi[r * S::LANES..], &mut lo[r * S::LANES..]);
                    for ((x, hi), lo) in x.chunks_exact(2).zip(hi).zip(lo) {
                        (*hi, *lo) = split_pair(x[0], x[1]);
                    }
                }
                let at = step / 2 * 2 * width + row;
                let (hi_out, lo_out) = self.out[at..].split_at_mut(width);
                // SAFETY: `pairs` rows of `rows` lanes, 2·width apart, lie within `out`: the last begins at
                // (step/2 + pairs - 1)·2·width + row (+ width), and row + rows ≤ width.
                unsafe {
                    let (hi_out, lo_out) = (hi_out.as_mut_ptr(), lo_out.as_mut_ptr());
                    let shape = (rows, pairs);
                    transpose(s, shape, hi.as_ptr(), S::LANES, hi_out, 2 * width);
                    transpose(s, shape, lo.as_ptr(), S::LANES, lo_out, 2 * width);
                }
            }
        }
    }
}

/// Two activations as a pair of bf16 numbers and a pair of the bf16 numbers nearest to what that leaves.
#[inline(always)]
fn split_pair(a: f32, b: f32) -> (f32, f32) {
    let (a_hi, b_hi) = (bf16_bits(a), bf16_bits(b));
    let a_lo = bf16_bits(a - f32::from_bits(a_hi << 16));
    let b_lo = bf16_bits(b - f32::from_bits(b_hi << 16));
    (
        f32::from_bits(a_hi | b_hi << 16),
        f32::from_bits(a_lo | b_lo << 16),
    )
}

/// `rows` output features from `row` on, all `m` tokens.
struct Block<'a> {
    gemm: &'a Gemm<'a>,
    route: Route,
    row: usize,
    rows: usize,
    packed: &'a [f32],
    m: usize,
    /// Widened weights, `[rows][BLOCK_K]`.
    panel: &'a mut [f32],
    /// `[tile][BLOCK_ROWS][2·LANES]`, and the same again for SwiGLU's second factor.
    sums: &'a mut [f32],
    y: &'a Shards<f32>,
}

impl Kernel for Block<'_> {
    type Output = ();
    const USES_BF16_DOT: bool = true;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match self.gemm.w.dtype {
            Dtype::Bf16 => self.block::<S, bf16>(s),
            Dtype::F16 => self.block::<S, f16>(s),
            Dtype::F32 => self.block::<S, f32>(s),
        }
    }
}

impl Block<'_> {
    #[inline(always)]
    fn block<S: Simd, T: Element>(&mut self, s: S) {
        let half = self.sums.len() / 2;
        for i in 0..self.gemm.epilogue.halves() {
            self.sum::<S, T>(s, i * self.gemm.n + self.row, i * half);
        }
        for tile in 0..self.m.div_ceil(2 * S::LANES) {
            self.finish(s, tile);
        }
    }

    /// The sums of the weight rows from `row` on, into `self.sums[at..]`.
    #[inline(always)]
    fn sum<S: Simd, T: Element>(&mut self, s: S, row: usize, at: usize) {
        let k = self.gemm.w.cols;
        let w: *const T = self.gemm.w.elements();
        assert!(row + self.rows <= self.gemm.w.rows);
        if k == 0 {
            self.sums[at..].fill(0.0);
        }
        // Pieces as even as they come, in whole AMX steps.
        let pieces = k.div_ceil(BLOCK_K).max(1);
        let piece = k.div_ceil(pieces).next_multiple_of(32).max(1);
        for step in (0..k).step_by(piece) {
            let steps = piece.min(k - step);
            // SAFETY: the rows `row..row + rows` of `w` have `k` elements each, and `step + steps ≤ k`.
            unsafe {
                let w = w.add(row * k + step);
                if S::BF16_DOT && T::IS_BF16 && self.route != Route::Fma {
                    self.sum_pairs(s, w.cast(), step, steps, at);
                } else {
                    self.sum_fma(s, w, step, steps, at);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn sum_fma<S: Simd, T: Element>(
        &mut self,
        s: S,
        w: *const T,
        step: usize,
        steps: usize,
        at: usize,
    ) {
        let (k, width) = (self.gemm.w.cols, 2 * S::LANES);
        for r in 0..self.rows {
            // SAFETY: the caller's promise for `w`; `steps ≤ BLOCK_K`.
            unsafe { widen(s, w.add(r * k), &mut self.panel[r * BLOCK_K..][..steps]) };
        }
        for tile in 0..self.m.div_ceil(width) {
            let x = &self.packed[tile * k * width..][step * width..][..steps * width];
            let c = &mut self.sums[at + tile * BLOCK_ROWS * width..][..BLOCK_ROWS * width];
            let product = Product {
                w: self.panel.as_ptr(),
                w_row: BLOCK_K,
                w_step: 1,
                segments: &[0],
                steps,
                x: x.as_ptr(),
                x_stride: width,
                c: c.as_mut_ptr(),
                c_stride: width,
                accumulate: step > 0,
            };
            // SAFETY: `panel` holds `rows` rows of `steps`, and the slices above are what the product touches.
            unsafe { product.rows(s, self.rows, self.m - tile * width > S::LANES) };
        }
    }

    #[inline(always)]
    unsafe fn sum_pairs<S: Simd>(
        &mut self,
        s: S,
        w: *const bf16,
        step: usize,
        steps: usize,
        at: usize,
    ) {
        let (k, width) = (self.gemm.w.cols, 2 * S::LANES);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Route::Amx` says that AMX is there.
        let tiles = (self.route == Route::Amx).then(|| unsafe { amx::Tiles::configure() });
        for tile in 0..self.m.div_ceil(width) {
            let x = &self.packed[tile * k * width..][step * width..][..steps * width];
            let c = &mut self.sums[at + tile * BLOCK_ROWS * width..][..BLOCK_ROWS * width];
            let product = PairProduct {
                w,
                w_row: k,
                pairs: steps / 2,
                x: x.as_ptr().cast(),
                c: c.as_mut_ptr(),
                c_stride: width,
                accumulate: step > 0,
            };
            let wide = self.m - tile * width > S::LANES;
            // SAFETY: the caller's promise for `w`; the slices above are what the product touches. `Route` has
            // checked that `k`, and with it every piece, is even, and a multiple of 32 for AMX.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                let done = if wide {
                    self.amx_rows(&tiles, &product)
                } else {
                    0
                };
                #[cfg(not(target_arch = "x86_64"))]
                let done = 0;
                product.skip(done).rows(s, self.rows - done, wide);
            }
        }
    }

    /// As many rows as whole AMX tiles serve; how many that is.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn amx_rows(&self, tiles: &Option<amx::Tiles>, product: &PairProduct) -> usize {
        let Some(tiles) = tiles else { return 0 };
        let rows = self.rows / (2 * AMX_ROWS) * (2 * AMX_ROWS);
        for row in (0..rows).step_by(2 * AMX_ROWS) {
            // SAFETY: the product's extent is the caller's promise.
            unsafe { tiles.block_32x32(&product.skip(row)) };
        }
        rows
    }

    /// Bias or SwiGLU over the sums of a tile, then their transposition into `y`.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, tile: usize) {
        let (n, width) = (self.gemm.n, 2 * S::LANES);
        let (first, second) = self.sums.split_at_mut(self.sums.len() / 2);
        let sums = &mut first[tile * BLOCK_ROWS * width..][..self.rows * width];
        let others = &second[tile * BLOCK_ROWS * width..][..self.rows * width];
        for i in (0..self.rows * width).step_by(S::LANES) {
            // SAFETY: `width` is a multiple of `LANES`.
            unsafe {
                let p = sums.as_mut_ptr().add(i);
                match self.gemm.epilogue {
                    Epilogue::Bias(None) => break,
                    Epilogue::Bias(Some(b)) => {
                        s.store(p, s.add(s.load(p), s.splat(b[self.row + i / width])));
                    }
                    Epilogue::SiluMul => {
                        s.store(p, s.silu_mul(s.load(p), s.load(others.as_ptr().add(i))));
                    }
                }
            }
        }
        let tokens = width.min(self.m - tile * width);
        let at = tile * width * n + self.row;
        assert!(at + (tokens - 1) * n + self.rows <= self.y.len());
        // SAFETY: within `y` by the assertion; these columns are this block's alone.
        unsafe {
            let y = self.y.as_ptr().add(at);
            transpose(s, (self.rows, tokens), sums.as_ptr(), width, y, n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_dealt_once() {
        for route in [Route::Fma, Route::Amx] {
            for (n, threads) in [(1, 1), (576, 2), (575, 3), (100, 64), (29568, 32)] {
                let deal = Deal::new(n, threads, route);
                let rows: Vec<usize> = (0..deal.blocks()).flat_map(|i| deal.block(i)).collect();
                assert_eq!(rows, (0..n).collect::<Vec<_>>());
                assert!(
                    (0..deal.blocks()).all(|i| (1..=BLOCK_ROWS).contains(&deal.block(i).len()))
                );
            }
        }
    }
}
