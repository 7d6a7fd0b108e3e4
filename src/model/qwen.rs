//! Qwen2, Qwen2.5 and Qwen3 dense: the weights, and the one forward pass that every backend runs.

use super::{Activations, Backend, Batch};
use crate::Result;
use crate::config::ModelConfig;

/// One decoder layer; the local shapes are those of `layout::shard`.
#[derive(Debug)]
pub struct Layer<W> {
    /// `[hidden]`
    pub input_norm: W,
    /// `[(n_heads_local + 2 · n_kv_heads_local) · head_dim, hidden]`: q, k, v.
    pub qkv: W,
    /// The same rows' biases (Qwen2).
    pub qkv_bias: Option<W>,
    /// `[head_dim]` (Qwen3).
    pub q_norm: Option<W>,
    /// `[head_dim]` (Qwen3).
    pub k_norm: Option<W>,
    /// `[hidden, n_heads_local · head_dim]`
    pub o: W,
    /// `[hidden]`
    pub post_norm: W,
    /// `[2 · intermediate_local, hidden]`: gate, then up.
    pub gate_up: W,
    /// `[hidden, intermediate_local]`
    pub down: W,
}

/// All the weights of one rank.
#[derive(Debug)]
pub struct Qwen<W> {
    /// `[vocab_local, hidden]`
    pub embed: W,
    /// The decoder.
    pub layers: Vec<Layer<W>>,
    /// `[hidden]`
    pub norm: W,
    /// `[vocab_local, hidden]`; `None` where the embedding serves (tied).
    pub head: Option<W>,
}

impl<W> Qwen<W> {
    /// Takes every weight by its local name (`layers.0.qkv`).
    ///
    /// # Errors
    /// Those of `take`.
    pub fn assemble(config: &ModelConfig, mut take: impl FnMut(&str) -> Result<W>) -> Result<Self> {
        let mut layers = Vec::with_capacity(config.n_layers);
        for i in 0..config.n_layers {
            let mut take = |name: &str| take(&format!("layers.{i}.{name}"));
            layers.push(Layer {
                input_norm: take("input_norm")?,
                qkv: take("qkv")?,
                qkv_bias: config.qkv_bias.then(|| take("qkv_bias")).transpose()?,
                q_norm: config.qk_norm.then(|| take("q_norm")).transpose()?,
                k_norm: config.qk_norm.then(|| take("k_norm")).transpose()?,
                o: take("o")?,
                post_norm: take("post_norm")?,
                gate_up: take("gate_up")?,
                down: take("down")?,
            });
        }
        Ok(Qwen {
            embed: take("embed")?,
            layers,
            norm: take("norm")?,
            head: (!config.tie_word_embeddings)
                .then(|| take("head"))
                .transpose()?,
        })
    }
}

/// One step of the model on this rank: the logits of the wanted rows end in `a.logits`, k and v in the cache, and, where the
/// backend chooses, the most likely tokens where the next step finds them.
///
/// T = tokens of the step, S = wanted rows, d = head_dim; `_local` is this rank's share.
///
/// # Errors
/// Those of the backend's operations.
pub fn forward<B: Backend>(
    b: &mut B,
    model: &Qwen<B::Weight>,
    a: &mut Activations<B::Buf>,
    batch: &Batch,
) -> Result<()> {
    b.begin(batch)?;
    let first = model.layers.first().map_or(&model.norm, |l| &l.input_norm);
    b.embed(&model.embed, &mut a.partial, &mut a.x)?; //          partial [T, hidden], one rank's are not zeros; x = 0
    b.all_reduce_add_norm(&mut a.partial, &mut a.x, first, &mut a.h)?;

    for (i, layer) in model.layers.iter().enumerate() {
        b.qkv(i, layer, &a.h, &mut a.q)?; //                      q       [T, n_heads_local · d]; k, v → cache
        b.attention(i, &a.q, &mut a.attn)?; //                    attn    [T, n_heads_local · d]
        if i + 1 == model.layers.len() {
            b.keep_wanted(&mut a.attn, &mut a.x)?; //             from here on T = S: nobody reads the other rows
        }
        b.matmul(&a.attn, &layer.o, &mut a.partial)?; //          partial [T, hidden], a share of the sum
        b.all_reduce_add_norm(&mut a.partial, &mut a.x, &layer.post_norm, &mut a.h)?;

        b.gate_up_silu(&a.h, &layer.gate_up, &mut a.mlp)?; //     mlp     [T, intermediate_local]
        b.matmul(&a.mlp, &layer.down, &mut a.partial)?; //        partial [T, hidden], a share of the sum
        let next = model
            .layers
            .get(i + 1)
            .map_or(&model.norm, |l| &l.input_norm);
        b.all_reduce_add_norm(&mut a.partial, &mut a.x, next, &mut a.h)?;
    }

    let head = model.head.as_ref().unwrap_or(&model.embed);
    b.logits(&a.h, head, &mut a.logits)?; //                      logits  [S, vocab]
    b.choose(&a.logits) //                                        a token of each row
}
