//! What the model is: `config.json` and `generation_config.json`, validated, or a named shape.
//!
//! Both spellings are read: the older one (`rope_theta`, `rope_scaling`, `torch_dtype`) of the published Qwen
//! checkpoints and the newer one (`rope_parameters`, `dtype`). A key that could change the forward pass and is not
//! understood is refused by name: a wrong answer is worse than none. Keys that no forward pass reads are left aside.

mod fields;
mod generation;
mod keys;
mod rope;
mod shapes;

pub use generation::{GenerationConfig, Unapplied};
pub use rope::{Rope, Yarn};
pub use shapes::{SHAPES, named_shape};

use crate::weights::Dtype;
use crate::{Error, Result, logging};
use fields::Fields;
use serde::Serialize;
use serde_json::Value;
use std::path::Path;

/// The model families that tandem runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 dense: RMSNorm on every q and k head, no biases, its own `head_dim`.
    Qwen3,
}

/// A validated model configuration; every size is positive and consistent with the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    /// Which architecture.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding, padding included.
    pub vocab_size: usize,
    /// Longest sequence, prompt and answer together; with YaRN the stretched length.
    pub max_position_embeddings: usize,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v products have a bias.
    pub qkv_bias: bool,
    /// q and k heads are normalised (Qwen3).
    pub qk_norm: bool,
    /// Rotary embedding.
    pub rope: Rope,
    /// The element type that the config names; the checkpoint's headers have the last word.
    pub dtype: Dtype,
    /// Stop tokens named by `config.json`; they count where there is no `generation_config.json`
    /// ([`GenerationConfig::from_dir`]).
    pub eos_token_ids: Vec<u32>,
}

/// No published Qwen is near it; a larger value is a damaged file, and products of two stay far from overflow.
const MAX_SIZE: usize = 1 << 24;

/// Deeper than any model; every layer costs names and plans before its first byte.
const MAX_LAYERS: usize = 4096;

impl ModelConfig {
    /// Reads `DIR/config.json`.
    ///
    /// # Errors
    /// A missing or unreadable file, or what [`ModelConfig::from_json`] refuses, naming the file.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::file(
                dir,
                "no such model folder; --model takes a folder with config.json in it",
            ));
        }
        let path = dir.join("config.json");
        let text = fields::read_text(&path)?;
        let (config, unknown) = Self::parse(&text).map_err(|e| Error::file(&path, e))?;
        if !unknown.is_empty() {
            let path = path.display();
            logging::said_by_one(format_args!(
                "{path}: keys that neither tandem nor transformers reads are left aside: {}",
                unknown.join(", ")
            ));
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// Not JSON, another architecture, missing, absurd or contradictory values, keys that could change the arithmetic.
    pub fn from_json(text: &str) -> Result<Self> {
        Ok(Self::parse(text)?.0)
    }

    /// The configuration, and the names of keys that nobody reads.
    fn parse(text: &str) -> Result<(Self, Vec<String>)> {
        let mut f = Fields::parse(text)?;
        let family = family(&mut f)?;
        let mut size = |key: &str| f.size(key, MAX_SIZE);
        let (hidden_size, intermediate_size) = (size("hidden_size")?, size("intermediate_size")?);
        let (n_layers, n_heads) = (size("num_hidden_layers")?, size("num_attention_heads")?);
        let (vocab_size, max_position_embeddings) =
            (size("vocab_size")?, size("max_position_embeddings")?);
        let n_kv_heads = f
            .optional_size("num_key_value_heads", MAX_SIZE)?
            .unwrap_or(n_heads);
        let head_dim = head_dim(&mut f, family, hidden_size, n_heads)?;
        let rms_norm_eps = f.number("rms_norm_eps")?.unwrap_or(1e-6) as f32;
        let tie_word_embeddings = f.boolean("tie_word_embeddings")?.unwrap_or(false);
        let rope = Rope::take(&mut f, max_position_embeddings)?;
        // Qwen's instructions for long texts add YaRN and leave max_position_embeddings at the trained length.
        let max_position_embeddings = max_position_embeddings.max(rope.stretched_positions());
        let eos_token_ids = f.token_ids("eos_token_id")?;
        let dtype = dtype(&mut f)?;
        let config = ModelConfig {
            family,
            hidden_size,
            intermediate_size,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps,
            tie_word_embeddings,
            qkv_bias: family == Family::Qwen2,
            qk_norm: family == Family::Qwen3,
            rope,
            dtype,
            eos_token_ids,
        };
        refuse_unsupported(&mut f)?;
        refuse_windows(&mut f, &config)?;
        let unknown = keys::unknown(f.rest(), family)?;
        config.validate()?;
        Ok((config, unknown))
    }

    fn validate(&self) -> Result<()> {
        let c = self;
        let refuse = |what: String| Err(Error::failed(what));
        if !c.n_heads.is_multiple_of(c.n_kv_heads) {
            return refuse(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                c.n_heads, c.n_kv_heads
            ));
        }
        if !c.head_dim.is_multiple_of(2) || c.head_dim > 1024 {
            return refuse(format!(
                "head_dim {}: must be even (rotary halves) and at most 1024",
                c.head_dim
            ));
        }
        if !(c.rms_norm_eps > 0.0 && c.rms_norm_eps < 1.0) {
            return refuse(format!(
                "rms_norm_eps {}: must be between 0 and 1",
                c.rms_norm_eps
            ));
        }
        if let Some(id) = c
            .eos_token_ids
            .iter()
            .find(|&&id| id as usize >= c.vocab_size)
        {
            return refuse(format!(
                "eos_token_id {id} is outside the vocabulary of {}",
                c.vocab_size
            ));
        }
        if c.n_layers > MAX_LAYERS {
            return refuse(format!(
                "num_hidden_layers is {}; at most {MAX_LAYERS}",
                c.n_layers
            ));
        }
        // Generous beyond any real model, tight enough that later byte counts cannot overflow 64 bits.
        let params = c.parameters();
        if params > 1 << 44 {
            return refuse(format!(
                "the sizes make {params:.1e} parameters: a damaged file?"
            ));
        }
        Ok(())
    }

    /// Parameters of the model, embeddings and norms included.
    pub fn parameters(&self) -> u128 {
        let c = self;
        let (hidden, head_dim) = (c.hidden_size as u128, c.head_dim as u128);
        let (q, kv) = (
            c.n_heads as u128 * head_dim,
            c.n_kv_heads as u128 * head_dim,
        );
        let bias = if c.qkv_bias { q + 2 * kv } else { 0 };
        let qk_norm = if c.qk_norm { 2 * head_dim } else { 0 };
        let attention = hidden * (2 * q + 2 * kv) + bias + qk_norm;
        let mlp = 3 * hidden * c.intermediate_size as u128;
        let tables = if c.tie_word_embeddings { 1 } else { 2 } * c.vocab_size as u128 * hidden;
        tables + hidden + c.n_layers as u128 * (attention + mlp + 2 * hidden)
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

fn family(f: &mut Fields) -> Result<Family> {
    let supported = "tandem runs qwen2 (Qwen2, Qwen2.5) and qwen3 (dense)";
    match f.string("model_type")?.as_deref() {
        Some("qwen2") => Ok(Family::Qwen2),
        Some("qwen3") => Ok(Family::Qwen3),
        Some(other) => Err(Error::failed(format!(
            "model_type \"{other}\" is not supported: {supported}"
        ))),
        None => Err(Error::failed(format!("model_type is missing: {supported}"))),
    }
}

fn head_dim(f: &mut Fields, family: Family, hidden_size: usize, n_heads: usize) -> Result<usize> {
    if let Some(head_dim) = f.optional_size("head_dim", MAX_SIZE)? {
        return Ok(head_dim);
    }
    if family == Family::Qwen3 {
        // The architecture's default where the file is silent.
        return Ok(128);
    }
    if !hidden_size.is_multiple_of(n_heads) {
        return Err(Error::failed(format!(
            "hidden_size {hidden_size} is not a multiple of num_attention_heads {n_heads}, and no head_dim is given"
        )));
    }
    Ok(hidden_size / n_heads)
}

fn dtype(f: &mut Fields) -> Result<Dtype> {
    let old = f.string("torch_dtype")?;
    let new = f.string("dtype")?;
    match new.or(old).as_deref() {
        Some("bfloat16") | None => Ok(Dtype::Bf16),
        Some("float16") => Ok(Dtype::F16),
        Some("float32") => Ok(Dtype::F32),
        Some(other) => Err(Error::failed(format!(
            "dtype \"{other}\" is not supported: bfloat16, float16 or float32"
        ))),
    }
}

/// Keys that are fine at one value and change the arithmetic at any other.
fn refuse_unsupported(f: &mut Fields) -> Result<()> {
    match f.string("hidden_act")?.as_deref() {
        // Two names of one function.
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(Error::failed(format!(
                "hidden_act \"{other}\" is not supported: silu"
            )));
        }
    }
    if f.take("quantization_config").is_some() {
        return Err(Error::failed(
            "quantization_config: quantized checkpoints are not supported (bf16, f16 or f32)",
        ));
    }
    Ok(())
}

/// Layers that see only the last so many tokens; a window that is as long as any sequence, or of no layer, is none.
fn refuse_windows(f: &mut Fields, config: &ModelConfig) -> Result<()> {
    let in_use = f.boolean("use_sliding_window")?.unwrap_or(false);
    let types = f.take("layer_types");
    let is = |t: &Value, name: &str| t == name;
    let sliding = match &types {
        None => {
            // The architecture's default where the file is silent.
            let first = f.count("max_window_layers")?.unwrap_or(28);
            in_use && first < config.n_layers
        }
        Some(Value::Array(types)) if types.iter().all(|t| is(t, "full_attention")) => false,
        Some(Value::Array(types))
            if in_use
                && types
                    .iter()
                    .all(|t| is(t, "full_attention") || is(t, "sliding_attention")) =>
        {
            true
        }
        Some(_) => {
            return Err(Error::failed(
                "layer_types other than full_attention are not supported",
            ));
        }
    };
    let window = match sliding {
        true => f.count("sliding_window")?,
        false => None,
    };
    let longest = config.max_position_embeddings;
    match window {
        Some(window) if window < longest => Err(Error::failed(format!(
            "use_sliding_window = true with a sliding_window of {window} tokens is not supported (a sequence may have {longest})"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
