//! `y = x · Wᵀ`: the product that decides the speed of a forward pass.

use super::gemm::{Epilogue, Gemm};
use super::{Pool, gemv, scratch::Scratch};
use crate::weights::Dtype;

/// A weight matrix `[rows, cols]` (output features × input features) as it lies in memory, row-major.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// `rows · cols` elements, aligned to 64 bytes for speed (to the element's size at least).
    pub data: &'a [u8],
    /// Type of an element.
    pub dtype: Dtype,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl Matrix<'_> {
    /// The elements as a pointer; the length and the alignment hold.
    pub(super) fn elements<T>(&self) -> *const T {
        let p = self.data.as_ptr();
        assert_eq!(self.dtype.size(), size_of::<T>());
        assert_eq!(self.data.len(), self.rows * self.cols * size_of::<T>());
        assert!(p.cast::<T>().is_aligned(), "an unaligned weight matrix");
        p.cast()
    }
}

/// From this many rows of `x` on, packing pays: below, each pass over the weights serves up to four rows from cache.
const GEMM_FROM: usize = 9;

/// The matrix products and attention, with their scratch memory: allocated at the first use of a shape, bounded, kept.
pub struct Kernels {
    /// Packed activations, shared by all threads.
    pub(super) packed: Scratch,
    /// One a thread.
    pub(super) locals: Vec<Scratch>,
}

impl Kernels {
    /// Scratch for the threads of `pool`.
    pub fn new(pool: &Pool) -> Kernels {
        Kernels {
            packed: Scratch::new(),
            locals: (0..pool.threads()).map(|_| Scratch::new()).collect(),
        }
    }

    /// Bytes of scratch held now. It grows with the shapes seen, to at most 16 MiB + 1 MiB a thread
    /// (for inner dimensions up to 131072 and head dimensions up to 256).
    pub fn scratch_bytes(&self) -> usize {
        self.packed.bytes() + self.locals.iter().map(Scratch::bytes).sum::<usize>()
    }

    /// `y[m, n] = x[m, k] · w[n, k]ᵀ + bias[n]`.
    ///
    /// Each row's result depends on that row alone up to f32 rounding, which depends on whether `m` is small.
    pub fn matmul(
        &mut self,
        pool: &Pool,
        x: &[f32],
        m: usize,
        w: Matrix<'_>,
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        assert_eq!(x.len(), m * w.cols);
        assert_eq!(y.len(), m * w.rows);
        assert!(bias.is_none_or(|b| b.len() == w.rows));
        self.product(pool, x, m, w, w.rows, Epilogue::Bias(bias), y);
    }

    /// `y[m, inter] = silu(x·gateᵀ) · (x·upᵀ)`, where `w[2·inter, k]` holds gate's rows, then up's.
    pub fn gate_up_silu(&mut self, pool: &Pool, x: &[f32], m: usize, w: Matrix<'_>, y: &mut [f32]) {
        let inter = w.rows / 2;
        assert_eq!(w.rows % 2, 0);
        assert_eq!(x.len(), m * w.cols);
        assert_eq!(y.len(), m * inter);
        self.product(pool, x, m, w, inter, Epilogue::SiluMul, y);
    }

    #[allow(clippy::too_many_arguments)]
    fn product(
        &mut self,
        pool: &Pool,
        x: &[f32],
        m: usize,
        w: Matrix<'_>,
        n: usize,
        epilogue: Epilogue<'_>,
        y: &mut [f32],
    ) {
        if m == 0 || n == 0 {
            return;
        }
        if m < GEMM_FROM {
            gemv::gemv(pool, x, m, w, n, epilogue, y);
        } else {
            Gemm { w, n, epilogue }.run(self, pool, x, m, y);
        }
    }
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ` as a stream of the weights, for the few rows of a decode step, by the first `threads` threads
/// of the pool.
pub fn few_rows(pool: &Pool, threads: usize, x: &[f32], m: usize, w: Matrix<'_>, y: &mut [f32]) {
    assert_eq!(x.len(), m * w.cols);
    assert_eq!(y.len(), m * w.rows);
    gemv::shared_out(pool, threads, x, m, w, y);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rng, pools, weights};
    use super::*;

    /// `x · wᵀ` in f64, and `Σ |x·w|`, which error bounds are relative to.
    fn reference(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<(f64, f64)> {
        let rows = (0..m).flat_map(|i| (0..n).map(move |j| (i, j)));
        rows.map(|(i, j)| {
            let terms = (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c]));
            terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()))
        })
        .collect()
    }

    /// The error allowed in a sum of `k` products, relative to `Σ |x·w|`: 2⁻¹⁸ for activations in two bf16 parts, and
    /// f32 rounding, which accumulates like √k over lanes and steps (4·√k·2⁻²⁴ leaves room for unlucky sums).
    fn bound(k: usize) -> f64 {
        2f64.powi(-18) + 4.0 * (k as f64).sqrt() * 2f64.powi(-24)
    }

    fn check(pool: &Pool, rng: &mut Rng, dtype: Dtype, (m, n, k): (usize, usize, usize)) {
        let (data, values) = weights(rng, dtype, n * k);
        let w = Matrix {
            data: &data,
            dtype,
            rows: n,
            cols: k,
        };
        let x = rng.floats(m * k, 2.0);
        let bias = rng.floats(n, 1.0);
        let mut kernels = Kernels::new(pool);
        for bias in [None, Some(&bias[..])] {
            let mut y = vec![f32::NAN; m * n];
            kernels.matmul(pool, &x, m, w, bias, &mut y);
            for (i, (y, (sum, size))) in y.iter().zip(reference(&x, &values, m, n, k)).enumerate() {
                let expected = sum + bias.map_or(0.0, |b| f64::from(b[i % n]));
                let error = (f64::from(*y) - expected).abs();
                assert!(
                    error <= bound(k) * (size + 1.0),
                    "{} {dtype} m={m} n={n} k={k}, element {i}: {y} for {expected}",
                    pool.isa()
                );
            }
        }
        if n % 2 == 0 {
            let mut y = vec![f32::NAN; m * n / 2];
            kernels.gate_up_silu(pool, &x, m, w, &mut y);
            let sums = reference(&x, &values, m, n, k);
            for (i, y) in y.iter().enumerate() {
                let (row, col) = (i / (n / 2), i % (n / 2));
                let (gate, gate_size) = sums[row * n + col];
                let (up, up_size) = sums[row * n + n / 2 + col];
                let expected = gate / (1.0 + (-gate).exp()) * up;
                // d silu/dx is within ±1.1, so the factors' errors carry over times the other factor; 1e-6 for exp.
                let allowed = bound(k) * (1.1 * gate_size * up.abs() + up_size * gate.abs() + 1.0)
                    + 1e-6 * expected.abs();
                let error = (f64::from(*y) - expected).abs();
                assert!(
                    error <= allowed,
                    "{} {dtype} m={m} n={n} k={k}, element {i}: {y} for {expected}",
                    pool.isa()
                );
            }
        }
    }

    const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

    #[test]
    fn fixed_shapes_match_f64() {
        for pool in pools() {
            let mut rng = Rng::new(5);
            for shape in [
                (1, 1, 1),
                (1, 96, 576),
                (3, 10, 31),
                (8, 130, 64),
                (9, 48, 32),
                (16, 96, 64),
                (33, 61, 96),
                (64, 200, 800),
                (2, 0, 8),
                (0, 8, 8),
                (2, 6, 0),
                (12, 6, 0),
            ] {
                DTYPES
                    .iter()
                    .for_each(|&dtype| check(&pool, &mut rng, dtype, shape));
            }
        }
    }

    #[test]
    fn random_shapes_match_f64() {
        for pool in pools() {
            let mut rng = Rng::new(6);
            for _ in 0..40 {
                let m = rng.between(1, 80);
                let shape = (m, rng.between(1, 150), rng.between(1, 130));
                DTYPES
                    .iter()
                    .for_each(|&dtype| check(&pool, &mut rng, dtype, shape));
            }
        }
    }

    #[test]
    fn more_tokens_than_are_packed_at_once_match_f64() {
        let pool = &pools()[0];
        check(pool, &mut Rng::new(8), Dtype::Bf16, (1030, 20, 40));
    }

    #[test]
    fn a_row_is_the_same_in_any_batch_and_on_any_run() {
        for pool in pools() {
            let mut rng = Rng::new(9);
            let (n, k) = (100, 576);
            let (data, values) = weights(&mut rng, Dtype::Bf16, n * k);
            let w = Matrix {
                data: &data,
                dtype: Dtype::Bf16,
                rows: n,
                cols: k,
            };
            let x = rng.floats(70 * k, 1.0);
            let mut kernels = Kernels::new(&pool);
            let mut run = |m: usize| {
                let mut y = vec![0.0; m * n];
                kernels.matmul(&pool, &x[..m * k], m, w, None, &mut y);
                y
            };
            let size = reference(&x[..k], &values, 1, n, k);
            let alone = run(1);
            for m in [1, 2, 5, 8, 9, 40, 70] {
                let y = run(m);
                assert_eq!(y, run(m));
                for ((y, alone), (_, size)) in y.iter().zip(&alone).zip(&size) {
                    assert!(f64::from((y - alone).abs()) <= bound(k) * size);
                }
            }
        }
    }

    #[test]
    fn scratch_is_bounded_and_stops_growing() {
        let pool = &pools()[0];
        let mut kernels = Kernels::new(pool);
        let (n, k) = (64, 20_000);
        let data = vec![0u8; n * k * 4 + 64];
        let data = &data[data.as_ptr().align_offset(64)..][..n * k * 4];
        let w = Matrix {
            data,
            dtype: Dtype::F32,
            rows: n,
            cols: k,
        };
        let (x, mut y) = (vec![0.0; 300 * k], vec![0.0; 300 * n]);
        kernels.matmul(pool, &x, 300, w, None, &mut y);
        let bytes = kernels.scratch_bytes();
        assert!(bytes > 0 && bytes <= (16 << 20) + pool.threads() * (1 << 20));
        kernels.matmul(pool, &x[..40 * k], 40, w, None, &mut y[..40 * n]);
        assert_eq!(kernels.scratch_bytes(), bytes);
    }
}
