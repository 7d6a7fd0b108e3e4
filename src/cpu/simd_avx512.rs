//! AVX-512 (F, BW, DQ, VL), with and without AVX512_BF16: sixteen lanes, thirty-two registers.

use super::{isa::Kernel, simd::Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof that AVX-512 is there, and AVX512_BF16 too if `BF16`.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

pub(super) fn available() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
}

/// Runs `kernel` with these instructions.
///
/// # Safety
/// [`available`] holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<false>(()))
}

/// Runs `kernel` with these instructions.
///
/// # Safety
/// [`available`] holds, and AVX512_BF16 is there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true>(()))
}

// SAFETY (every block below): an `Avx512` exists only inside `enter` and `enter_bf16`, so the instructions are there;
// pointers are the trait's contract.
impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    const LANES: usize = 16;
    const BF16_DOT: bool = BF16;
    const TILE_ROWS: usize = 12;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        unsafe {
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
    }
    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<0>(v) }
    }
    #[inline(always)]
    fn scale_by_power(self, v: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(v, n) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, row) in r.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(src.add(i * src_stride));
            }
            // 4 × 4 within each 128-bit quarter ...
            let mut q = r;
            for i in (0..16).step_by(4) {
                let lo01 = _mm512_unpacklo_ps(r[i], r[i + 1]);
                let hi01 = _mm512_unpackhi_ps(r[i], r[i + 1]);
                let lo23 = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
                let hi23 = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
                q[i] = _mm512_shuffle_ps::<0x44>(lo01, lo23);
                q[i + 1] = _mm512_shuffle_ps::<0xee>(lo01, lo23);
                q[i + 2] = _mm512_shuffle_ps::<0x44>(hi01, hi23);
                q[i + 3] = _mm512_shuffle_ps::<0xee>(hi01, hi23);
            }
            // ... then the quarters as a 4 × 4 matrix: column 4·j + i comes from quarter j of the rows i, i + 4, ...
            for i in 0..4 {
                let (a, b, c, d) = (q[i], q[i + 4], q[i + 8], q[i + 12]);
                let ab_even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let ab_odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let cd_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let cd_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(ab_even, cd_even),
                    _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd),
                    _mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even),
                    _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd),
                ];
                for (j, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_ps(dst.add((4 * j + i) * dst_stride), column);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_pairs(self, acc: __m512, x: *const u32, w: *const bf16) -> __m512 {
        unsafe {
            let x: __m512bh = std::mem::transmute(_mm512_loadu_si512(x.cast()));
            let w: __m512bh =
                std::mem::transmute(_mm512_set1_epi32(w.cast::<i32>().read_unaligned()));
            _mm512_dpbf16_ps(acc, x, w)
        }
    }
}
