//! Token embedding: rows of a table, widened to `f32`.

use super::isa::Kernel;
use super::simd::{Element, Simd, load_first};
use super::{Matrix, Pool};
use crate::weights::Dtype;
use half::{bf16, f16};

/// `out[t] = table[tokens[t] - first_row]`, or zeros where another rank of the vocabulary split holds that row.
pub fn embed(pool: &Pool, table: Matrix<'_>, first_row: u32, tokens: &[u32], out: &mut [f32]) {
    assert_eq!(out.len(), tokens.len() * table.cols);
    pool.isa().dispatch(Rows {
        table,
        first_row,
        tokens,
        out,
    });
}

struct Rows<'a> {
    table: Matrix<'a>,
    first_row: u32,
    tokens: &'a [u32],
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.table.dtype {
            Dtype::Bf16 => self.rows::<S, bf16>(s),
            Dtype::F16 => self.rows::<S, f16>(s),
            Dtype::F32 => self.rows::<S, f32>(s),
        }
    }
}

impl Rows<'_> {
    #[inline(always)]
    fn rows<S: Simd, T: Element>(self, s: S) {
        let width = self.table.cols;
        if width == 0 {
            return;
        }
        let table: *const T = self.table.elements();
        for (&token, out) in self.tokens.iter().zip(self.out.chunks_exact_mut(width)) {
            match token.checked_sub(self.first_row) {
                Some(row) if (row as usize) < self.table.rows => {
                    // SAFETY: the row exists and has `width` elements.
                    unsafe { widen(s, table.add(row as usize * width), out) };
                }
                _ => out.fill(0.0),
            }
        }
    }
}

/// Converts `out.len()` elements.
///
/// # Safety
/// `w` is valid for as many.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd, T: Element>(s: S, w: *const T, out: &mut [f32]) {
    let rest = out.len() % S::LANES;
    let whole = out.len() - rest;
    // SAFETY: the caller's promise.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            s.store(out.as_mut_ptr().add(i), T::load(s, w.add(i)));
        }
        let last = load_first(s, w.add(whole), rest);
        s.store_first(out.as_mut_ptr().add(whole), last, rest);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rng, pools, weights};
    use super::*;

    #[test]
    fn rows_of_this_rank_are_widened_and_others_are_zero() {
        for pool in pools() {
            for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
                for width in [1, 19, 64] {
                    let (data, values) = weights(&mut Rng::new(3), dtype, 10 * width);
                    let table = Matrix {
                        data: &data,
                        dtype,
                        rows: 10,
                        cols: width,
                    };
                    let mut out = vec![f32::NAN; 4 * width];
                    embed(&pool, table, 100, &[99, 100, 109, 110], &mut out);
                    let zeros = vec![0.0; width];
                    assert_eq!(&out[..width], zeros);
                    assert_eq!(&out[width..2 * width], &values[..width]);
                    assert_eq!(&out[2 * width..3 * width], &values[9 * width..]);
                    assert_eq!(&out[3 * width..], zeros);
                }
            }
        }
    }
}
