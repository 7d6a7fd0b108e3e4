//! The forward pass on a GPU: every operation of [`Backend`] as launches on one stream.

use super::arena::Arena;
use super::attention::upload_inv_freq;
use super::collective::{DeviceCollective, FusedNorm};
use super::driver::{Arg, DevicePtr, Driver, Function, Launch, Pinned, Stream, args};
use super::gemm::Gemm;
use super::graphs::{Graphs, MAX_SEQS};
use super::launch::Kernels;
use super::load::GpuWeight;
use super::memory::{DeviceBuffer, OwnedEvent, PinnedBuffer};
use super::offload::Offload;
use super::products::{Form, Target};
use super::rank::Parts;
use super::sampling::Fetching;
use super::step::Step;
use crate::Result;
use crate::config::ModelConfig;
use crate::layout::{Geometry, Limits, StepBuffers, batch_words, kv_bytes, max_splits};
use crate::model::{Activations, Backend, Batch, Choice, Fetch, Layer};
use std::sync::Arc;

/// A step buffer: rows of `cols` elements in the arena.
#[derive(Debug)]
pub struct GpuBuf {
    pub(super) ptr: DevicePtr,
    pub(super) cols: usize,
}

impl GpuBuf {
    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A GPU rank.
pub struct GpuBackend {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) gemm: Box<dyn Gemm>,
    pub(super) comm: Box<dyn DeviceCollective>,
    pub(super) stream: Stream,
    pub(super) kernels: Kernels,
    pub(super) g: Geometry,
    pub(super) limits: Limits,
    pub(super) rms_norm_eps: f32,
    pub(super) rope_scale: f32,
    pub(super) inv_freq: DeviceBuffer,
    pub(super) arena: Arena,
    pub(super) cache: DeviceBuffer,
    /// Keeps the weights that [`GpuWeight`]s point to.
    _weights: DeviceBuffer,
    /// Weights that are not on the device.
    pub(super) offload: Option<Offload>,
    /// Whether any rank has such weights: all ranks step alike, or their sums would not meet.
    pub(super) steps_offload: bool,
    pub(super) product: DevicePtr,
    pub(super) wanted: DevicePtr,
    pub(super) logits_local: DevicePtr,
    pub(super) workspace: DevicePtr,
    pub(super) step: Step,
    /// Rows that the operations see: the step's tokens, and behind `keep_wanted` the wanted ones.
    pub(super) rows: usize,
    pub(super) graphs: Graphs,
    /// The step's description on its way to the device.
    pub(super) staging: PinnedBuffer,
    pub(super) sent: OwnedEvent,
    /// Behind all that the host waits for.
    pub(super) done: OwnedEvent,
    /// Only tokens below are chosen.
    pub(super) n_known: usize,
    /// Choices on their way to the host: those of one step while the next one runs.
    pub(super) fetching: [Fetching; 2],
    pub(super) turn: usize,
    pub(super) logits_host: PinnedBuffer,
    pub(super) logits: Vec<f32>,
}

fn activations(arena: &Arena, g: &Geometry, vocab_size: usize) -> Activations<GpuBuf> {
    let at = |name: &str, cols: usize| GpuBuf {
        ptr: arena.get(name),
        cols,
    };
    Activations {
        x: at("x", g.hidden),
        h: at("h", g.hidden),
        q: at("q", g.q_width()),
        attn: at("attn", g.q_width()),
        mlp: at("mlp", g.padded_inter),
        partial: at("partial", g.hidden),
        logits: at("logits", vocab_size),
    }
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
        offload: Option<Offload>,
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
        let activations = activations(&arena, &g, config.vocab_size);
        let cache = DeviceBuffer::new(&driver, kv_bytes(&g, limits.n_kv_blocks), "KV cache")?;
        let (inv_freq, rope_scale) = config.rope.inv_freq(g.head_dim);
        let n_logits = limits.max_logit_rows * config.vocab_size;
        let alone = g.vocab.len() == 1;
        let pinned = |bytes, what| PinnedBuffer::new(&driver, bytes, Pinned::Cached, what);
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
            step: Step::none(arena.get("batch")),
            rows: 0,
            graphs: Graphs::new(&driver, stream),
            staging: pinned(batch_words(&limits) * 4, "step staging")?,
            sent: OwnedEvent::new(&driver, false)?,
            done: OwnedEvent::new(&driver, false)?,
            n_known: config.vocab_size,
            fetching: [
                Fetching::new(&driver, &limits)?,
                Fetching::new(&driver, &limits)?,
            ],
            turn: 0,
            logits_host: pinned(n_logits * 4, "logits on the host")?,
            logits: vec![0.0; if alone { 0 } else { n_logits }],
            _weights: weights,
            steps_offload: offload.is_some(),
            offload,
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

    /// Whether there is nothing to enqueue: a graph that holds it has been launched, or no rows are left.
    pub(super) fn idle(&self) -> bool {
        self.rows == 0 || self.graphs.has_launched()
    }

    /// Launches a kernel, unless there is nothing to do.
    pub(super) fn launch(&self, kernel: Function, launch: &Launch, args: &[Arg]) -> Result<()> {
        if self.idle() {
            return Ok(());
        }
        self.kernels.run(kernel, launch, args, self.stream)
    }

    /// Waits until everything enqueued is done; a rank that is lost meanwhile ends the wait.
    pub(super) fn synchronize(&mut self) -> Result<()> {
        self.done.record(self.stream)?;
        let done = wait_for(&self.done, &mut *self.comm);
        self.offload.as_ref().map_or(Ok(()), Offload::check)?;
        done
    }

    /// How far one sequence's attention is cut up to fill the device.
    pub(super) fn max_splits(&self) -> usize {
        max_splits(&self.g, self.driver.properties().sm_count as usize)
    }

    /// The largest number of sequences that a decode step is filled up to. Rows that nobody reads cost a GPU nothing; cores
    /// that multiply what does not fit on it would compute them.
    pub(super) fn most_seqs(&self) -> usize {
        let Limits {
            max_step_tokens,
            max_logit_rows,
            ..
        } = self.limits;
        if self.steps_offload {
            return 0;
        }
        max_step_tokens.min(max_logit_rows).min(MAX_SEQS)
    }

    /// How many decode graphs have been recorded.
    pub fn recorded_graphs(&self) -> usize {
        self.graphs.recorded()
    }
}

/// Waits for an event; a rank that is lost meanwhile ends the wait.
pub(super) fn wait_for(event: &OwnedEvent, ranks: &mut dyn DeviceCollective) -> Result<()> {
    // Spinning costs a core and saves the wake-up, which is a good part of a decode step.
    while !event.is_complete()? {
        ranks.check()?;
        std::hint::spin_loop();
    }
    event.synchronize()?;
    ranks.check()
}

impl Backend for GpuBackend {
    type Weight = GpuWeight;
    type Buf = GpuBuf;

    fn set_known_tokens(&mut self, n: usize) {
        if n != self.n_known {
            self.n_known = n;
            self.graphs.clear();
        }
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.limits.check(batch)?;
        // The staging memory is free again when the last step's copy is done.
        self.sent.synchronize()?;
        let at = self.arena.get("batch");
        let (max_splits, most) = (self.max_splits(), self.most_seqs());
        let words = bytemuck::cast_slice_mut(self.staging.as_mut_slice());
        let (step, n) = Step::describe(batch, words, at, max_splits, most);
        self.step = step;
        self.rows = step.n_tokens;
        self.staging.upload(
            0..4 * n,
            self.arena.memory(),
            self.arena.offset(at),
            self.stream,
        )?;
        self.sent.record(self.stream)?;
        let recordable = self.offload.as_ref().is_none_or(Offload::can_record);
        let key = step.decode_key().filter(|_| recordable);
        if let Some(offload) = &mut self.offload {
            offload.begin(step.n_tokens, key.is_some())?;
        }
        self.graphs.begin(key)?;
        match &mut self.offload {
            Some(offload) if self.graphs.is_recording() => offload.begin_recording(),
            _ => Ok(()),
        }
    }

    fn embed(&mut self, table: &GpuWeight, partial: &mut GpuBuf, x: &mut GpuBuf) -> Result<()> {
        let (g, tokens) = (&self.g, self.step.tokens);
        let args = args![
            table.ptr,
            table.host_ptr,
            tokens,
            self.arena.get("chosen"),
            self.step.slots,
            self.arena.get("history"),
            partial.ptr,
            x.ptr,
            g.hidden,
            g.first_row,
            table.resident,
            g.vocab_local()
        ];
        self.launch(
            self.kernels.embed,
            &Launch::linear(self.step.n_tokens, 128),
            &args,
        )
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
        if self.comm.is_fused(self.rows)
            && unsafe { self.comm.all_reduce_add_norm(&fused, self.stream) }?
        {
            return Ok(());
        }
        let n = self.rows * partial.cols;
        // SAFETY: the arena outlives the stream's work.
        unsafe { self.comm.all_reduce(partial.ptr, n, self.stream) }?;
        let args = args![
            partial.ptr,
            x.ptr,
            weight.ptr,
            h.ptr,
            self.g.hidden,
            self.rms_norm_eps
        ];
        self.launch(
            self.kernels.add_rms_norm,
            &Launch::norm(self.rows, self.g.hidden),
            &args,
        )
    }

    fn qkv(
        &mut self,
        index: usize,
        layer: &Layer<GpuWeight>,
        h: &GpuBuf,
        q: &mut GpuBuf,
    ) -> Result<()> {
        self.project(index, layer, h, q)
    }

    fn attention(&mut self, index: usize, q: &GpuBuf, attn: &mut GpuBuf) -> Result<()> {
        self.attend(index, q, attn)
    }

    fn keep_wanted(&mut self, attn: &mut GpuBuf, x: &mut GpuBuf) -> Result<()> {
        let s = self.step;
        if s.n_rows < s.n_tokens && s.n_rows > 0 {
            // An f32 is moved as two bf16.
            for (buf, width) in [(attn, self.g.q_width()), (x, 2 * self.g.hidden)] {
                if width == 0 {
                    continue;
                }
                let args = args![buf.ptr, s.rows, self.wanted, width];
                let launch = Kernels::elements(width, s.n_rows);
                self.launch(self.kernels.gather_rows, &launch, &args)?;
                let bytes = s.n_rows * width * 2;
                // SAFETY: both buffers are in the arena and have at least as many rows.
                unsafe { self.driver.copy(buf.ptr, self.wanted, bytes, self.stream) }?;
            }
        }
        self.rows = s.n_rows;
        Ok(())
    }

    fn matmul(&mut self, x: &GpuBuf, weight: &GpuWeight, y: &mut GpuBuf) -> Result<()> {
        let to = Target {
            y: y.ptr,
            ld: y.cols,
            form: Form::Bf16,
        };
        self.product(x.ptr, weight, self.rows, to)
    }

    fn gate_up_silu(&mut self, h: &GpuBuf, gate_up: &GpuWeight, mlp: &mut GpuBuf) -> Result<()> {
        let to = Target {
            y: mlp.ptr,
            ld: mlp.cols,
            form: Form::Gated,
        };
        self.product(h.ptr, gate_up, self.rows, to)
    }

    fn logits(&mut self, h: &GpuBuf, head: &GpuWeight, _: &mut GpuBuf) -> Result<()> {
        let to = Target {
            y: self.logits_local,
            ld: self.g.vocab_local(),
            form: Form::F32,
        };
        self.product(h.ptr, head, self.rows, to)
    }

    fn choose(&mut self, _: &GpuBuf) -> Result<()> {
        self.arg_max()?;
        if let Some(offload) = &mut self.offload
            && self.graphs.is_recording()
        {
            offload.end_recording()?;
        }
        self.graphs.end()?;
        self.draw()
    }

    fn fetch_choices(&mut self) -> Result<Option<Fetch>> {
        self.start_fetch().map(Some)
    }

    fn choices(&mut self, fetch: Fetch) -> Result<Vec<Choice>> {
        self.end_fetch(fetch)
    }

    fn read_logits<'a>(&'a mut self, logits: &'a GpuBuf) -> Result<&'a [f32]> {
        self.gathered_logits(logits)
    }

    fn finish(&mut self) -> Result<()> {
        self.synchronize()?;
        self.driver.synchronize_device()?;
        self.graphs.clear();
        self.comm.finish()
    }
}

impl Drop for GpuBackend {
    fn drop(&mut self) {
        self.graphs.clear();
        // Without [`Backend::finish`] something has failed, here or elsewhere: a collective that waits for a rank that is
        // gone would never end by itself.
        self.comm.abandon();
        // Nothing may be running in memory that is about to be returned; an error was reported when it happened.
        if let Err(e) = self.driver.synchronize_device() {
            tracing::debug!("{e}");
        }
    }
}
