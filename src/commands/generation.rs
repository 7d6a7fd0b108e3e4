//! One answer as it grows: tokens to text, stop strings, times.

use crate::cli::SamplingArgs;
use crate::config::GenerationConfig;
use crate::engine::{Bans, Event, FinishReason, SamplingParams};
use crate::output::{Answer, Timings};
use crate::session::Report;
use crate::text::{StopMatcher, StreamDecoder, Tokenizer};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::time::Instant;

/// Longest answer where `--max-tokens` does not say, as far as the context allows.
pub const DEFAULT_MAX_TOKENS: usize = 1024;

/// The sampling of a run: what was typed, over the model's own defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// For the sampler.
    pub params: SamplingParams,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
    /// Longest answer by the model's own defaults, and longest prompt and answer together.
    longest: (Option<usize>, Option<usize>),
}

impl Sampling {
    /// Merges the command line over `generation_config.json`, and says which of its keys are not applied.
    ///
    /// # Errors
    /// A value outside its range, naming flag and value.
    pub fn new(args: &SamplingArgs, defaults: &GenerationConfig) -> Result<Self> {
        let within = |flag: &str, value: Option<f32>, low: f32, high: f32| match value {
            Some(x) if !(low..=high).contains(&x) => Err(Error::usage(format!(
                "--{flag} {x}: must be from {low} to {high}"
            ))),
            x => Ok(x),
        };
        let temperature = within("temperature", args.temperature, 0.0, 1000.0)?;
        let top_p = within("top-p", args.top_p, 0.0, 1.0)?;
        let min_p = within("min-p", args.min_p, 0.0, 1.0)?;
        let penalty = within("repetition-penalty", args.repetition_penalty, 0.01, 100.0)?;
        if args.max_tokens == Some(0) {
            return Err(Error::usage("--max-tokens 0: at least 1"));
        }
        let d = defaults;
        // A model that does not say `do_sample` answers greedily unless a temperature is typed.
        let default_temperature = match d.do_sample {
            Some(true) => d.temperature.unwrap_or(1.0) as f32,
            _ => 0.0,
        };
        // Smaller numbers have no reciprocal in single precision; of their draws all are the most likely token.
        let temperature = temperature.unwrap_or(default_temperature);
        let temperature = match temperature < f32::MIN_POSITIVE {
            true => 0.0,
            false => temperature,
        };
        let stop_tokens = match args.ignore_eos {
            true => Vec::new(),
            false => d.eos_token_ids.clone(),
        };
        warn_of_unapplied(d, temperature > 0.0);
        let params = SamplingParams {
            temperature,
            top_k: args.top_k.or(d.top_k).unwrap_or(0),
            top_p: top_p.or(d.top_p.map(|p| p as f32)).unwrap_or(1.0),
            min_p: min_p.or(d.min_p.map(|p| p as f32)).unwrap_or(0.0),
            repetition_penalty: penalty
                .or(d.repetition_penalty.map(|p| p as f32))
                .unwrap_or(1.0),
            seed: args.seed,
            stream: 0,
            bans: bans(d, &stop_tokens),
        };
        Ok(Sampling {
            params,
            stop_tokens,
            longest: (d.max_new_tokens, d.max_length),
        })
    }

    /// The longest answer to a prompt of `prompt` tokens where `--max-tokens` does not say: the model's own limit, and
    /// [`DEFAULT_MAX_TOKENS`] at most.
    pub fn default_max_tokens(&self, prompt: usize) -> usize {
        let own = match self.longest {
            (None, Some(together)) => together.checked_sub(prompt).filter(|&n| n > 0),
            (answer, _) => answer,
        };
        own.unwrap_or(DEFAULT_MAX_TOKENS).min(DEFAULT_MAX_TOKENS)
    }

    /// The parameters of the `index`-th of several prompts: each draws by itself, in whatever order they run.
    pub fn of_prompt(&self, index: usize) -> SamplingParams {
        SamplingParams {
            stream: index as u64,
            ..self.params.clone()
        }
    }
}

/// The tokens that the model's defaults rule out.
fn bans(d: &GenerationConfig, stop_tokens: &[u32]) -> Bans {
    // A stop token alone is no bad word.
    let not_a_stop = |row: &&Vec<u32>| !matches!(row[..], [t] if d.eos_token_ids.contains(&t));
    Bans {
        always: d.suppress_tokens.clone(),
        first: d.begin_suppress_tokens.clone(),
        ngram: d.no_repeat_ngram_size,
        rows: d.bad_words_ids.iter().filter(not_a_stop).cloned().collect(),
        stops: stop_tokens.to_vec(),
        least_answer: d.min_new_tokens,
        least_length: d.min_length,
        prompt_len: 0,
    }
}

/// One line about keys that would change the answer and are not applied.
fn warn_of_unapplied(d: &GenerationConfig, drawn: bool) {
    let acting: Vec<_> = d
        .unapplied
        .iter()
        .filter(|u| drawn || !u.drawn_only)
        .collect();
    if let Some(first) = acting.first() {
        let names: Vec<_> = acting.iter().map(|u| format!("\"{}\"", u.key)).collect();
        let (file, names) = (first.file, names.join(", "));
        tracing::warn!("{file}: not applied: {names}; answers may differ from transformers'");
    }
}

/// `--enable-thinking` as a variable of the chat template.
pub fn thinking(enable: Option<bool>) -> Vec<(&'static str, Value)> {
    enable
        .map(|on| ("enable_thinking", Value::Bool(on)))
        .into_iter()
        .collect()
}

/// One answer in progress.
pub struct Generation {
    /// None for a model without a tokenizer: an answer of token ids alone.
    decoder: Option<StreamDecoder>,
    stop: StopMatcher,
    text: String,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    extra: Map<String, Value>,
    /// When each token came, in seconds from the request.
    times: Vec<f64>,
}

impl Generation {
    /// An answer without tokens yet.
    ///
    /// # Errors
    /// An empty stop string.
    pub fn new(
        tokenizer: Option<&Tokenizer>,
        stop: &[String],
        prompt: Vec<u32>,
        extra: Map<String, Value>,
    ) -> Result<Self> {
        Ok(Generation {
            decoder: tokenizer.map(|t| t.stream_decoder(true)),
            stop: StopMatcher::new(stop)?,
            text: String::new(),
            prompt,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            extra,
            times: Vec::new(),
        })
    }

    /// Takes in a token; returns the text that is now final, and why the answer ends if it does.
    pub fn take(&mut self, event: &Event, start: Instant) -> (String, Option<FinishReason>) {
        self.times.push(start.elapsed().as_secs_f64());
        self.tokens.push(event.token);
        self.logprobs.push(event.logprob);
        let mut decoded = String::new();
        let mut special = None;
        if let Some(decoder) = &mut self.decoder {
            special = decoder.left_out(event.token);
            decoded += &decoder.push(event.token);
            if event.finish.is_some() {
                decoded += &decoder.finish();
            }
        }
        let before = self.stop.push_hidden(&special.unwrap_or_default());
        let mut step = self.stop.push(&decoded);
        step.matched = before.matched.or(step.matched);
        let mut text = before.text + &step.text;
        let finish = if step.matched.is_some() {
            Some(FinishReason::Stop)
        } else {
            event.finish
        };
        if finish.is_some() && step.matched.is_none() {
            text += &self.stop.finish();
        }
        self.text += &text;
        (text, finish)
    }

    /// The finished answer.
    pub fn into_answer(
        self,
        finish_reason: FinishReason,
        report: &Report,
        logprobs: bool,
    ) -> Answer {
        Answer {
            index: None,
            text: self.text,
            token_ids: self.tokens,
            prompt_token_ids: self.prompt,
            logprobs: logprobs.then_some(self.logprobs),
            finish_reason,
            timings: timings(report.load_s, &self.times),
            predicted: report.predicted,
            host_gbs: report.host_gbs,
            ranks: report.ranks.clone(),
            extra: self.extra,
        }
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// The times of an answer whose tokens came at `times`.
fn timings(load_s: f64, times: &[f64]) -> Timings {
    let mut gaps: Vec<f64> = times.windows(2).map(|w| w[1] - w[0]).collect();
    gaps.sort_by(f64::total_cmp);
    let mean = gaps.iter().sum::<f64>() / gaps.len().max(1) as f64;
    // The smallest gap that no more than the rest exceeds.
    let at = |percent: usize| {
        let rank = (gaps.len() * percent).div_ceil(100);
        gaps.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    };
    Timings {
        load_s,
        ttft_s: times.first().copied().unwrap_or(0.0),
        tpot_s: mean,
        tpot_p50_s: at(50),
        tpot_p99_s: at(99),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_gaps_between_tokens() {
        let none = timings(1.0, &[2.0]);
        assert_eq!((none.ttft_s, none.tpot_s, none.tpot_p99_s), (2.0, 0.0, 0.0));
        // 99 gaps of 1 and one of 101: the mean is 2, the slowest of a hundred is beyond the 99th.
        let mut times: Vec<f64> = (0..=99).map(f64::from).collect();
        times.push(200.0);
        let t = timings(0.0, &times);
        assert_eq!((t.tpot_s, t.tpot_p50_s, t.tpot_p99_s), (2.0, 1.0, 1.0));
        times.push(301.0);
        assert_eq!(timings(0.0, &times).tpot_p99_s, 101.0);
    }
}
