//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467), fused with the residual add before it.

use super::Pool;
use super::isa::Kernel;
use super::pool::{Shards, piece};
use super::simd::{MulScaled, Simd, sum_of_squares, zip};

/// Below this many elements, a fork costs more than it saves.
pub(super) const SERIAL_BELOW: usize = 16 << 10;

/// `x += delta`, then `out = x / √(mean(x²) + eps) · w`, for each row of `w.len()` elements.
pub fn add_rms_norm(
    pool: &Pool,
    delta: &[f32],
    x: &mut [f32],
    w: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert_eq!(x.len(), out.len());
    assert_eq!(x.len(), delta.len());
    let isa = pool.isa();
    let len = x.len();
    let (x, out) = (Shards::new(x), Shards::new(out));
    rows(pool, len, w.len(), |at, len| {
        // SAFETY: `rows` hands out disjoint ranges.
        let (x, out) = unsafe { (x.part(at, len), out.part(at, len)) };
        let delta = &delta[at..at + len];
        isa.dispatch(Add { delta, x });
        isa.dispatch(Norm { x, w, eps, out });
    });
}

/// Runs `f(start, len)` over whole rows, on all threads if there is enough to do.
fn rows(pool: &Pool, len: usize, width: usize, f: impl Fn(usize, usize) + Sync) {
    if len == 0 {
        return;
    }
    assert!(len.is_multiple_of(width));
    if len < SERIAL_BELOW {
        return f(0, len);
    }
    pool.run(|tid, n| {
        let range = piece(len / width, tid, n);
        f(range.start * width, range.len() * width);
    });
}

struct Norm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.w.len();
        let rows = self.x.chunks_exact(width);
        for (x, out) in rows.zip(self.out.chunks_exact_mut(width)) {
            norm_row(s, x, self.w, self.eps, out);
        }
    }
}

/// One row.
#[inline(always)]
pub(super) fn norm_row<S: Simd>(s: S, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_of_squares(s, x) / x.len() as f32;
    zip(s, x, w, out, MulScaled(1.0 / (mean + eps).sqrt()));
}

struct Add<'a> {
    delta: &'a [f32],
    x: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, d) in self.x.iter_mut().zip(self.delta) {
            *x += d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rng, assert_close, pools};
    use super::*;

    #[test]
    fn rows_have_unit_mean_square_times_the_weight() {
        for pool in pools() {
            let mut rng = Rng::new(1);
            for (rows, width) in [(1, 1), (3, 7), (1, 576), (40, 576), (5, 33), (0, 8)] {
                let x = rng.floats(rows * width, 3.0);
                let delta = rng.floats(rows * width, 1.0);
                let w = rng.floats(width, 1.0);
                let (eps, mut out) = (1e-5, vec![f32::NAN; rows * width]);
                let mut sum = x.clone();
                add_rms_norm(&pool, &delta, &mut sum, &w, eps, &mut out);
                let expected: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
                assert_eq!(sum, expected);
                // Sums of up to 576 squares in f32: relative error below 576 · 2⁻²⁴ / √576 in practice.
                assert_close(&out, &reference(&sum, &w, eps), 2e-6);
            }
        }
    }

    fn reference(x: &[f32], w: &[f32], eps: f32) -> Vec<f64> {
        let rows = x.chunks(w.len());
        rows.flat_map(|x| {
            let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
            let scale = 1.0 / (squares / w.len() as f64 + f64::from(eps)).sqrt();
            let row = x.iter().zip(w);
            row.map(move |(&x, &w)| f64::from(x) * scale * f64::from(w))
                .collect::<Vec<_>>()
        })
        .collect()
    }
}
