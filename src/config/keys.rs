//! Keys of `config.json` that the forward pass does not read: which of them can be left aside, and which show that the
//! model computes something else.
//!
//! transformers passes over every key that its code for the architecture does not read; so an unknown key is no reason to
//! refuse a model, unless its name speaks of the arithmetic: then the file may well belong to an architecture of its own.

use super::{Family, generation};
use crate::{Error, Result};
use serde_json::Value;

/// Keys that describe the file, training or Python's own behaviour, of transformers 4 and 5.
const HARMLESS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_window_layers",
    "model_name",
    "model_max_length",
    "name_or_path",
    "num_labels",
    "output_hidden_states",
    "output_past",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "seq_length",
    "sep_token_id",
    "sliding_window",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_return_dict",
];

/// Words of names that speak of training or of tools, whatever else they say: `max_grad_norm`, `attn_pdrop`.
const OF_TRAINING: &[&str] = &[
    "aux",
    "checkpointing",
    "classifier",
    "dataset",
    "drop",
    "dropout",
    "eval",
    "finetuning",
    "flash",
    "grad",
    "gradient",
    "impl",
    "implementation",
    "initializer",
    "learning",
    "loss",
    "lr",
    "neftune",
    "optim",
    "optimizer",
    "pdrop",
    "std",
    "summary",
    "tokenizer",
    "train",
    "trainer",
    "training",
    "unsloth",
    "version",
    "wandb",
];

/// Words of names that speak of the forward pass, in the configurations of other architectures.
#[rustfmt::skip]
const OF_ARITHMETIC: &[&str] = &[
    "act", "activation", "adapter", "alibi", "attention", "attn", "audio", "bias", "bidirectional", "bit", "bits", "block",
    "cap", "capping", "causal", "clip", "compression", "conv", "decoder", "dense", "depth", "dim", "embed",
    "embedding", "embeddings", "encoder", "eps", "epsilon", "expert", "experts", "factor", "feed", "ffn", "fp8", "fusion", "gate",
    "gating", "generator", "geglu", "glu", "head", "heads", "hidden", "image", "int4", "int8", "intermediate",
    "kv", "latent", "layer", "layernorm", "layers", "linear", "logit", "logits", "mamba", "mask", "mla", "mlp",
    "moe", "mrope", "mtp", "multiplier", "norm", "ntk", "partial", "per", "position", "positional", "positions", "qk",
    "qkv", "quant", "quantization", "quantize", "quantized", "recurrent", "residual", "rmsnorm", "rope", "rotary", "routed",
    "router", "scale", "scaling", "shared", "sink", "sinks", "sliding", "softcap", "softcapping", "softmax", "sparse", "sparsity", "ssm",
    "swa", "swiglu", "text", "theta", "tie", "tied", "video", "vision", "weights", "window", "yarn",
];

/// Whether a key is off at this value, although it would change the arithmetic at another one.
fn is_neutral(key: &str, value: &Value, family: Family) -> bool {
    match key {
        "mlp_bias" | "use_mrope" | "add_cross_attention" | "attn_output_gate" | "use_alibi" => {
            value == false
        }
        "is_causal" => value == true,
        // Qwen2 has these biases whatever is said, and o has none.
        "attention_bias" | "qkv_bias" => family == Family::Qwen2 || value == false,
        "qk_norm" | "use_qk_norm" => value == (family == Family::Qwen3),
        "logit_scale"
        | "logits_scaling"
        | "residual_multiplier"
        | "embedding_multiplier"
        | "partial_rotary_factor" => value.as_f64() == Some(1.0),
        "num_experts" | "num_local_experts" | "n_routed_experts" | "num_nextn_predict_layers" => {
            value.as_u64() == Some(0)
        }
        "transformers_weights" => value == "model.safetensors",
        // Nothing is listed, as in `pruned_heads` and `mlp_only_layers`.
        _ => {
            value.as_object().is_some_and(|map| map.is_empty())
                || value.as_array().is_some_and(|list| list.is_empty())
        }
    }
}

/// Names of the keys in `rest` that nobody knows and nothing speaks against.
///
/// # Errors
/// A key that could change the arithmetic, by name.
pub(super) fn unknown<'a>(
    rest: impl Iterator<Item = (&'a String, &'a Value)>,
    family: Family,
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (key, value) in rest {
        let quiet = value.is_null()
            || key.starts_with('_')
            || HARMLESS.contains(&key.as_str())
            || generation::is_key(key)
            || is_neutral(key, value, family);
        if quiet {
            continue;
        }
        if could_change_arithmetic(key) {
            return Err(refusal(key, value));
        }
        names.push(key.clone());
    }
    Ok(names)
}

/// Whether a name speaks of the forward pass.
fn could_change_arithmetic(key: &str) -> bool {
    let lower = key.to_lowercase();
    let words = || lower.split(|c: char| !c.is_ascii_alphanumeric());
    words().any(|w| OF_ARITHMETIC.contains(&w)) && !words().any(|w| OF_TRAINING.contains(&w))
}

pub(super) fn refusal(key: &str, value: &Value) -> Error {
    let mut shown = value.to_string();
    if shown.chars().count() > 40 {
        shown = shown.chars().take(40).chain("…".chars()).collect();
    }
    Error::failed(format!(
        "key \"{key}\" ({shown}) is not known and could change the model's arithmetic; remove it if it does not"
    ))
}
