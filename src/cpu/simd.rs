//! The vector operations that kernels are written in.
//!
//! A value of a [`Simd`] type is the proof that the instructions are there: only [`super::Isa::dispatch`] makes one.
//! Its methods, and all generic code between them and the dispatch, are `#[inline(always)]`.

use super::isa::Kernel;
use half::{bf16, f16};

/// Widest vector of all instruction sets, in `f32` lanes.
pub(super) const MAX_LANES: usize = 16;

/// One instruction set: a vector of `f32` and what can be done with it.
///
/// # Safety
/// Pointers given to `unsafe` methods must be valid for the elements that the method names; none need be aligned.
pub(super) trait Simd: Copy {
    /// A vector of `LANES` floats.
    type V: Copy;
    /// Floats in a vector.
    const LANES: usize;
    /// Whether [`Simd::dot_pairs`] is an instruction here.
    const BF16_DOT: bool = false;
    /// Rows of the register tile that fits the registers beside two vectors of the other operand.
    const TILE_ROWS: usize;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of all lanes, in a fixed order.
    fn sum(self, v: Self::V) -> f32;
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `v * 2ⁿ` for integral `n` in -126..=127.
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V;

    /// Reads `LANES` floats.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Writes `LANES` floats.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Reads `LANES` bf16 numbers.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// Reads `LANES` f16 numbers.
    unsafe fn load_f16(self, p: *const f16) -> Self::V;

    /// `dst[c][r] = src[r][c]` for a block of `LANES` × `LANES` floats; strides in elements.
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);

    /// `acc[i] + x[2i]·w[0] + x[2i+1]·w[1]`, where `x` points to `2·LANES` and `w` to two bf16 numbers.
    unsafe fn dot_pairs(self, acc: Self::V, x: *const u32, w: *const bf16) -> Self::V;

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// `eˣ` to 2 ulp, saturating at e^±87.
    ///
    /// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 7 (remainder below 2⁻²⁷).
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let x = self.min(self.max(x, self.splat(-87.0)), self.splat(87.0));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first with trailing zeros so that n·LN2_HI is exact.
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        let r = self.fma(n, self.splat(-LN2_HI), x);
        let r = self.fma(n, self.splat(-LN2_LO), r);
        const COEFFICIENTS: [f32; 7] = [
            1.0 / 5040.0,
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
        ];
        let mut p = self.splat(COEFFICIENTS[0]);
        for c in &COEFFICIENTS[1..] {
            p = self.fma(p, r, self.splat(*c));
        }
        let p = self.fma(p, r, self.splat(1.0));
        self.scale_by_power(p, n)
    }

    /// `silu(gate) · up` with `silu(x) = x / (1 + e⁻ˣ)`.
    #[inline(always)]
    fn silu_mul(self, gate: Self::V, up: Self::V) -> Self::V {
        let e = self.exp(self.sub(self.zero(), gate));
        let silu = self.div(gate, self.add(self.splat(1.0), e));
        self.mul(silu, up)
    }

    /// The first `n < LANES` floats at `p`, the rest zero.
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: the caller vouches for `n` floats at `p`; `n < LANES ≤ MAX_LANES`.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// Writes the first `n < LANES` lanes.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: the caller vouches for `n` floats at `p`; `n < LANES ≤ MAX_LANES`.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

/// A weight's element: widened to `f32` on the way into a register.
pub(super) trait Element: Copy + bytemuck::Pod {
    /// Whether it is bf16, which dot-product instructions take as it is.
    const IS_BF16: bool = false;
    /// Reads `LANES` elements.
    ///
    /// # Safety
    /// `p` is valid for them.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise, passed on.
        unsafe { s.load(p) }
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's promise, passed on.
        unsafe { s.load_bf16(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: the caller's promise, passed on.
        unsafe { s.load_f16(p) }
    }
}

/// The first `n < LANES` elements at `p`, the rest zero.
///
/// # Safety
/// `p` is valid for `n` elements.
#[inline(always)]
pub(super) unsafe fn load_first<S: Simd, T: Element>(s: S, p: *const T, n: usize) -> S::V {
    let mut lanes = [T::zeroed(); MAX_LANES];
    // SAFETY: the caller's promise; `n < LANES ≤ MAX_LANES`.
    unsafe {
        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
        T::load(s, lanes.as_ptr())
    }
}

/// Asks for the cache lines of `len` floats at `p`; any address will do.
#[inline(always)]
pub(super) fn prefetch(p: *const f32, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..len).step_by(super::scratch::ALIGN / size_of::<f32>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: part of every x86-64 (SSE); a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(i).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, len);
}

/// The sum of squares of `x`.
#[inline(always)]
pub(super) fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = [s.zero(); 2];
    let (whole, rest) = split(x, S::LANES);
    for (i, p) in whole.enumerate() {
        // SAFETY: `p` starts `LANES` elements of `x`.
        let v = unsafe { s.load(p) };
        acc[i % 2] = s.fma(v, v, acc[i % 2]);
    }
    // SAFETY: `rest` has fewer than `LANES` elements.
    let v = unsafe { s.load_first(rest.as_ptr(), rest.len()) };
    acc[0] = s.fma(v, v, acc[0]);
    s.sum(s.add(acc[0], acc[1]))
}

/// Pointers to the whole vectors of `x`, and what is left over.
#[inline(always)]
fn split(x: &[f32], lanes: usize) -> (impl Iterator<Item = *const f32>, &[f32]) {
    let chunks = x.chunks_exact(lanes);
    let rest = chunks.remainder();
    (chunks.map(<[f32]>::as_ptr), rest)
}

/// `out[i] = f(a[i], b[i])`, vector by vector.
///
/// `f` is a [`Binary`] rather than a closure, which would not inherit the caller's instruction set.
#[inline(always)]
pub(super) fn zip<S: Simd, F: Binary<S>>(s: S, a: &[f32], b: &[f32], out: &mut [f32], f: F) {
    assert!(a.len() == out.len() && b.len() == out.len());
    let n = out.len();
    let whole = n - n % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: `i + LANES ≤ n` for all three.
        unsafe {
            let v = f.apply(s, s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i)));
            s.store(out.as_mut_ptr().add(i), v);
        }
    }
    // SAFETY: `n - whole < LANES` elements are left in all three.
    unsafe {
        let va = s.load_first(a.as_ptr().add(whole), n - whole);
        let vb = s.load_first(b.as_ptr().add(whole), n - whole);
        s.store_first(out.as_mut_ptr().add(whole), f.apply(s, va, vb), n - whole);
    }
}

/// A lane-wise function of two vectors.
pub(super) trait Binary<S: Simd>: Copy {
    fn apply(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// [`Simd::silu_mul`] as a [`Binary`].
#[derive(Clone, Copy)]
pub(super) struct SiluMul;

impl<S: Simd> Binary<S> for SiluMul {
    #[inline(always)]
    fn apply(self, s: S, a: S::V, b: S::V) -> S::V {
        s.silu_mul(a, b)
    }
}

/// `a · b · factor`.
#[derive(Clone, Copy)]
pub(super) struct MulScaled(pub(super) f32);

impl<S: Simd> Binary<S> for MulScaled {
    #[inline(always)]
    fn apply(self, s: S, a: S::V, b: S::V) -> S::V {
        s.mul(s.mul(a, s.splat(self.0)), b)
    }
}

/// The bf16 number nearest to `x` (ties to even), as its bits. NaN stays NaN only by its upper bits: activations
/// are finite.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    (bits + (0x7fff + (bits >> 16 & 1))) >> 16
}

/// The lanes of a vector.
pub(super) struct Lanes;

impl Kernel for Lanes {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::LANES
    }
}
