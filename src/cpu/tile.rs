//! The register-blocked product that GEMM and attention share.
//!
//! The lanes of a vector are *columns* of the result (tokens, or query rows), two vectors side by side; the *rows*
//! (output features, KV positions, head dimensions) come from an operand that lies in memory as the caller has it and
//! is broadcast element by element: weights and the KV cache are never rearranged.

use super::simd::Simd;
use half::bf16;

/// `c[r][lane] (+)= Σ over segments g, steps i: w[g + r·w_row + i·w_step] · x[(g-th segment's i-th step)][lane]`.
///
/// Strides and offsets count elements. `x` holds the steps of all segments one after the other, `x_stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) w: *const f32,
    pub(super) w_row: usize,
    pub(super) w_step: usize,
    /// Where the segments begin, from `w`; each has `steps` steps.
    pub(super) segments: &'a [usize],
    pub(super) steps: usize,
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Add to `c` rather than overwrite it.
    pub(super) accumulate: bool,
}

impl Product<'_> {
    /// Computes `rows` rows of one vector, or of two if `wide`.
    ///
    /// # Safety
    /// `w`, `x` and `c` are valid for what the formula reads and writes.
    #[inline(always)]
    pub(super) unsafe fn rows<S: Simd>(&self, s: S, rows: usize, wide: bool) {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's promise; `row + step ≤ rows`.
            row += unsafe {
                match rows - row {
                    12.. if S::TILE_ROWS >= 12 => self.tile::<S, 12>(s, row, wide),
                    6.. if S::TILE_ROWS == 6 => self.tile::<S, 6>(s, row, wide),
                    4.. if S::TILE_ROWS >= 4 => self.tile::<S, 4>(s, row, wide),
                    2.. if S::TILE_ROWS == 2 => self.tile::<S, 2>(s, row, wide),
                    _ => self.tile::<S, 1>(s, row, wide),
                }
            };
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&self, s: S, row: usize, wide: bool) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            if wide {
                self.registers::<S, R, 2>(s, row);
            } else {
                self.registers::<S, R, 1>(s, row);
            }
        }
        R
    }

    /// `R` rows of `V` vectors, all in registers.
    #[inline(always)]
    unsafe fn registers<S: Simd, const R: usize, const V: usize>(&self, s: S, row: usize) {
        let mut acc = [[s.zero(); V]; R];
        // SAFETY: the caller's promise.
        unsafe {
            let c = self.c.add(row * self.c_stride);
            if self.accumulate {
                acc = load_tile(s, c, self.c_stride);
            }
            let mut x = self.x;
            let w_row = self.w_row;
            for &segment in self.segments {
                let mut w = self.w.add(segment + row * w_row);
                for _ in 0..self.steps {
                    let mut xv = [s.zero(); V];
                    for (v, xv) in xv.iter_mut().enumerate() {
                        *xv = s.load(x.add(v * S::LANES));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let wv = s.splat(*w.add(r.wrapping_mul(w_row)));
                        for (acc, xv) in acc.iter_mut().zip(xv) {
                            *acc = s.fma(wv, xv, *acc);
                        }
                    }
                    w = w.add(self.w_step);
                    x = x.add(self.x_stride);
                }
            }
            store_tile(s, c, self.c_stride, acc);
        }
    }
}

/// The same for bf16 weights that stay bf16, two steps at a time by a dot-product instruction.
///
/// Each activation is the sum of two bf16 numbers, `hi = bf16(x)` and `lo = bf16(x - hi)`: |x - hi - lo| ≤ 2⁻¹⁸·|x|,
/// and the products are exact in f32 but for its own rounding. The result is within 2⁻¹⁸·Σ|x·w| of f32 arithmetic.
#[derive(Clone, Copy)]
pub(super) struct PairProduct {
    pub(super) w: *const bf16,
    /// Elements between two rows of `w`.
    pub(super) w_row: usize,
    /// Pairs of steps.
    pub(super) pairs: usize,
    /// For each pair of steps: `2·LANES` pairs of `hi`, then as many of `lo`.
    pub(super) x: *const u32,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) accumulate: bool,
}

impl PairProduct {
    /// The same without its first `rows` rows.
    ///
    /// # Safety
    /// There are that many.
    #[inline(always)]
    pub(super) unsafe fn skip(self, rows: usize) -> Self {
        PairProduct {
            // SAFETY: the caller's promise.
            w: unsafe { self.w.add(rows * self.w_row) },
            // SAFETY: the caller's promise.
            c: unsafe { self.c.add(rows * self.c_stride) },
            ..self
        }
    }

    /// Computes `rows` rows of one vector, or of two if `wide`.
    ///
    /// # Safety
    /// `w`, `x` and `c` are valid for what the type describes; `S::BF16_DOT` holds.
    #[inline(always)]
    pub(super) unsafe fn rows<S: Simd>(&self, s: S, rows: usize, wide: bool) {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's promise; `row + step ≤ rows`.
            row += unsafe {
                match rows - row {
                    12.. => self.tile::<S, 12>(s, row, wide),
                    4.. => self.tile::<S, 4>(s, row, wide),
                    _ => self.tile::<S, 1>(s, row, wide),
                }
            };
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&self, s: S, row: usize, wide: bool) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            if wide {
                self.registers::<S, R, 2>(s, row);
            } else {
                self.registers::<S, R, 1>(s, row);
            }
        }
        R
    }

    #[inline(always)]
    unsafe fn registers<S: Simd, const R: usize, const V: usize>(&self, s: S, row: usize) {
        let mut acc = [[s.zero(); V]; R];
        // SAFETY: the caller's promise.
        unsafe {
            let c = self.c.add(row * self.c_stride);
            if self.accumulate {
                acc = load_tile(s, c, self.c_stride);
            }
            let w_row = self.w_row;
            let mut w = self.w.add(row * w_row);
            let mut x = self.x;
            for _ in 0..self.pairs {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let w = w.add(r.wrapping_mul(w_row));
                    for part in [0, 2] {
                        for (v, acc) in acc.iter_mut().enumerate() {
                            *acc = s.dot_pairs(*acc, x.add((part + v) * S::LANES), w);
                        }
                    }
                }
                w = w.add(2);
                x = x.add(4 * S::LANES);
            }
            store_tile(s, c, self.c_stride, acc);
        }
    }
}

#[inline(always)]
unsafe fn load_tile<S: Simd, const R: usize, const V: usize>(
    s: S,
    c: *const f32,
    stride: usize,
) -> [[S::V; V]; R] {
    let mut tile = [[s.zero(); V]; R];
    for (r, row) in tile.iter_mut().enumerate() {
        for (v, lanes) in row.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *lanes = unsafe { s.load(c.add(r * stride + v * S::LANES)) };
        }
    }
    tile
}

#[inline(always)]
unsafe fn store_tile<S: Simd, const R: usize, const V: usize>(
    s: S,
    c: *mut f32,
    stride: usize,
    tile: [[S::V; V]; R],
) {
    for (r, row) in tile.into_iter().enumerate() {
        for (v, lanes) in row.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { s.store(c.add(r * stride + v * S::LANES), lanes) };
        }
    }
}

/// `dst[c][r] = src[r][c]` for `rows × cols` floats, in blocks where they are whole.
///
/// # Safety
/// `src` is valid for reads of `rows` rows of `cols`, `dst` for writes of `cols` rows of `rows`, with these strides.
#[inline(always)]
pub(super) unsafe fn transpose<S: Simd>(
    s: S,
    (rows, cols): (usize, usize),
    src: *const f32,
    src_stride: usize,
    dst: *mut f32,
    dst_stride: usize,
) {
    for r in (0..rows).step_by(S::LANES) {
        for c in (0..cols).step_by(S::LANES) {
            let (height, width) = ((rows - r).min(S::LANES), (cols - c).min(S::LANES));
            // SAFETY: the block lies within both.
            unsafe {
                let (src, dst) = (src.add(r * src_stride + c), dst.add(c * dst_stride + r));
                if height == S::LANES && width == S::LANES {
                    s.transpose(src, src_stride, dst, dst_stride);
                } else {
                    for i in 0..height {
                        for j in 0..width {
                            *dst.add(j * dst_stride + i) = *src.add(i * src_stride + j);
                        }
                    }
                }
            }
        }
    }
}
