//! `y = x · Wᵀ` for a few rows of `x`: a stream of the weights from memory, each read once.
//!
//! A thread takes a contiguous range of weight rows and goes through it in chunks that stay in its L2 cache, so that
//! further groups of up to four rows of `x` find the chunk there.

use super::gemm::Epilogue;
use super::isa::Kernel;
use super::pool::{Shards, piece};
use super::simd::{Element, SiluMul, Simd, load_first, zip};
use super::{Matrix, Pool};
use crate::weights::Dtype;
use half::{bf16, f16};

/// Most weight rows in a chunk, and most bytes.
const CHUNK_ROWS: usize = 128;
const CHUNK_BYTES: usize = 256 << 10;
/// Bytes of the last chunks that are handed out: a few microseconds of a core's time.
const LAST_CHUNK_BYTES: usize = 32 << 10;

/// Runs the product over the first `n` rows of `w` (and, for SwiGLU, the `n` after them).
pub(super) fn gemv(
    pool: &Pool,
    x: &[f32],
    m: usize,
    w: Matrix<'_>,
    n: usize,
    epilogue: Epilogue<'_>,
    y: &mut [f32],
) {
    let y = Shards::new(y);
    let isa = pool.isa();
    pool.run(|tid, threads| {
        isa.dispatch(Rows {
            x,
            m,
            w,
            n,
            epilogue,
            range: piece(n, tid, threads),
            y: &y,
        });
    });
}

/// The plain product, its rows handed out piece by piece: beside a GPU that is driven from one of the cores, and a link that
/// takes its part of the memory's bandwidth, no two cores are equally fast.
pub(super) fn shared_out(
    pool: &Pool,
    threads: usize,
    x: &[f32],
    m: usize,
    w: Matrix<'_>,
    y: &mut [f32],
) {
    let (isa, n) = (pool.isa(), w.rows);
    let row_bytes = (w.cols * w.dtype.size()).max(1);
    let rows = |bytes: usize| (bytes / row_bytes).clamp(1, CHUNK_ROWS);
    let starts = guided(n, threads, rows(CHUNK_BYTES), rows(LAST_CHUNK_BYTES));
    let y = Shards::new(y);
    pool.for_each_chunk_on(threads, starts.len() - 1, |_, chunk| {
        isa.dispatch(Rows {
            x,
            m,
            w,
            n,
            epilogue: Epilogue::Bias(None),
            range: starts[chunk]..starts[chunk + 1],
            y: &y,
        });
    });
}

/// Where the chunks of `n` rows begin, and `n`: each is a share of what is left, between `least` and `most`, so that a thread
/// goes through much at a time and yet all end together (guided self-scheduling: Polychronopoulos and Kuck, "Guided
/// self-scheduling", IEEE Trans. Comput. 1987).
fn guided(n: usize, threads: usize, most: usize, least: usize) -> Vec<usize> {
    let mut starts = vec![0];
    let mut at = 0;
    while at < n {
        let share = (n - at) / (2 * threads.max(1));
        // Four rows are multiplied at a time.
        at += (share / 4 * 4).min(most).max(least).min(n - at);
        starts.push(at);
    }
    starts
}

/// One thread's output features, `range` of `n`.
struct Rows<'a> {
    x: &'a [f32],
    m: usize,
    w: Matrix<'a>,
    n: usize,
    epilogue: Epilogue<'a>,
    range: std::ops::Range<usize>,
    y: &'a Shards<f32>,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.w.dtype {
            Dtype::Bf16 => self.rows::<S, bf16>(s),
            Dtype::F16 => self.rows::<S, f16>(s),
            Dtype::F32 => self.rows::<S, f32>(s),
        }
    }
}

impl Rows<'_> {
    #[inline(always)]
    fn rows<S: Simd, T: Element>(&self, s: S) {
        let w: *const T = self.w.elements();
        let row_bytes = (self.w.cols * size_of::<T>()).max(1);
        let step = (CHUNK_BYTES / row_bytes).clamp(4, CHUNK_ROWS);
        for start in self.range.clone().step_by(step) {
            let rows = step.min(self.range.end - start);
            let mut token = 0;
            while token < self.m {
                token += match self.m - token {
                    4.. => self.chunk::<S, T, 4>(s, w, start, rows, token),
                    2.. => self.chunk::<S, T, 2>(s, w, start, rows, token),
                    _ => self.chunk::<S, T, 1>(s, w, start, rows, token),
                };
            }
        }
    }

    /// Output features `start..start + rows` of the tokens `token..token + M`.
    #[inline(always)]
    fn chunk<S: Simd, T: Element, const M: usize>(
        &self,
        s: S,
        w: *const T,
        start: usize,
        rows: usize,
        token: usize,
    ) -> usize {
        let mut sums = [[[0.0; CHUNK_ROWS]; M]; 2];
        let halves = self.epilogue.halves();
        for (half, sums) in sums.iter_mut().take(halves).enumerate() {
            self.dots::<S, T, M>(s, w, half * self.n + start, rows, token, sums);
        }
        let [first, second] = &sums;
        for i in 0..M {
            // SAFETY: `start..start + rows` of any token is this thread's alone.
            let y = unsafe { self.y.part((token + i) * self.n + start, rows) };
            match self.epilogue {
                Epilogue::SiluMul => zip(s, &first[i][..rows], &second[i][..rows], y, SiluMul),
                Epilogue::Bias(None) => y.copy_from_slice(&first[i][..rows]),
                Epilogue::Bias(Some(bias)) => {
                    for (r, y) in y.iter_mut().enumerate() {
                        *y = first[i][r] + bias[start + r];
                    }
                }
            }
        }
        M
    }

    /// `out[i][r] = x[token + i] · w[start + r]`.
    #[inline(always)]
    fn dots<S: Simd, T: Element, const M: usize>(
        &self,
        s: S,
        w: *const T,
        start: usize,
        rows: usize,
        token: usize,
        out: &mut [[f32; CHUNK_ROWS]; M],
    ) {
        let k = self.w.cols;
        let x = &self.x[token * k..(token + M) * k];
        // Four streams, each through a quarter of the chunk: hardware prefetchers follow a few long streams, and lose those
        // that end with every row.
        let quarter = rows / 4;
        // SAFETY: rows `start..start + rows` of `w` exist, each of `k` elements; `x` has `M` rows of `k`.
        unsafe {
            let w = w.add(start * k);
            for r in 0..quarter {
                let sums = dot_rows::<S, T, 4, M>(s, w.add(r * k), quarter * k, x.as_ptr(), k);
                for (j, sums) in sums.iter().enumerate() {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        out[r + j * quarter] = *sum;
                    }
                }
            }
            for r in 4 * quarter..rows {
                let sums = dot_rows::<S, T, 1, M>(s, w.add(r * k), 0, x.as_ptr(), k);
                for (out, sum) in out.iter_mut().zip(sums[0]) {
                    out[r] = sum;
                }
            }
        }
    }
}

/// The dot products of `R` weight rows, `w_row` elements apart, with `M` rows of `x`.
///
/// # Safety
/// `w` is valid for `R` such rows of `k` elements, `x` for `M`.
#[inline(always)]
unsafe fn dot_rows<S: Simd, T: Element, const R: usize, const M: usize>(
    s: S,
    w: *const T,
    w_row: usize,
    x: *const f32,
    k: usize,
) -> [[f32; M]; R] {
    let mut acc = [[s.zero(); M]; R];
    let rest = k % S::LANES;
    // SAFETY: the caller's promise; `i` stays below `k - rest`, and `rest` elements remain after it.
    unsafe {
        for i in (0..k - rest).step_by(S::LANES) {
            let mut xv = [s.zero(); M];
            for (j, xv) in xv.iter_mut().enumerate() {
                *xv = s.load(x.add(j.wrapping_mul(k)).add(i));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let wv = T::load(s, w.add(r.wrapping_mul(w_row)).add(i));
                for (acc, xv) in acc.iter_mut().zip(xv) {
                    *acc = s.fma(wv, xv, *acc);
                }
            }
        }
        if rest > 0 {
            for (r, acc) in acc.iter_mut().enumerate() {
                let wv = load_first(s, w.add(r * w_row + k - rest), rest);
                for (j, acc) in acc.iter_mut().enumerate() {
                    let xv = s.load_first(x.add(j * k + k - rest), rest);
                    *acc = s.fma(wv, xv, *acc);
                }
            }
        }
    }
    let mut sums = [[0.0; M]; R];
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (sum, acc) in sums.iter_mut().zip(acc) {
            *sum = s.sum(acc);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_cover_every_row_once_and_shrink_to_the_end(
            n in 0usize..5000, threads in 0usize..70, most in 1usize..200, less in 0usize..200,
        ) {
            let least = most.saturating_sub(less).max(1);
            let starts = guided(n, threads, most, least);
            prop_assert_eq!((starts[0], *starts.last().unwrap()), (0, n));
            let sizes: Vec<usize> = starts.windows(2).map(|w| w[1] - w[0]).collect();
            prop_assert!(sizes.iter().all(|&s| 0 < s && s <= most));
            prop_assert!(sizes.is_sorted_by(|a, b| a >= b));
            let (_, before_last) = sizes.split_last().unwrap_or((&0, &[]));
            prop_assert!(before_last.iter().all(|&s| s >= least));
        }
    }
}
