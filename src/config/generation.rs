//! The model's own sampling defaults: `generation_config.json`.

use super::fields::{Fields, read_text};
use crate::{Error, Result};
use serde::Serialize;
use std::path::Path;

/// What `generation_config.json` says; absent keys are `None`.
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
}

impl GenerationConfig {
    /// Reads `DIR/generation_config.json`; a folder without one has no defaults.
    ///
    /// # Errors
    /// A file that is there but unreadable, or values that no sampler could use.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("generation_config.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        Self::from_json(&read_text(&path)?).map_err(|e| Error::file(path, e))
    }

    /// Parses the text of a `generation_config.json`; keys that tandem does not use are left to those who do.
    ///
    /// # Errors
    /// Not JSON, or a value outside its range.
    pub fn from_json(text: &str) -> Result<Self> {
        let mut f = Fields::parse(text)?;
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
        let top_k = within("top_k", 0.0, 1e9)?.map(|k| k as usize);
        Ok(GenerationConfig {
            do_sample: f.boolean("do_sample")?,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            eos_token_ids: f.token_ids("eos_token_id")?,
        })
    }
}
