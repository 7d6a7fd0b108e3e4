//! Rotary position embedding: plain, or scaled by YaRN (Peng et al., arXiv 2309.00071).

use super::fields::Fields;
use super::keys;
use crate::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::f64::consts::PI;
use std::ops::RangeInclusive;

/// How positions turn into rotations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Stretching beyond the trained length.
    pub yarn: Option<Yarn>,
}

/// YaRN's parameters under the names of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Yarn {
    /// How much longer than trained.
    pub factor: f64,
    /// The trained length, in tokens.
    pub original_max_position_embeddings: usize,
    /// Dimensions that turn more often than this over the trained length are left as they are.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are fully interpolated.
    pub beta_slow: f64,
    /// Factor on cos and sin.
    pub attention_factor: f64,
    /// Round the two bounds to whole dimensions.
    pub truncate: bool,
}

impl Rope {
    /// Takes the rotary keys of either spelling out of a config.
    pub(super) fn take(f: &mut Fields, max_positions: usize) -> Result<Rope> {
        let theta = f.number("rope_theta")?.unwrap_or(10_000.0);
        let mut ropes = Vec::new();
        for key in ["rope_scaling", "rope_parameters"] {
            match f.take(key) {
                None => {}
                // Python's `or` passes over an empty one.
                Some(Value::Object(map)) if map.is_empty() => {}
                Some(value) => {
                    let mut r = Fields::from_value(key, value)?;
                    let mut rope = Rope { theta, yarn: None };
                    rope.take_scaling(&mut r, max_positions)
                        .map_err(|e| Error::failed(format!("{key}: {e}")))?;
                    ropes.push(rope);
                }
            }
        }
        if ropes.windows(2).any(|pair| pair[0] != pair[1]) {
            return Err(Error::failed(
                "rope_scaling and rope_parameters contradict each other: keep one",
            ));
        }
        let rope = ropes.pop().unwrap_or(Rope { theta, yarn: None });
        within("rope_theta", rope.theta, 1.0..=1e15)?;
        // The series of wavelengths needs a base that is not 1.
        if rope.theta == 1.0 {
            return Err(Error::failed("rope_theta 1: must be above 1"));
        }
        Ok(rope)
    }

    fn take_scaling(&mut self, r: &mut Fields, max_positions: usize) -> Result<()> {
        if let Some(theta) = r.number("rope_theta")? {
            self.theta = theta;
        }
        let old = r.string("type")?;
        let kind = r
            .string("rope_type")?
            .or(old)
            .unwrap_or_else(|| "default".into());
        match kind.as_str() {
            "default" => {}
            "yarn" => self.yarn = Some(Yarn::take(r, max_positions)?),
            other => {
                return Err(Error::failed(format!(
                    "type \"{other}\" is not supported: default or yarn"
                )));
            }
        }
        // Those of other kinds of scaling are refused; what is no part of any, or of other programs, is passed over.
        let other = r.rest().find(|(key, value)| {
            let known = [
                "low_freq_factor",
                "high_freq_factor",
                "short_factor",
                "long_factor",
            ];
            let partial = *key == "partial_rotary_factor" && value.as_f64() != Some(1.0);
            !value.is_null()
                && (partial || known.contains(&key.as_str()) || *key == "mrope_section")
        });
        match other {
            Some((key, value)) => Err(keys::refusal(key, value)),
            None => Ok(()),
        }
    }

    /// Positions that YaRN makes usable; 0 without it.
    pub(super) fn stretched_positions(&self) -> usize {
        self.yarn.as_ref().map_or(0, |y| {
            (y.factor * y.original_max_position_embeddings as f64) as usize
        })
    }

    /// The `head_dim / 2` inverse frequencies and the factor on cos and sin.
    pub fn inv_freq(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let half = head_dim / 2;
        // Rounded to f32 where the reference rounds: the phase at position 30000 would show the difference.
        let pos_freq = |i: usize| (self.theta as f32).powf((2 * i) as f32 / head_dim as f32);
        match &self.yarn {
            None => ((0..half).map(|i| 1.0 / pos_freq(i)).collect(), 1.0),
            Some(y) => {
                let (low, high) = y.correction_range(head_dim, self.theta);
                let mix = |i: usize| {
                    let extrapolate = 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    let (p, factor) = (pos_freq(i), y.factor as f32);
                    (1.0 / (factor * p)) * (1.0 - extrapolate) + (1.0 / p) * extrapolate
                };
                ((0..half).map(mix).collect(), y.attention_factor as f32)
            }
        }
    }
}

/// Beyond these, sines and cosines are infinite or nothing in single precision, or the file is damaged.
fn within(key: &str, x: f64, range: RangeInclusive<f64>) -> Result<()> {
    if range.contains(&x) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(Error::failed(format!(
        "{key} {x:e}: must be from {low} to {high}"
    )))
}

impl Yarn {
    fn take(r: &mut Fields, max_positions: usize) -> Result<Yarn> {
        let factor = r
            .number("factor")?
            .ok_or_else(|| Error::failed("factor is missing"))?;
        within("factor", factor, 1.0..=1024.0)?;
        let original = r
            .optional_size("original_max_position_embeddings", 1 << 24)?
            .unwrap_or(max_positions);
        // YaRN, section 3.4: the temperature is folded into the embedding's length.
        let mscale = |m: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * m * factor.ln() + 1.0
            }
        };
        let (m, all) = (r.number("mscale")?, r.number("mscale_all_dim")?);
        let default = match (m, all) {
            (Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
            _ => mscale(1.0),
        };
        let attention_factor = r.number("attention_factor")?.unwrap_or(default);
        within("attention_factor", attention_factor, 1e-4..=1e4)?;
        // 0 counts as absent, as it does in Python's `or`.
        let mut beta = |key: &str, default: f64| {
            let beta = r.number(key)?.filter(|&x| x != 0.0).unwrap_or(default);
            within(key, beta, 1e-6..=1e6).map(|()| beta)
        };
        let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
        if beta_fast < beta_slow {
            return Err(Error::failed(format!(
                "beta_fast {beta_fast} is below beta_slow {beta_slow}"
            )));
        }
        let truncate = r.boolean("truncate")?.unwrap_or(true);
        Ok(Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        })
    }

    /// The dimensions between which interpolation sets in (YaRN, section 3.2).
    fn correction_range(&self, head_dim: usize, theta: f64) -> (f32, f32) {
        let dim = head_dim as f64;
        let turns = |n: f64| {
            dim * (self.original_max_position_embeddings as f64 / (n * 2.0 * PI)).ln()
                / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (turns(self.beta_fast), turns(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        (low as f32, high as f32)
    }
}
