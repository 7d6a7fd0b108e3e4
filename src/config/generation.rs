//! The model's own defaults of sampling and stopping: `generation_config.json`, or what `config.json` has of it.

use super::fields::Fields;
use crate::{Error, Result, files};
use serde::Serialize;
use serde_json::Value;
use std::path::Path;

/// What `generation_config.json` says; absent keys are `None`, zero or empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GenerationConfig {
    /// Sample (true) or take the most likely token (false, the default where the file is silent).
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens with this probability.
    pub top_p: Option<f64>,
    /// Drop tokens less likely than this fraction of the most likely one.
    pub min_p: Option<f64>,
    /// Divide the logits of tokens already seen.
    pub repetition_penalty: Option<f64>,
    /// Tokens that end the answer.
    pub eos_token_ids: Vec<u32>,
    /// Longest answer.
    pub max_new_tokens: Option<usize>,
    /// Longest prompt and answer together; `max_new_tokens` goes before it.
    pub max_length: Option<usize>,
    /// No stop token before the answer has so many.
    pub min_new_tokens: usize,
    /// No stop token before prompt and answer have so many.
    pub min_length: usize,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// So many tokens in a row come once only; 0 is no such rule.
    pub no_repeat_ngram_size: usize,
    /// Rows of tokens that are never completed.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Further keys that would change what is chosen, with their values: whoever answers says so.
    pub unapplied: Vec<Unapplied>,
}

/// A key that transformers acts on and tandem does not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unapplied {
    /// Its name.
    pub key: &'static str,
    /// It acts on drawn tokens only.
    pub drawn_only: bool,
    /// The file that has it.
    pub file: &'static str,
}

const FILE: &str = "generation_config.json";

/// Of a key that is not applied: its name, whether a value changes nothing, and whether it acts on drawn tokens only.
type Rule = (&'static str, fn(&Value) -> bool, bool);

/// From transformers' `GenerationConfig` (5.24). Keys that only beams read are quiet: the beams themselves are not.
const UNAPPLIED: &[Rule] = &[
    ("constraints", is_empty, false),
    ("cache_implementation", |v| v != "quantized", false),
    ("dola_layers", is_empty, false),
    ("encoder_no_repeat_ngram_size", |v| at_most(v, 0.0), false),
    ("encoder_repetition_penalty", |v| is(v, 1.0), false),
    ("epsilon_cutoff", is_no_cutoff, true),
    ("eta_cutoff", is_no_cutoff, true),
    ("exponential_decay_length_penalty", is_empty, false),
    ("force_words_ids", is_empty, false),
    ("forced_bos_token_id", is_empty, false),
    ("forced_eos_token_id", is_empty, false),
    ("guidance_scale", |v| is(v, 1.0), false),
    ("is_assistant", |v| v == false, false),
    ("max_time", is_empty, false),
    ("num_beam_groups", |v| is(v, 1.0), false),
    ("num_beams", |v| is(v, 1.0), false),
    ("num_return_sequences", |v| is(v, 1.0), false),
    ("penalty_alpha", |v| at_most(v, 0.0), false),
    ("sequence_bias", is_empty, false),
    ("stop_strings", is_empty, false),
    ("token_healing", |v| v == false, false),
    ("top_h", |v| at_most(v, 0.0) || is(v, 1.0), true),
    ("typical_p", |v| v.as_f64().is_some_and(|x| x >= 1.0), true),
    ("watermarking_config", is_empty, false),
];

/// Keys that are applied.
const APPLIED: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
];

/// Keys of which no token depends.
const WITHOUT_EFFECT: &[&str] = &[
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "use_cache",
    "use_mtp",
];

/// Keys that transformers takes from a `generation_config.json` but not from a `config.json`.
const NOT_FROM_THE_MODEL: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "do_sample",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Whether a key of `config.json` speaks of how tokens are chosen and not of the model.
pub(super) fn is_key(key: &str) -> bool {
    APPLIED.contains(&key)
        || WITHOUT_EFFECT.contains(&key)
        || UNAPPLIED.iter().any(|rule| rule.0 == key)
}

fn is(value: &Value, number: f64) -> bool {
    value.as_f64() == Some(number)
}

fn at_most(value: &Value, number: f64) -> bool {
    value.as_f64().is_some_and(|x| x <= number)
}

fn is_no_cutoff(value: &Value) -> bool {
    value.as_f64().is_some_and(|x| x <= 0.0 || x >= 1.0)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

impl GenerationConfig {
    /// Reads `DIR/generation_config.json`, or where there is none what `DIR/config.json` says of stopping; a folder
    /// without either has no defaults.
    ///
    /// # Errors
    /// A file that is there but unreadable, or values that no sampler could use.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        if let Some(text) = files::read_text(&path)? {
            return Self::from_json(&text).map_err(|e| Error::file(path, e));
        }
        let path = dir.join("config.json");
        match files::read_text(&path)? {
            Some(text) => Self::from_model_config(&text).map_err(|e| Error::file(path, e)),
            None => Ok(Self::default()),
        }
    }

    /// Parses the text of a `generation_config.json`; a key that transformers does not know either is left aside.
    ///
    /// # Errors
    /// Not JSON, or a value outside its range.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::take(Fields::parse(text)?, FILE)
    }

    /// What the text of a `config.json` says of generation, as transformers makes a generation configuration of it: the
    /// stop tokens, above all. Its sampling keys, which old versions wrote there, are passed over.
    ///
    /// # Errors
    /// Not JSON, or a value outside its range.
    pub fn from_model_config(text: &str) -> Result<Self> {
        let mut f = Fields::parse(text)?;
        for key in NOT_FROM_THE_MODEL {
            f.take(key);
        }
        Self::take(f, "config.json")
    }

    fn take(mut f: Fields, file: &'static str) -> Result<Self> {
        let mut within = |key: &str, low: f64, high: f64| match f.number(key)? {
            Some(x) if !(low..=high).contains(&x) => Err(Error::failed(format!(
                "{key} is {x}; a number from {low} to {high} is needed"
            ))),
            x => Ok(x),
        };
        let temperature = within("temperature", 0.0, 1000.0)?;
        let top_p = within("top_p", 0.0, 1.0)?;
        let min_p = within("min_p", 0.0, 1.0)?;
        let repetition_penalty = within("repetition_penalty", 0.01, 100.0)?;
        let mut count = |key: &str| Ok(within(key, 0.0, 1e9)?.map(|k| k as usize));
        Ok(GenerationConfig {
            top_k: count("top_k")?,
            max_new_tokens: count("max_new_tokens")?.filter(|&n| n > 0),
            max_length: count("max_length")?.filter(|&n| n > 0),
            min_new_tokens: count("min_new_tokens")?.unwrap_or(0),
            min_length: count("min_length")?.unwrap_or(0),
            no_repeat_ngram_size: count("no_repeat_ngram_size")?.unwrap_or(0),
            do_sample: f.boolean("do_sample")?,
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            eos_token_ids: f.token_ids("eos_token_id")?,
            suppress_tokens: f.token_ids("suppress_tokens")?,
            begin_suppress_tokens: f.token_ids("begin_suppress_tokens")?,
            bad_words_ids: f.token_rows("bad_words_ids")?,
            unapplied: unapplied(&mut f, file),
        })
    }
}

/// The keys that are not applied and not at a value that changes nothing.
fn unapplied(f: &mut Fields, file: &'static str) -> Vec<Unapplied> {
    let acts = |(key, is_neutral, drawn_only): &Rule| {
        let value = f.take(key)?;
        let (key, drawn_only) = (*key, *drawn_only);
        (!is_neutral(&value)).then_some(Unapplied {
            key,
            drawn_only,
            file,
        })
    };
    UNAPPLIED.iter().filter_map(acts).collect()
}
