//! The forward pass on the host: every operation of [`Backend`] over the kernels of this module.

use super::{AttentionShape, Kernels, Matrix, Pool, QkvShape, Rope, SeqView};
use crate::Result;
use crate::comm::HostCollective;
use crate::config::ModelConfig;
use crate::layout::{KV_BLOCK, Limits, Shard};
use crate::model::{Activations, Backend, Batch, BatchSeq, Layer};
use crate::weights::{Arena, Dtype, LocalMatrix, Slab};

/// A weight matrix or vector in host memory.
#[derive(Debug)]
pub struct HostWeight {
    data: Slab,
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl HostWeight {
    /// Room in `arena` for `matrix`, not yet filled.
    ///
    /// # Errors
    /// The arena is too small.
    pub fn new(arena: &mut Arena, matrix: &LocalMatrix) -> Result<Self> {
        let data = arena.take(matrix.bytes())?;
        Ok(HostWeight {
            data,
            dtype: matrix.dtype,
            rows: matrix.rows,
            cols: matrix.cols,
        })
    }

    /// Where the elements go.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix {
            data: &self.data,
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
        }
    }

    /// Norms and biases are kept in f32.
    fn vector(&self) -> &[f32] {
        self.data.as_f32()
    }
}

/// A step buffer in host memory: rows of `cols` f32, as many as the plan's longest step has.
#[derive(Debug)]
pub struct HostBuf {
    data: Vec<f32>,
    cols: usize,
}

impl HostBuf {
    /// A buffer of `rows` × `cols`.
    pub fn new(rows: usize, cols: usize) -> Self {
        HostBuf {
            data: vec![0.0; rows * cols],
            cols,
        }
    }

    fn rows(&self, n: usize) -> &[f32] {
        &self.data[..n * self.cols]
    }

    fn rows_mut(&mut self, n: usize) -> &mut [f32] {
        &mut self.data[..n * self.cols]
    }
}

/// One layer's cache, `[n_blocks][n_kv_heads_local][KV_BLOCK][head_dim]` each.
struct KvLayer {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// A CPU rank.
pub struct CpuBackend {
    pool: Pool,
    kernels: Kernels,
    comm: Box<dyn HostCollective>,
    heads: AttentionShape,
    rms_norm_eps: f32,
    vocab: Vec<usize>,
    first_row: u32,
    rope: Rope,
    cache: Vec<KvLayer>,
    qkv: HostBuf,
    logits_local: HostBuf,
    batch: Batch,
    /// Rows that the operations work on: the step's tokens, then the wanted ones.
    n_rows: usize,
    slots: Vec<u32>,
    limits: Limits,
}

impl CpuBackend {
    /// A backend for one rank's `shard`, with everything allocated that its steps will use.
    pub fn new(
        config: &ModelConfig,
        shard: &Shard,
        limits: Limits,
        pool: Pool,
        comm: Box<dyn HostCollective>,
    ) -> (Self, Activations<HostBuf>) {
        let (t, s, d) = (
            limits.max_step_tokens,
            limits.max_logit_rows,
            config.head_dim,
        );
        let (nq, nkv) = (shard.n_heads_local(), shard.n_kv_heads_local());
        let (inv_freq, factor) = config.rope.inv_freq(d);
        let cache_len = limits.n_kv_blocks * nkv * KV_BLOCK * d;
        let layer = || KvLayer {
            k: vec![0.0; cache_len],
            v: vec![0.0; cache_len],
        };
        let part = |r| Shard::new(config, shard.tp_size, r).vocab.len();
        let backend = CpuBackend {
            kernels: Kernels::new(&pool),
            pool,
            comm,
            heads: AttentionShape {
                n_heads: nq,
                n_kv_heads: nkv,
                head_dim: d,
                scale: (d as f32).sqrt().recip(),
            },
            rms_norm_eps: config.rms_norm_eps,
            vocab: (0..shard.tp_size).map(part).collect(),
            first_row: shard.vocab.start as u32,
            rope: Rope::new(&inv_freq, factor),
            cache: (0..config.n_layers).map(|_| layer()).collect(),
            qkv: HostBuf::new(t, (nq + 2 * nkv) * d),
            logits_local: HostBuf::new(s, shard.vocab.len()),
            batch: Batch::default(),
            n_rows: 0,
            slots: Vec::with_capacity(t),
            limits,
        };
        let hidden = || HostBuf::new(t, config.hidden_size);
        let activations = Activations {
            x: hidden(),
            h: hidden(),
            q: HostBuf::new(t, nq * d),
            attn: HostBuf::new(t, nq * d),
            mlp: HostBuf::new(t, shard.intermediate.len()),
            partial: hidden(),
            logits: HostBuf::new(s, config.vocab_size),
        };
        (backend, activations)
    }
}

impl Backend for CpuBackend {
    type Weight = HostWeight;
    type Buf = HostBuf;

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.limits.check(batch)?;
        self.batch.clone_from(batch);
        self.n_rows = batch.tokens.len();
        self.slots.clear();
        for seq in &batch.seqs {
            let first = seq.context_len - seq.len;
            let slot =
                |p: usize| seq.blocks[p / KV_BLOCK] * KV_BLOCK as u32 + (p % KV_BLOCK) as u32;
            self.slots.extend((first..seq.context_len).map(slot));
        }
        Ok(())
    }

    fn embed(&mut self, table: &HostWeight, partial: &mut HostBuf, x: &mut HostBuf) -> Result<()> {
        let t = self.n_rows;
        super::embed(
            &self.pool,
            table.matrix(),
            self.first_row,
            &self.batch.tokens,
            partial.rows_mut(t),
        );
        x.rows_mut(t).fill(0.0);
        Ok(())
    }

    fn all_reduce_add_norm(
        &mut self,
        partial: &mut HostBuf,
        x: &mut HostBuf,
        weight: &HostWeight,
        h: &mut HostBuf,
    ) -> Result<()> {
        let t = self.n_rows;
        if t > 0 {
            self.comm.all_reduce(partial.rows_mut(t))?;
        }
        super::add_rms_norm(
            &self.pool,
            partial.rows(t),
            x.rows_mut(t),
            weight.vector(),
            self.rms_norm_eps,
            h.rows_mut(t),
        );
        Ok(())
    }

    fn qkv(
        &mut self,
        index: usize,
        layer: &Layer<HostWeight>,
        h: &HostBuf,
        q: &mut HostBuf,
    ) -> Result<()> {
        let t = self.n_rows;
        let bias = layer.qkv_bias.as_ref().map(HostWeight::vector);
        let qkv = self.qkv.rows_mut(t);
        self.kernels
            .matmul(&self.pool, h.rows(t), t, layer.qkv.matrix(), bias, qkv);
        let cache = &mut self.cache[index];
        let shape = QkvShape {
            n_heads: self.heads.n_heads,
            n_kv_heads: self.heads.n_kv_heads,
            head_dim: self.heads.head_dim,
            q_norm: layer.q_norm.as_ref().map(HostWeight::vector),
            k_norm: layer.k_norm.as_ref().map(HostWeight::vector),
            eps: self.rms_norm_eps,
        };
        super::qkv_epilogue(
            &self.pool,
            shape,
            self.qkv.rows(t),
            &mut self.rope,
            &self.batch.positions,
            &self.slots,
            q.rows_mut(t),
            &mut cache.k,
            &mut cache.v,
        );
        Ok(())
    }

    fn attention(&mut self, index: usize, q: &HostBuf, attn: &mut HostBuf) -> Result<()> {
        let t = self.n_rows;
        let view = |s| {
            let &BatchSeq {
                start,
                len,
                context_len,
                ref blocks,
            } = s;
            SeqView {
                q_start: start,
                q_len: len,
                context_len,
                block_table: blocks,
            }
        };
        let seqs: Vec<SeqView> = self.batch.seqs.iter().map(view).collect();
        let cache = &self.cache[index];
        self.kernels.attention(
            &self.pool,
            self.heads,
            q.rows(t),
            &cache.k,
            &cache.v,
            &seqs,
            attn.rows_mut(t),
        );
        Ok(())
    }

    fn keep_wanted(&mut self, attn: &mut HostBuf, x: &mut HostBuf) -> Result<()> {
        for buf in [attn, x] {
            for (to, &from) in self.batch.logit_rows.iter().enumerate() {
                let from = from as usize * buf.cols;
                buf.data.copy_within(from..from + buf.cols, to * buf.cols);
            }
        }
        self.n_rows = self.batch.logit_rows.len();
        Ok(())
    }

    fn matmul(&mut self, x: &HostBuf, weight: &HostWeight, y: &mut HostBuf) -> Result<()> {
        let t = self.n_rows;
        self.kernels.matmul(
            &self.pool,
            x.rows(t),
            t,
            weight.matrix(),
            None,
            y.rows_mut(t),
        );
        Ok(())
    }

    fn gate_up_silu(&mut self, h: &HostBuf, gate_up: &HostWeight, mlp: &mut HostBuf) -> Result<()> {
        let t = self.n_rows;
        self.kernels
            .gate_up_silu(&self.pool, h.rows(t), t, gate_up.matrix(), mlp.rows_mut(t));
        Ok(())
    }

    fn logits(&mut self, h: &HostBuf, head: &HostWeight, logits: &mut HostBuf) -> Result<()> {
        let s = self.n_rows;
        let local = self.logits_local.rows_mut(s);
        self.kernels
            .matmul(&self.pool, h.rows(s), s, head.matrix(), None, local);
        let (vocab, local) = (logits.cols, self.logits_local.cols);
        for i in 0..s {
            let row = &mut logits.data[i * vocab..(i + 1) * vocab];
            self.comm.all_gather(
                &self.logits_local.data[i * local..(i + 1) * local],
                &self.vocab,
                row,
            )?;
        }
        Ok(())
    }

    fn read_logits<'a>(&'a mut self, logits: &'a HostBuf) -> Result<&'a [f32]> {
        Ok(logits.rows(self.batch.logit_rows.len()))
    }
}
