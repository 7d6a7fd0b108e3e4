//! The forward pass on a GPU: every operation of [`Backend`] as launches on one stream.

use super::Limits;
use super::arena::{self, Arena, StepBuffers};
use super::collective::{DeviceCollective, Element, FusedNorm};
use super::driver::{Arg, DevicePtr, Driver, Function, Launch, Pinned, Stream, args};
use super::gemm::{Gemm, Out, Product};
use super::geometry::Geometry;
use super::graphs::Graphs;
use super::launch::{Kernels, PREFILL_SHARED_PER_ELEMENT};
use super::load::GpuWeight;
use super::memory::{DeviceBuffer, OwnedEvent, PinnedBuffer};
use super::rank::Parts;
use super::step::Step;
use crate::Result;
use crate::config::ModelConfig;
use crate::model::{Activations, Backend, Batch, Choice, KV_BLOCK, Layer};
use std::sync::Arc;

/// Up to this many rows a product is a GEMV of our own; beyond, the library's.
const GEMV_ROWS: usize = 8;

/// A step buffer: rows of `cols` elements in the arena.
#[derive(Debug)]
pub struct GpuBuf {
    ptr: DevicePtr,
    cols: usize,
}

impl GpuBuf {
    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A GPU rank.
pub struct GpuBackend {
    driver: Arc<dyn Driver>,
    gemm: Box<dyn Gemm>,
    comm: Box<dyn DeviceCollective>,
    stream: Stream,
    kernels: Kernels,
    g: Geometry,
    limits: Limits,
    rms_norm_eps: f32,
    rope_scale: f32,
    inv_freq: DeviceBuffer,
    arena: Arena,
    cache: DeviceBuffer,
    /// Keeps the weights that [`GpuWeight`]s point to.
    _weights: DeviceBuffer,
    product: DevicePtr,
    wanted: DevicePtr,
    logits_local: DevicePtr,
    workspace: DevicePtr,
    step: Step,
    /// Rows that the operations see: the step's tokens, and behind `keep_wanted` the wanted ones.
    rows: usize,
    graphs: Graphs,
    /// The step's description on its way to the device.
    staging: PinnedBuffer,
    sent: OwnedEvent,
    logits_host: PinnedBuffer,
    logits: Vec<f32>,
}

impl GpuBackend {
    /// A backend for one rank with everything allocated that its steps will use.
    ///
    /// # Errors
    /// The device has too little memory, or a kernel cannot be compiled.
    pub fn new(
        config: &ModelConfig,
        g: Geometry,
        limits: Limits,
        parts: Parts,
        weights: DeviceBuffer,
    ) -> Result<(Self, Activations<GpuBuf>)> {
        let Parts {
            driver,
            gemm,
            comm,
            stream,
        } = parts;
        let sms = driver.properties().sm_count as usize;
        let buffers = StepBuffers::new(&g, &limits, sms, gemm.workspace_bytes());
        let arena = Arena::new(&driver, &buffers)?;
        let cache = DeviceBuffer::new(&driver, kv_bytes(&g, limits.n_kv_blocks), "KV cache")?;
        let (inv_freq, rope_scale) = config.rope.inv_freq(g.head_dim);
        let n_logits = limits.max_logit_rows * config.vocab_size;
        let at = |name: &str, cols: usize| GpuBuf {
            ptr: arena.get(name),
            cols,
        };
        let activations = Activations {
            x: at("x", g.hidden),
            h: at("h", g.hidden),
            q: at("q", g.q_width()),
            attn: at("attn", g.q_width()),
            mlp: at("mlp", g.padded_inter),
            partial: at("partial", g.hidden),
            logits: at("logits", config.vocab_size),
        };
        let alone = g.vocab.len() == 1;
        let batch = arena.get("batch");
        let backend = GpuBackend {
            kernels: Kernels::new(&driver, g.padded_head_dim)?,
            limits,
            rms_norm_eps: config.rms_norm_eps,
            rope_scale,
            inv_freq: upload_inv_freq(&driver, &g, &inv_freq, stream)?,
            product: arena.get("product"),
            wanted: arena.get("wanted"),
            logits_local: arena.get(if alone { "logits" } else { "logits_local" }),
            workspace: arena.get("workspace"),
            step: Step::none(batch),
            rows: 0,
            graphs: Graphs::new(&driver, stream),
            staging: PinnedBuffer::new(
                &driver,
                arena::batch_words(&limits) * 4,
                Pinned::Cached,
                "step staging",
            )?,
            sent: OwnedEvent::new(&driver, false)?,
            logits_host: PinnedBuffer::new(
                &driver,
                n_logits * 4,
                Pinned::Cached,
                "logits on the host",
            )?,
            logits: if alone {
                Vec::new()
            } else {
                vec![0.0; n_logits]
            },
            _weights: weights,
            driver,
            gemm,
            comm,
            stream,
            g,
            arena,
            cache,
        };
        Ok((backend, activations))
    }

    /// `y[m, n] = x[m, k] · wᵀ` in bf16, by the kernel or the library that suits `m`.
    fn product(
        &mut self,
        x: DevicePtr,
        w: &GpuWeight,
        y: DevicePtr,
        m: usize,
        out: Out,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.cols);
        if n == 0 || self.idle() {
            return Ok(());
        }
        if k == 0 {
            // A rank that holds no head or no feature adds nothing to the sum.
            let bytes = m * n * if out == Out::F32 { 4 } else { 2 };
            // SAFETY: the buffers of a step are as long as the plan's longest step, which `begin` has checked.
            return unsafe { self.driver.fill(y, 0, bytes, self.stream) };
        }
        if m <= GEMV_ROWS {
            return self.kernels.gemv(self.stream, out, w, x, y, m);
        }
        let p = Product {
            x,
            w: w.ptr,
            y,
            m,
            n,
            k,
            out,
        };
        // SAFETY: as above; the weights live as long as the backend.
        unsafe { self.gemm.matmul(&p, self.workspace, self.stream) }
    }

    /// Whether there is nothing to enqueue: a graph that holds it has been launched, or no rows are left.
    fn idle(&self) -> bool {
        self.rows == 0 || self.graphs.has_launched()
    }

    /// Launches a kernel, unless there is nothing to do.
    fn launch(&self, kernel: Function, launch: &Launch, args: &[Arg]) -> Result<()> {
        if self.idle() {
            return Ok(());
        }
        self.kernels.run(kernel, launch, args, self.stream)
    }

    /// Sums a buffer of the step over the ranks, unless there is nothing to do.
    fn sum_over_ranks(&mut self, x: &GpuBuf, element: Element) -> Result<()> {
        if self.idle() {
            return Ok(());
        }
        let n = self.rows * x.cols;
        // SAFETY: the arena outlives the stream's work.
        unsafe { self.comm.all_reduce(x.ptr, n, element, self.stream) }
    }

    fn norm_launch(&self) -> Launch {
        let threads = (self.g.hidden / 8).next_multiple_of(32).min(1024);
        Launch::linear(self.rows, threads as u32)
    }

    /// How many decode graphs have been recorded.
    pub fn recorded_graphs(&self) -> usize {
        self.graphs.recorded()
    }

    /// Into how many parts each rank's share of the first `n_known` tokens is cut, and how many of them this rank has.
    fn parts_of_ranks(&self, n_known: usize) -> (Vec<usize>, usize) {
        let mut left = n_known;
        let known = self.g.vocab.iter().map(|&rows| {
            let here = rows.min(left);
            left -= here;
            here
        });
        let known: Vec<usize> = known.collect();
        let parts = known.iter().map(|&n| arena::sample_parts(n)).collect();
        (parts, known[self.g.tp_rank])
    }

    /// K and V cache of a layer.
    fn layer_cache(&self, index: usize) -> (DevicePtr, DevicePtr) {
        let half = self.cache.bytes() / (2 * self.g.n_layers.max(1));
        let k = self.cache.ptr().offset(2 * index * half);
        (k, k.offset(half))
    }
}

/// Bytes of a rank's KV cache.
pub fn kv_bytes(g: &Geometry, n_blocks: usize) -> usize {
    2 * g.n_layers * n_blocks * g.n_kv_heads * KV_BLOCK * g.padded_head_dim * 2
}

fn upload_inv_freq(
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

impl Backend for GpuBackend {
    type Weight = GpuWeight;
    type Buf = GpuBuf;

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.limits.check(batch)?;
        // The staging memory is free again when the last step's copy is done.
        self.sent.synchronize()?;
        let at = self.arena.get("batch");
        let words = bytemuck::cast_slice_mut(self.staging.as_mut_slice());
        let max_splits = arena::max_splits(&self.g, self.driver.properties().sm_count as usize);
        let (step, n) = Step::describe(batch, words, at, max_splits);
        self.step = step;
        self.rows = step.n_tokens;
        self.staging.upload(
            0..4 * n,
            self.arena.memory(),
            self.arena.offset(at),
            self.stream,
        )?;
        self.sent.record(self.stream)?;
        self.graphs.begin(step.decode_key())
    }

    fn embed(&mut self, table: &GpuWeight, x: &mut GpuBuf) -> Result<()> {
        let (g, tokens) = (&self.g, self.step.tokens);
        let args = args![
            table.ptr,
            tokens,
            x.ptr,
            g.hidden,
            g.first_row,
            g.vocab_local()
        ];
        self.launch(
            self.kernels.embed,
            &Launch::linear(self.step.n_tokens, 128),
            &args,
        )
    }

    fn all_reduce(&mut self, x: &mut GpuBuf) -> Result<()> {
        self.sum_over_ranks(x, Element::F32)
    }

    fn rms_norm(&mut self, x: &GpuBuf, weight: &GpuWeight, h: &mut GpuBuf) -> Result<()> {
        let args = args![x.ptr, weight.ptr, h.ptr, self.g.hidden, self.rms_norm_eps];
        self.launch(self.kernels.rms_norm, &self.norm_launch(), &args)
    }

    fn all_reduce_add_norm(
        &mut self,
        partial: &mut GpuBuf,
        x: &mut GpuBuf,
        weight: &GpuWeight,
        h: &mut GpuBuf,
    ) -> Result<()> {
        if self.idle() {
            return Ok(());
        }
        let fused = FusedNorm {
            partial: partial.ptr,
            x: x.ptr,
            weight: weight.ptr,
            h: h.ptr,
            rows: self.rows,
            hidden: self.g.hidden,
            eps: self.rms_norm_eps,
        };
        // SAFETY: the arena and the weights outlive the stream's work.
        if unsafe { self.comm.all_reduce_add_norm(&fused, self.stream) }? {
            return Ok(());
        }
        self.sum_over_ranks(partial, Element::Bf16)?;
        let args = args![
            partial.ptr,
            x.ptr,
            weight.ptr,
            h.ptr,
            self.g.hidden,
            self.rms_norm_eps
        ];
        self.launch(self.kernels.add_rms_norm, &self.norm_launch(), &args)
    }

    fn qkv(
        &mut self,
        index: usize,
        layer: &Layer<GpuWeight>,
        h: &GpuBuf,
        q: &mut GpuBuf,
    ) -> Result<()> {
        if self.g.n_heads == 0 {
            return Ok(());
        }
        let (s, g) = (self.step, &self.g);
        let (t, (nq, nkv, d)) = (s.n_tokens, (g.n_heads, g.n_kv_heads, g.padded_head_dim));
        let pointer = |w: &Option<GpuWeight>| w.as_ref().map_or(DevicePtr(0), |w| w.ptr);
        let bias = pointer(&layer.qkv_bias);
        let (k_cache, v_cache) = self.layer_cache(index);
        let (inv_freq, scale) = (self.inv_freq.ptr(), self.rope_scale);
        if t <= GEMV_ROWS && layer.q_norm.is_none() {
            let (w, k) = (layer.qkv.ptr, g.hidden);
            let args = args![
                w,
                h.ptr,
                bias,
                inv_freq,
                scale,
                s.positions,
                s.slots,
                q.ptr,
                k_cache,
                v_cache,
                t,
                nq,
                nkv,
                d,
                k,
                k
            ];
            let launch = self.kernels.gemv_launch(g.qkv_width() / 16, k);
            return self.launch(self.kernels.gemv_qkv_rope, &launch, &args);
        }
        let eps = g.head_norm_eps(self.rms_norm_eps);
        let (q_norm, k_norm) = (pointer(&layer.q_norm), pointer(&layer.k_norm));
        let qkv = self.product;
        let args = args![
            qkv,
            bias,
            q_norm,
            k_norm,
            inv_freq,
            scale,
            eps,
            s.positions,
            s.slots,
            q.ptr,
            k_cache,
            v_cache,
            nq,
            nkv,
            d
        ];
        let warps = 4;
        let grid = (nq + 2 * nkv).div_ceil(warps);
        let launch = Launch {
            grid: [grid as u32, t as u32, 1],
            block: [32 * warps as u32, 1, 1],
            shared: 0,
        };
        self.product(h.ptr, &layer.qkv, qkv, t, Out::Bf16)?;
        self.launch(self.kernels.qkv_rope, &launch, &args)
    }

    fn attention(&mut self, index: usize, q: &GpuBuf, attn: &mut GpuBuf) -> Result<()> {
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
            let rows = s.longest * nq / nkv;
            let shared = (PREFILL_SHARED_PER_ELEMENT * (g.padded_head_dim + 8)) as u32;
            let launch = Launch {
                grid: grid(rows.div_ceil(128), nkv, s.n_seqs),
                block: [256, 1, 1],
                shared,
            };
            let args = args![
                q.ptr, k_cache, v_cache, tables, seqs, attn.ptr, nq, nkv, one_block, scale
            ];
            return self.launch(self.kernels.attention_prefill, &launch, &args);
        }
        let splits = s.splits;
        let (part, part_ml) = (self.arena.get("part"), self.arena.get("part_ml"));
        let groups = nkv * (nq / nkv).div_ceil(8);
        let launch = Launch {
            grid: grid(splits, groups, s.n_seqs),
            block: [128, 1, 1],
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
            block: [128, 1, 1],
            shared: 0,
        };
        let args = args![part, part_ml, seqs, attn.ptr, nq, splits];
        self.launch(self.kernels.attention_combine, &launch, &args)
    }

    fn keep_wanted(&mut self, attn: &mut GpuBuf, x: &mut GpuBuf) -> Result<()> {
        let s = self.step;
        if s.n_wanted < s.n_tokens && s.n_wanted > 0 {
            // An f32 is moved as two bf16.
            for (buf, width) in [(attn, self.g.q_width()), (x, 2 * self.g.hidden)] {
                if width == 0 {
                    continue;
                }
                let args = args![buf.ptr, s.rows, self.wanted, width];
                let launch = Kernels::elements(width, s.n_wanted);
                self.launch(self.kernels.gather_rows, &launch, &args)?;
                let bytes = s.n_wanted * width * 2;
                // SAFETY: both buffers are in the arena and have at least as many rows.
                unsafe { self.driver.copy(buf.ptr, self.wanted, bytes, self.stream) }?;
            }
        }
        self.rows = s.n_wanted;
        Ok(())
    }

    fn matmul(&mut self, x: &GpuBuf, weight: &GpuWeight, y: &mut GpuBuf) -> Result<()> {
        self.product(x.ptr, weight, y.ptr, self.rows, Out::Bf16)
    }

    fn gate_up_silu(&mut self, h: &GpuBuf, gate_up: &GpuWeight, mlp: &mut GpuBuf) -> Result<()> {
        let (t, inter) = (self.rows, self.g.padded_inter);
        if inter == 0 {
            return Ok(());
        }
        if t <= GEMV_ROWS {
            let k = self.g.hidden;
            let args = args![gate_up.ptr, h.ptr, mlp.ptr, t, inter, k, k, inter];
            let launch = self.kernels.gemv_launch(inter.div_ceil(8), k);
            return self.launch(self.kernels.gemv_gate_up_silu, &launch, &args);
        }
        self.product(h.ptr, gate_up, self.product, t, Out::Bf16)?;
        let args = args![self.product, mlp.ptr, inter];
        self.launch(self.kernels.silu_mul, &Kernels::elements(inter, t), &args)
    }

    fn logits(&mut self, h: &GpuBuf, head: &GpuWeight, _: &mut GpuBuf) -> Result<()> {
        self.product(h.ptr, head, self.logits_local, self.rows, Out::F32)?;
        // Nothing of a forward pass comes after the logits.
        self.graphs.end()
    }

    fn most_likely(&mut self, _: &GpuBuf, n_known: usize) -> Result<Option<Vec<Choice>>> {
        let s = self.step.n_wanted;
        let (parts, known) = self.parts_of_ranks(n_known);
        let counts: Vec<usize> = parts.iter().map(|n| 3 * s * n).collect();
        let all: usize = counts.iter().sum();
        if all == 0 {
            return Ok(Some(Vec::new()));
        }
        let mut at = self.arena.get("choices_local");
        let mine = parts[self.g.tp_rank];
        if mine > 0 {
            let rows = at.offset(4 * s * mine);
            let sums = at.offset(8 * s * mine);
            let ld = self.g.vocab_local();
            let args = args![self.logits_local, known, ld, at, rows, sums];
            let launch = Launch {
                grid: [mine as u32, s as u32, 1],
                block: [256, 1, 1],
                shared: 0,
            };
            let kernel = self.kernels.sample_partial;
            self.kernels.run(kernel, &launch, &args, self.stream)?;
        }
        if self.g.vocab.len() > 1 {
            let gathered = self.arena.get("choices");
            // SAFETY: the arena outlives the stream's work.
            unsafe { self.comm.all_gather(at, &counts, gathered, self.stream) }?;
            at = gathered;
        }
        let offset = self.arena.offset(at);
        let memory = self.arena.memory();
        self.logits_host
            .download(0..4 * all, memory, offset, self.stream)?;
        self.comm.synchronize(self.stream)?;
        let words = bytemuck::cast_slice(&self.logits_host.as_slice()[..4 * all]);
        Ok(Some(choose(words, &parts, &self.g.vocab, s)))
    }

    fn read_logits<'a>(&'a mut self, logits: &'a GpuBuf) -> Result<&'a [f32]> {
        let (s, vocab) = (self.step.n_wanted, logits.cols);
        let bytes = s * vocab * 4;
        if self.g.vocab.len() > 1 && s > 0 {
            let counts: Vec<usize> = self.g.vocab.iter().map(|rows| rows * s).collect();
            let (local, all) = (self.logits_local, logits.ptr);
            // SAFETY: the arena outlives the stream's work.
            unsafe { self.comm.all_gather(local, &counts, all, self.stream) }?;
        }
        self.logits_host.download(
            0..bytes,
            self.arena.memory(),
            self.arena.offset(logits.ptr),
            self.stream,
        )?;
        self.comm.synchronize(self.stream)?;
        let gathered: &[f32] = bytemuck::cast_slice(&self.logits_host.as_slice()[..bytes]);
        if self.g.vocab.len() == 1 {
            return Ok(gathered);
        }
        // Gathered by rank, wanted by row.
        let (mut from, mut column) = (0, 0);
        for &rows in &self.g.vocab {
            for i in 0..s {
                self.logits[i * vocab + column..][..rows]
                    .copy_from_slice(&gathered[from..from + rows]);
                from += rows;
            }
            column += rows;
        }
        Ok(&self.logits[..s * vocab])
    }
}

/// Joins what `sample.cu` found in the parts of every row, on every rank: per rank maxima, ids within the rank's rows, and
/// sums of exp(logit - maximum), each `[n_rows, parts]`.
fn choose(words: &[u32], parts: &[usize], vocab: &[usize], n_rows: usize) -> Vec<Choice> {
    let row = |row: usize| {
        let mut best = (f32::NEG_INFINITY, 0u32);
        let mut all: Vec<(f32, f32)> = Vec::new();
        let (mut begin, mut first_id) = (0, 0u32);
        for (&n, &rows) in parts.iter().zip(vocab) {
            for part in 0..n {
                let word = |array: usize| words[begin + (array * n_rows + row) * n + part];
                let (max, id, sum) = (f32::from_bits(word(0)), word(1), f32::from_bits(word(2)));
                // Ranks and parts come in no order of ids, so ties are settled here: the lowest id.
                if max > best.0 || (max == best.0 && first_id.wrapping_add(id) < best.1) {
                    best = (max, first_id.wrapping_add(id));
                }
                all.push((max, sum));
            }
            begin += 3 * n_rows * n;
            first_id += rows as u32;
        }
        let term = |&(max, sum): &(f32, f32)| f64::from(sum) * f64::from(max - best.0).exp();
        let sum: f64 = all.iter().filter(|p| p.1 > 0.0).map(term).sum();
        Choice {
            token: best.1,
            logit: best.0,
            log_sum_exp: f64::from(best.0) + sum.ln(),
        }
    };
    (0..n_rows).map(row).collect()
}

impl Drop for GpuBackend {
    fn drop(&mut self) {
        // A collective that waits for a rank that is gone would never end by itself.
        self.comm.abandon();
        // Nothing may be running in memory that is about to be returned; an error was reported when it happened.
        if let Err(e) = self.driver.synchronize_device() {
            tracing::debug!("{e}");
        }
    }
}
