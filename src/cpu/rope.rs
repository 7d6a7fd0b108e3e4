//! What happens between the q/k/v projection and attention: per-head RMSNorm (Qwen3), rotary embedding, and the write
//! into the paged KV cache, in one pass.

use super::Pool;
use super::attention::kv_offset;
use super::isa::Kernel;
use super::norm::{SERIAL_BELOW, norm_row};
use super::pool::{Shards, piece};
use super::simd::Simd;
use crate::layout::KV_BLOCK;

/// Rotary embedding (Su et al., arXiv 2104.09864) in the convention of Hugging Face's `rotate_half`: element `i` pairs
/// with `i + head_dim/2`.
///
/// The cosines and sines are those of the current step's positions only, so a long context costs no memory.
pub struct Rope {
    inv_freq: Vec<f32>,
    attention_factor: f32,
    positions: Vec<u32>,
    /// `[position of the step][cos: head_dim/2, sin: head_dim/2]`.
    table: Vec<f32>,
}

impl Rope {
    /// From the inverse frequencies (`head_dim/2` of them) and the factor on cosine and sine (1 without YaRN).
    pub fn new(inv_freq: &[f32], attention_factor: f32) -> Rope {
        Rope {
            inv_freq: inv_freq.to_vec(),
            attention_factor,
            positions: Vec::new(),
            table: Vec::new(),
        }
    }

    /// Computes the table for `positions`, unless it is there already: a step's layers share it.
    ///
    /// The angle is rounded to f32 before the cosine is taken, as the reference implementation does; at position 30000 that
    /// moves it by up to 10⁻³.
    fn prepare(&mut self, positions: &[u32]) {
        if self.positions == positions {
            return;
        }
        self.positions.clear();
        self.positions.extend_from_slice(positions);
        let half = self.inv_freq.len();
        self.table.clear();
        self.table.resize(positions.len() * 2 * half, 0.0);
        for (row, &position) in self.table.chunks_exact_mut(2 * half).zip(positions) {
            let (cos, sin) = row.split_at_mut(half);
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
                let (s, c) = f64::from(position as f32 * freq).sin_cos();
                *cos = c as f32 * self.attention_factor;
                *sin = s as f32 * self.attention_factor;
            }
        }
    }
}

/// Sizes of one rank's q/k/v heads, and Qwen3's norms over each.
#[derive(Clone, Copy)]
pub struct QkvShape<'a> {
    /// Query heads on this rank.
    pub n_heads: usize,
    /// KV heads on this rank.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// RMSNorm weights `[head_dim]` of each query head.
    pub q_norm: Option<&'a [f32]>,
    /// RMSNorm weights `[head_dim]` of each key head.
    pub k_norm: Option<&'a [f32]>,
    /// Their epsilon.
    pub eps: f32,
}

/// `qkv[T, (n_heads + 2·n_kv_heads)·head_dim]` → normalised and rotated `q_out[T, n_heads·head_dim]`, and keys and values in
/// the cache at `slots[T]` (`block · KV_BLOCK + offset`).
///
/// # Panics
/// If a slot lies outside the cache, or two tokens share one.
#[allow(clippy::too_many_arguments)]
pub fn qkv_epilogue(
    pool: &Pool,
    shape: QkvShape<'_>,
    qkv: &[f32],
    rope: &mut Rope,
    positions: &[u32],
    slots: &[u32],
    q_out: &mut [f32],
    k_cache: &mut [f32],
    v_cache: &mut [f32],
) {
    let tokens = positions.len();
    let width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim;
    assert_eq!(qkv.len(), tokens * width);
    assert_eq!(q_out.len(), tokens * shape.n_heads * shape.head_dim);
    assert_eq!(slots.len(), tokens);
    assert_eq!(2 * rope.inv_freq.len(), shape.head_dim);
    assert_eq!(k_cache.len(), v_cache.len());
    rope.prepare(positions);
    let epilogue = Epilogue {
        shape,
        qkv,
        table: &rope.table,
        slots,
        q_out: &Shards::new(q_out),
        k_cache: &Shards::new(k_cache),
        v_cache: &Shards::new(v_cache),
        range: 0..tokens,
    };
    let isa = pool.isa();
    if qkv.len() < SERIAL_BELOW {
        return isa.dispatch(epilogue);
    }
    pool.run(|tid, n| {
        let range = piece(tokens, tid, n);
        isa.dispatch(Epilogue {
            range,
            ..epilogue.clone()
        });
    });
}

#[derive(Clone)]
struct Epilogue<'a> {
    shape: QkvShape<'a>,
    qkv: &'a [f32],
    table: &'a [f32],
    slots: &'a [u32],
    q_out: &'a Shards<f32>,
    k_cache: &'a Shards<f32>,
    v_cache: &'a Shards<f32>,
    range: std::ops::Range<usize>,
}

impl Kernel for Epilogue<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let QkvShape {
            n_heads,
            n_kv_heads,
            head_dim,
            q_norm,
            k_norm,
            eps,
        } = self.shape;
        let width = (n_heads + 2 * n_kv_heads) * head_dim;
        for t in self.range {
            let row = &self.qkv[t * width..][..width];
            let (q, kv) = row.split_at(n_heads * head_dim);
            let (k, v) = kv.split_at(n_kv_heads * head_dim);
            let table = &self.table[t * head_dim..][..head_dim];
            // SAFETY: token `t` is this thread's alone, and so is its slot.
            let q_out = unsafe { self.q_out.part(t * n_heads * head_dim, n_heads * head_dim) };
            for (q, out) in q
                .chunks_exact(head_dim)
                .zip(q_out.chunks_exact_mut(head_dim))
            {
                norm_and_rotate(s, q, q_norm, eps, table, out);
            }
            for h in 0..n_kv_heads {
                let slot = self.slots[t] as usize;
                let at = kv_offset(slot / KV_BLOCK, h, n_kv_heads, head_dim)
                    + slot % KV_BLOCK * head_dim;
                // SAFETY: as above.
                let (k_out, v_out) = unsafe {
                    (
                        self.k_cache.part(at, head_dim),
                        self.v_cache.part(at, head_dim),
                    )
                };
                norm_and_rotate(s, &k[h * head_dim..][..head_dim], k_norm, eps, table, k_out);
                v_out.copy_from_slice(&v[h * head_dim..][..head_dim]);
            }
        }
    }
}

#[inline(always)]
fn norm_and_rotate<S: Simd>(
    s: S,
    x: &[f32],
    norm: Option<&[f32]>,
    eps: f32,
    table: &[f32],
    out: &mut [f32],
) {
    match norm {
        Some(w) => norm_row(s, x, w, eps, out),
        None => out.copy_from_slice(x),
    }
    let half = out.len() / 2;
    let (cos, sin) = table.split_at(half);
    let (a, b) = out.split_at_mut(half);
    for i in 0..half {
        let (x, y) = (a[i], b[i]);
        a[i] = x * cos[i] - y * sin[i];
        b[i] = y * cos[i] + x * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rng, assert_close, pools};
    use super::*;

    /// Straight from the formulas, in f64: (q, k) of one token.
    fn head(
        x: &[f32],
        norm: Option<&[f32]>,
        eps: f32,
        position: u32,
        freq: &[f32],
        factor: f64,
    ) -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let n = x.len();
        if let Some(w) = norm {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / n as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            for (x, w) in x.iter_mut().zip(w) {
                *x *= scale * f64::from(*w);
            }
        }
        (0..n)
            .map(|i| {
                let angle = f64::from(position as f32 * freq[i % (n / 2)]);
                let turned = if i < n / 2 {
                    -x[i + n / 2]
                } else {
                    x[i - n / 2]
                };
                (x[i] * angle.cos() + turned * angle.sin()) * factor
            })
            .collect()
    }

    #[test]
    fn heads_are_normalised_rotated_and_stored_at_their_slots() {
        for pool in pools() {
            let mut rng = Rng::new(7);
            for (tokens, nq, nkv, hd, norms) in [
                (1, 9, 3, 64, false),
                (40, 14, 2, 64, true),
                (5, 4, 4, 10, true),
                (3, 0, 0, 8, false),
            ] {
                let freq: Vec<f32> = (0..hd / 2)
                    .map(|i| 1e5f32.powf(-2.0 * i as f32 / hd as f32))
                    .collect();
                let mut rope = Rope::new(&freq, 1.25);
                let weights = rng.floats(hd, 1.0);
                let norm = norms.then_some(&weights[..]);
                let shape = QkvShape {
                    n_heads: nq,
                    n_kv_heads: nkv,
                    head_dim: hd,
                    q_norm: norm,
                    k_norm: norm,
                    eps: 1e-6,
                };
                let qkv = rng.floats(tokens * (nq + 2 * nkv) * hd, 1.0);
                let positions: Vec<u32> = (0..tokens as u32).map(|t| 31 * t + 5).collect();
                let blocks = tokens.div_ceil(KV_BLOCK) + 2;
                let slots: Vec<u32> = (0..tokens as u32)
                    .map(|t| (blocks * KV_BLOCK) as u32 - 1 - t)
                    .collect();
                let mut q = vec![f32::NAN; tokens * nq * hd];
                let mut k = vec![0.5; blocks * nkv * KV_BLOCK * hd];
                let mut v = k.clone();
                qkv_epilogue(
                    &pool, shape, &qkv, &mut rope, &positions, &slots, &mut q, &mut k, &mut v,
                );
                let width = (nq + 2 * nkv) * hd;
                for t in 0..tokens {
                    let part = |h: usize| &qkv[t * width + h * hd..][..hd];
                    for h in 0..nq {
                        let expected = head(part(h), norm, 1e-6, positions[t], &freq, 1.25);
                        assert_close(&q[(t * nq + h) * hd..][..hd], &expected, 2e-6);
                    }
                    for h in 0..nkv {
                        let (block, offset) =
                            (slots[t] as usize / KV_BLOCK, slots[t] as usize % KV_BLOCK);
                        let at = ((block * nkv + h) * KV_BLOCK + offset) * hd;
                        let expected = head(part(nq + h), norm, 1e-6, positions[t], &freq, 1.25);
                        assert_close(&k[at..at + hd], &expected, 2e-6);
                        assert_eq!(&v[at..at + hd], part(nq + nkv + h));
                    }
                }
                let untouched = k.iter().filter(|&&x| x == 0.5).count();
                assert_eq!(untouched, k.len() - tokens * nkv * hd);
            }
        }
    }
}
