//! The kernels by name, and the launch shapes that their notebooks ask for.

use super::driver::{Arg, Driver, Function, Launch, Stream};
use super::kernels;
use crate::Result;
use std::sync::Arc;

/// The attention of many tokens a sequence, and what a block of it takes.
#[derive(Debug, Clone, Copy)]
pub struct PrefillAttention {
    kernel: Function,
    rows: usize,
    threads: usize,
    shared: usize,
}

impl PrefillAttention {
    /// The one for a device of this compute capability: Hopper's own products where they serve the head width. The shapes
    /// are those of the two notebooks.
    fn new(driver: &Arc<dyn Driver>, head_dim: usize) -> Result<PrefillAttention> {
        let hopper = driver.properties().compute == (9, 0);
        let (source, rows, threads, shared) = match head_dim {
            64 | 128 if hopper => {
                let rows = if head_dim == 64 { 192 } else { 128 };
                let shared = 2 * head_dim * (rows + 5 * 128);
                (&kernels::ATTENTION_PREFILL_WGMMA, rows, 2 * rows, shared)
            }
            _ => (&kernels::ATTENTION_PREFILL, 128, 256, 512 * (head_dim + 8)),
        };
        Ok(PrefillAttention {
            kernel: driver.function(source, &format!("{}_{head_dim}", source.name))?,
            rows,
            threads,
            shared,
        })
    }

    /// The kernel, and its launch over `n_seqs` sequences of up to `longest` tokens.
    pub fn launch(
        &self,
        longest: usize,
        n_heads: usize,
        n_kv_heads: usize,
        n_seqs: usize,
    ) -> (Function, Launch) {
        let tiles = (longest * n_heads / n_kv_heads).div_ceil(self.rows);
        let launch = Launch {
            grid: [tiles as u32, n_kv_heads as u32, n_seqs as u32],
            block: [self.threads as u32, 1, 1],
            shared: self.shared as u32,
        };
        (self.kernel, launch)
    }
}

/// Products of a weight matrix with few rows: those of one file.
pub struct Gemv {
    /// Rounded to bf16.
    pub bf16: Function,
    /// Sums as they are.
    pub f32: Function,
    /// Two products into one.
    pub gate_up_silu: Function,
    /// Rotated, k and v into the cache.
    pub qkv_rope: Function,
}

impl Gemv {
    fn new(driver: &Arc<dyn Driver>, source: &'static kernels::Source) -> Result<Gemv> {
        let get = |name: &str| driver.function(source, &format!("{}_{name}", source.name));
        Ok(Gemv {
            bf16: get("bf16")?,
            f32: get("f32")?,
            gate_up_silu: get("gate_up_silu")?,
            qkv_rope: get("qkv_rope")?,
        })
    }
}

/// Every kernel of a model with one head width.
pub struct Kernels {
    driver: Arc<dyn Driver>,
    sm_count: usize,
    /// `embed.cu`
    pub embed: Function,
    /// `norm.cu`
    pub add_rms_norm: Function,
    /// `gemv.cu`
    gemv: Gemv,
    /// `gemv.cu`
    pub gemv_gate_up_silu_tiled: Function,
    /// `gemv_batch.cu`
    gemv_batch: Gemv,
    /// `qkv.cu`
    pub qkv_rope: Function,
    /// `activation.cu`
    pub silu_mul: Function,
    /// `activation.cu`
    pub gather_rows: Function,
    /// `sample.cu`
    pub sample_partial: Function,
    /// `handover.cu`
    pub hand_over: Function,
    /// `handover.cu`
    pub take_back_bf16: Function,
    /// `handover.cu`
    pub take_back_f32: Function,
    /// `handover.cu`
    pub take_back_gated: Function,
    /// `sample.cu`
    pub sample_join: Function,
    /// `sample.cu`
    pub sample_reduce: Function,
    /// `candidates.cu`
    pub candidates: Function,
    /// `candidates.cu`
    pub candidates_merge: Function,
    /// `candidates.cu`
    pub draw: Function,
    /// `attention_prefill.cu` or `attention_prefill_wgmma.cu`
    pub attention_prefill: PrefillAttention,
    /// `attention_decode.cu`
    pub attention_decode: Function,
    /// `attention_decode.cu`
    pub attention_combine: Function,
}

impl Kernels {
    /// Compiles what is not compiled yet and looks up every kernel.
    ///
    /// # Errors
    /// A kernel cannot be compiled.
    pub fn new(driver: &Arc<dyn Driver>, head_dim: usize) -> Result<Kernels> {
        let get = |source, name: &str| driver.function(source, name);
        let by_width = |source, name: &str| driver.function(source, &format!("{name}_{head_dim}"));
        Ok(Kernels {
            sm_count: driver.properties().sm_count as usize,
            embed: get(&kernels::EMBED, "embed")?,
            add_rms_norm: get(&kernels::NORM, "add_rms_norm")?,
            gemv: Gemv::new(driver, &kernels::GEMV)?,
            gemv_gate_up_silu_tiled: get(&kernels::GEMV, "gemv_gate_up_silu_tiled")?,
            gemv_batch: Gemv::new(driver, &kernels::GEMV_BATCH)?,
            qkv_rope: get(&kernels::QKV, "qkv_rope")?,
            silu_mul: get(&kernels::ACTIVATION, "silu_mul")?,
            gather_rows: get(&kernels::ACTIVATION, "gather_rows")?,
            hand_over: get(&kernels::HANDOVER, "hand_over")?,
            take_back_bf16: get(&kernels::HANDOVER, "take_back_bf16")?,
            take_back_f32: get(&kernels::HANDOVER, "take_back_f32")?,
            take_back_gated: get(&kernels::HANDOVER, "take_back_gated")?,
            sample_partial: get(&kernels::SAMPLE, "sample_partial")?,
            sample_join: get(&kernels::SAMPLE, "sample_join")?,
            sample_reduce: get(&kernels::SAMPLE, "sample_reduce")?,
            candidates: get(&kernels::CANDIDATES, "candidates")?,
            candidates_merge: get(&kernels::CANDIDATES, "candidates_merge")?,
            draw: get(&kernels::CANDIDATES, "draw")?,
            attention_prefill: PrefillAttention::new(driver, head_dim)?,
            attention_decode: by_width(&kernels::ATTENTION_DECODE, "attention_decode")?,
            attention_combine: by_width(&kernels::ATTENTION_DECODE, "attention_combine")?,
            driver: driver.clone(),
        })
    }

    /// Launches a kernel of this module's; the arguments are those of its notebook.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn run(
        &self,
        kernel: Function,
        launch: &Launch,
        args: &[Arg],
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: every caller is in this module's siblings, passes what the kernel's notebook lists, and keeps the
        // buffers in an arena that outlives the stream's work.
        unsafe { self.driver.launch(kernel, launch, args, stream) }
    }

    /// One thread for eight elements of rows of `width`.
    pub fn elements(width: usize, rows: usize) -> Launch {
        Launch {
            grid: [width.div_ceil(8 * 256) as u32, rows as u32, 1],
            block: [256, 1, 1],
            shared: 0,
        }
    }

    /// The products for `m` rows and their launch: `tiles` of 16 rows of weights (8 pairs), a sum over `k`.
    pub fn gemv(&self, m: usize, tiles: usize, k: usize) -> (&Gemv, Launch) {
        if m < BATCH_ROWS {
            (&self.gemv, self.gemv_launch(tiles, k))
        } else {
            (&self.gemv_batch, batch_launch(tiles, k, self.sm_count))
        }
    }

    /// The launch rule of `gemv.cu`, for any number of rows.
    pub fn gemv_launch(&self, tiles: usize, k: usize) -> Launch {
        gemv_launch(tiles, k, self.sm_count)
    }
}

/// From this many rows on `gemv_batch.cu` is faster.
const BATCH_ROWS: usize = 4;

/// As many warps a block as have more than a step each, and as many blocks as fit; see `gemv_batch.cu`.
fn batch_launch(tiles: usize, k: usize, sms: usize) -> Launch {
    let warps = [16, 8].into_iter().find(|w| k > 64 * w).unwrap_or(4);
    let grid = (sms * 16 / warps).min(8 * tiles.max(1));
    Launch::linear(grid, 32 * warps as u32)
}

/// Of 16 × 1, 8 × 2 and 4 × 4 warps a block × blocks a multiprocessor, the one whose fullest multiprocessor has the fewest
/// tiles; the notebook in `gemv.cu` has the reasons.
fn gemv_launch(tiles: usize, k: usize, sms: usize) -> Launch {
    let tiles = tiles.max(1);
    let order = if tiles <= sms || tiles >= 32 * sms {
        [16, 8, 4]
    } else {
        [8, 16, 4]
    };
    let busy = |warps: &usize| *warps == 4 || *warps < 2 * k.div_ceil(256);
    let shape = |warps: usize| {
        let grid = (sms * 16 / warps).min(8 * tiles);
        let of_a_block = (8 * tiles).div_ceil(grid).div_ceil(8);
        (of_a_block * grid.div_ceil(sms), grid, warps)
    };
    // `min_by_key` keeps the first of equals.
    let best = order
        .into_iter()
        .filter(busy)
        .map(shape)
        .min_by_key(|s| s.0);
    let (_, grid, warps) = best.unwrap_or((0, tiles, 4));
    Launch::linear(grid, 32 * warps as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same rule as `tests/kernels/cases.py` has it, on an H200 and on the stand-in.
    #[test]
    fn the_gemv_launch_rules_are_those_of_the_kernel_tests() {
        // (tiles, k, sms) → grid, threads, from running that file's `gemv_launch` and `gemv_batch_launch`.
        let batch = [
            ((288, 3584, 132), (132, 512)),
            ((9504, 3584, 132), (132, 512)),
            ((36, 576, 132), (264, 256)),
            ((608, 896, 132), (264, 256)),
            ((4, 512, 132), (32, 128)),
            ((33, 1536, 4), (4, 512)),
        ];
        for ((tiles, k, sms), (grid, threads)) in batch {
            let got = batch_launch(tiles, k, sms);
            assert_eq!(got, Launch::linear(grid, threads), "{tiles} {k} {sms}");
        }
        let cases = [
            ((288, 3584, 132), (132, 512)),
            ((224, 18944, 132), (264, 256)),
            ((2368, 3584, 132), (264, 256)),
            ((9504, 3584, 132), (132, 512)),
            ((36, 576, 132), (288, 128)),
            ((512, 14784, 132), (264, 256)),
            ((56, 4864, 132), (132, 512)),
            ((20, 64, 4), (16, 128)),
            ((4, 32, 4), (16, 128)),
            ((33, 1536, 4), (8, 256)),
        ];
        for ((tiles, k, sms), (grid, threads)) in cases {
            assert_eq!(
                gemv_launch(tiles, k, sms),
                Launch::linear(grid, threads),
                "{tiles} {k} {sms}"
            );
        }
    }
}
