//! Attention and what surrounds it: the rotation table, the paged cache, and the launches of both.

use super::backend::{GpuBackend, GpuBuf};
use super::driver::{DevicePtr, Driver, Launch, Pinned, Stream, args};
use super::load::GpuWeight;
use super::memory::{DeviceBuffer, PinnedBuffer};
use super::products::{Form, GEMV_ROWS, Target};
use crate::Result;
use crate::layout::Geometry;
use crate::model::Layer;
use std::sync::Arc;

/// Threads of a block of `attention_decode.cu`.
const DECODE_BLOCK: u32 = 256;

/// The rotation table on the device, f32 `[padded_head_dim / 2]`.
///
/// # Errors
/// Those of the driver.
pub(super) fn upload_inv_freq(
    driver: &Arc<dyn Driver>,
    g: &Geometry,
    inv_freq: &[f32],
    stream: Stream,
) -> Result<DeviceBuffer> {
    let bytes = g.padded_head_dim / 2 * 4;
    let mut staging = PinnedBuffer::new(driver, bytes, Pinned::Cached, "rotation table")?;
    // Padding turns by nothing.
    let (table, rest) =
        bytemuck::cast_slice_mut::<u8, f32>(staging.as_mut_slice()).split_at_mut(inv_freq.len());
    table.copy_from_slice(inv_freq);
    rest.fill(0.0);
    let table = DeviceBuffer::new(driver, bytes, "rotation table")?;
    staging.upload(0..bytes, &table, 0, stream)?;
    driver.synchronize(stream)?;
    Ok(table)
}

/// Where a weight lies, if the model has it.
fn pointer(w: &Option<GpuWeight>) -> DevicePtr {
    w.as_ref().map_or(DevicePtr(0), |w| w.ptr)
}

impl GpuBackend {
    /// K and V cache of a layer.
    fn layer_cache(&self, index: usize) -> (DevicePtr, DevicePtr) {
        let half = self.cache.bytes() / (2 * self.g.n_layers.max(1));
        let k = self.cache.ptr().offset(2 * index * half);
        (k, k.offset(half))
    }

    /// Enqueues the q, k and v products of layer `index` with bias, head norms and rotation; k and v go to its cache.
    ///
    /// # Errors
    /// Those of the driver, the library and the host's share.
    pub(super) fn project(
        &mut self,
        index: usize,
        layer: &Layer<GpuWeight>,
        h: &GpuBuf,
        q: &mut GpuBuf,
    ) -> Result<()> {
        if self.g.n_heads == 0 {
            return Ok(());
        }
        let fused =
            self.step.n_tokens <= GEMV_ROWS && layer.q_norm.is_none() && layer.qkv.host.is_none();
        if fused {
            self.project_in_one(index, layer, h, q)
        } else {
            self.project_in_two(index, layer, h, q)
        }
    }

    /// Small steps of models without head norms: all of it inside the product.
    fn project_in_one(
        &self,
        index: usize,
        layer: &Layer<GpuWeight>,
        h: &GpuBuf,
        q: &mut GpuBuf,
    ) -> Result<()> {
        let (s, g) = (self.step, &self.g);
        let (k_cache, v_cache) = self.layer_cache(index);
        let args = args![
            layer.qkv.ptr,
            h.ptr,
            pointer(&layer.qkv_bias),
            self.inv_freq.ptr(),
            self.rope_scale,
            s.positions,
            s.slots,
            q.ptr,
            k_cache,
            v_cache,
            s.n_tokens,
            g.n_heads,
            g.n_kv_heads,
            g.padded_head_dim,
            g.hidden,
            g.hidden
        ];
        let tiles = g.qkv_width() / 16;
        let (gemv, launch) = self.kernels.gemv(s.n_tokens, tiles, g.hidden);
        self.launch(gemv.qkv_rope, &launch, &args)
    }

    /// The product, and behind it all the rest.
    fn project_in_two(
        &mut self,
        index: usize,
        layer: &Layer<GpuWeight>,
        h: &GpuBuf,
        q: &mut GpuBuf,
    ) -> Result<()> {
        let to = Target {
            y: self.product,
            ld: self.g.qkv_width(),
            form: Form::F32,
        };
        self.product(h.ptr, &layer.qkv, self.step.n_tokens, to)?;
        let (s, g) = (self.step, &self.g);
        let (k_cache, v_cache) = self.layer_cache(index);
        let args = args![
            to.y,
            pointer(&layer.qkv_bias),
            pointer(&layer.q_norm),
            pointer(&layer.k_norm),
            self.inv_freq.ptr(),
            self.rope_scale,
            g.head_norm_eps(self.rms_norm_eps),
            s.positions,
            s.slots,
            q.ptr,
            k_cache,
            v_cache,
            g.n_heads,
            g.n_kv_heads,
            g.padded_head_dim
        ];
        let warps = 4;
        let grid = (g.n_heads + 2 * g.n_kv_heads).div_ceil(warps);
        let launch = Launch {
            grid: [grid as u32, s.n_tokens as u32, 1],
            block: [32 * warps as u32, 1, 1],
            shared: 0,
        };
        self.launch(self.kernels.qkv_rope, &launch, &args)
    }

    /// Enqueues causal attention of the queries over the cache of layer `index`.
    ///
    /// # Errors
    /// Those of the driver.
    pub(super) fn attend(&mut self, index: usize, q: &GpuBuf, attn: &mut GpuBuf) -> Result<()> {
        if self.g.n_heads == 0 {
            return Ok(());
        }
        let (k_cache, v_cache) = self.layer_cache(index);
        let (s, g) = (self.step, &self.g);
        let scale = 1.0 / (g.head_dim as f32).sqrt();
        let (nq, nkv) = (g.n_heads, g.n_kv_heads);
        let (tables, seqs, one_block) = (s.tables, s.seqs, 1usize);
        let grid = |x: usize, y: usize, z: usize| [x as u32, y as u32, z as u32];
        if s.longest > 1 {
            let prefill = &self.kernels.attention_prefill;
            let (kernel, launch) = prefill.launch(s.longest, nq, nkv, s.n_seqs);
            let args = args![
                q.ptr, k_cache, v_cache, tables, seqs, attn.ptr, nq, nkv, one_block, scale
            ];
            return self.launch(kernel, &launch, &args);
        }
        let splits = s.splits;
        let (part, part_ml) = (self.arena.get("part"), self.arena.get("part_ml"));
        let groups = nkv * (nq / nkv).div_ceil(8);
        let launch = Launch {
            grid: grid(splits, groups, s.n_seqs),
            block: [DECODE_BLOCK, 1, 1],
            shared: 0,
        };
        let args = args![
            q.ptr, k_cache, v_cache, tables, seqs, part, part_ml, attn.ptr, nq, nkv, one_block,
            splits, scale
        ];
        self.launch(self.kernels.attention_decode, &launch, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let launch = Launch {
            grid: grid(nq, s.n_seqs, 1),
            block: [DECODE_BLOCK, 1, 1],
            shared: 0,
        };
        let args = args![part, part_ml, seqs, attn.ptr, nq, splits];
        self.launch(self.kernels.attention_combine, &launch, &args)
    }
}
