//! From a row of logits to a token: penalty, temperature, top-k, top-p, min-p, in the order of transformers' `generate`.
//!
//! The random draw is a function of the seed and the token's position alone. Every rank holds the same logits and so
//! draws the same token; nothing needs to be sent back.

use crate::model::CANDIDATES;
use serde::{Deserialize, Serialize};

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens already in the sequence; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Whether a few of the most likely tokens decide, most of the time: not where `top_k` keeps many or all.
    pub fn looks_at_few(&self) -> bool {
        let k = if self.temperature == 0.0 {
            1
        } else {
            self.top_k
        };
        (1..CANDIDATES).contains(&k) && self.repetition_penalty >= 1.0
    }

    /// Whether the token is the argmax of the logits as they are.
    pub fn is_plain_argmax(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }
}

/// Buffers of the sampler, so that a token costs no allocation.
#[derive(Debug, Default)]
pub struct Sampler {
    /// (logit or probability, token), the survivors of the filters.
    candidates: Vec<(f32, u32)>,
    logits: Vec<f32>,
    /// Bit `t` is set where token `t` is in the history.
    seen: Vec<u64>,
}

impl Sampler {
    /// Chooses the token for `position` of a sequence whose tokens so far are `history`.
    ///
    /// `logits` has one entry per token that may be chosen (padding rows of the vocabulary are cut off before).
    pub fn sample(
        &mut self,
        logits: &[f32],
        history: &[u32],
        params: &SamplingParams,
        position: usize,
    ) -> u32 {
        self.penalise(logits, history, params.repetition_penalty);
        if params.temperature == 0.0 {
            return argmax(&self.logits);
        }
        self.filter(params);
        self.draw(params, position)
    }

    /// As [`Sampler::sample`], from the most likely tokens alone; `None` where those do not decide.
    ///
    /// A penalty only ever lowers a logit, so what is not among `most_likely` is no higher than the last of them: above
    /// that, nothing is missing.
    pub fn sample_among(
        &mut self,
        most_likely: &[(f32, u32)],
        history: &[u32],
        params: &SamplingParams,
        position: usize,
    ) -> Option<u32> {
        if !params.looks_at_few() {
            return None;
        }
        let greedy = params.temperature == 0.0;
        let (k, temperature) = match greedy {
            true => (1, 1.0),
            false => (params.top_k, params.temperature),
        };
        self.see(history, params.repetition_penalty);
        let seen = |t: u32| {
            self.seen
                .get(t as usize / 64)
                .is_some_and(|w| w >> (t % 64) & 1 == 1)
        };
        let c = &mut self.candidates;
        c.clear();
        c.extend(most_likely.iter().map(|&(l, t)| {
            let l = if seen(t) {
                penalised(l, params.repetition_penalty)
            } else {
                l
            };
            (l / temperature, t)
        }));
        if most_likely.len() == CANDIDATES {
            let floor = most_likely.last()?.0 / temperature;
            let (_, kth, _) = c.select_nth_unstable_by(k - 1, most_likely_first);
            if kth.0.partial_cmp(&floor) != Some(std::cmp::Ordering::Greater) {
                return None;
            }
        }
        if greedy {
            // As `argmax` has it: the first of the largest.
            let first = |a: &(f32, u32), b: &(f32, u32)| {
                b.0.partial_cmp(&a.0).map(|o| o.then(a.1.cmp(&b.1)))
            };
            return c
                .iter()
                .copied()
                .min_by(|a, b| first(a, b).unwrap_or(std::cmp::Ordering::Equal))
                .map(|c| c.1);
        }
        self.narrow(params);
        Some(self.draw(params, position))
    }

    /// Notes which tokens the penalty is for.
    fn see(&mut self, history: &[u32], penalty: f32) {
        self.seen.fill(0);
        if penalty == 1.0 {
            return;
        }
        for &t in history {
            let word = t as usize / 64;
            if word >= self.seen.len() {
                self.seen.resize(word + 1, 0);
            }
            self.seen[word] |= 1 << (t % 64);
        }
    }

    fn draw(&self, params: &SamplingParams, position: usize) -> u32 {
        let target = uniform(params.seed, position as u64) as f32;
        let mut cumulative = 0.0;
        for &(p, token) in &self.candidates {
            cumulative += p;
            if target < cumulative {
                return token;
            }
        }
        // Rounding may leave the sum a hair under 1: the draw then belongs to the last candidate.
        self.candidates.last().map_or(0, |c| c.1)
    }

    /// The distribution that [`Sampler::sample`] draws from at a temperature above 0, over all tokens.
    pub fn probabilities(
        &mut self,
        logits: &[f32],
        history: &[u32],
        params: &SamplingParams,
    ) -> Vec<f32> {
        self.penalise(logits, history, params.repetition_penalty);
        self.filter(params);
        let mut p = vec![0.0; logits.len()];
        self.candidates
            .iter()
            .for_each(|&(q, token)| p[token as usize] = q);
        p
    }

    fn penalise(&mut self, logits: &[f32], history: &[u32], penalty: f32) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        if penalty == 1.0 {
            return;
        }
        for &token in history {
            // Reading the original makes a repeated token count once.
            if let (Some(&old), Some(new)) = (
                logits.get(token as usize),
                self.logits.get_mut(token as usize),
            ) {
                *new = penalised(old, penalty);
            }
        }
    }

    /// Leaves in `candidates` the surviving ones of all tokens with their probabilities, most likely first.
    fn filter(&mut self, params: &SamplingParams) {
        let c = &mut self.candidates;
        c.clear();
        c.extend(
            self.logits
                .iter()
                .zip(0..)
                .map(|(&l, token)| (l / params.temperature, token)),
        );
        self.narrow(params);
    }

    /// Leaves in `candidates`, which have scaled logits, the surviving ones with their probabilities, most likely first.
    fn narrow(&mut self, params: &SamplingParams) {
        let c = &mut self.candidates;
        if params.top_k > 0 && params.top_k < c.len() {
            let (_, &mut kth, _) = c.select_nth_unstable_by(params.top_k - 1, most_likely_first);
            // Ties with the k-th stay, as in the reference.
            c.retain(|x| x.0 >= kth.0);
        }
        c.sort_unstable_by(most_likely_first);
        softmax(c);
        if params.top_p < 1.0 {
            let mut before = 0.0;
            let keep = c.iter().take_while(|x| {
                let inside = before < params.top_p;
                before += x.0;
                inside
            });
            let keep = keep.count().max(1);
            c.truncate(keep);
            normalise(c);
        }
        if params.min_p > 0.0 {
            let least = params.min_p * c.first().map_or(0.0, |x| x.0);
            let keep = c.iter().take_while(|x| x.0 >= least).count().max(1);
            c.truncate(keep);
            normalise(c);
        }
    }
}

fn most_likely_first(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// A logit of a token that is in the sequence already.
fn penalised(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 {
        logit / penalty
    } else {
        logit * penalty
    }
}

/// The first of the largest values.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&l, i) in logits.iter().zip(0..) {
        if l > best.0 {
            best = (l, i);
        }
    }
    best.1
}

/// Natural logarithm of the softmax's denominator, in double precision.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    max + logits
        .iter()
        .map(|&l| (l as f64 - max).exp())
        .sum::<f64>()
        .ln()
}

fn softmax(c: &mut [(f32, u32)]) {
    let max = c.first().map_or(0.0, |x| x.0);
    c.iter_mut().for_each(|x| x.0 = (x.0 - max).exp());
    normalise(c);
}

fn normalise(c: &mut [(f32, u32)]) {
    let sum: f32 = c.iter().map(|x| x.0).sum();
    c.iter_mut().for_each(|x| x.0 /= sum);
}

/// A number in `[0, 1)` from (seed, position): two rounds of SplitMix64's mixer (Steele et al., OOPSLA 2014).
fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    // 24 bits, so that the value stays below 1 as an f32 too.
    (mix(mix(seed) ^ position) >> 40) as f64 / (1u64 << 24) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn params(temperature: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            ..SamplingParams::greedy()
        }
    }

    /// What the device finds: the most likely ones of all.
    fn most_likely(logits: &[f32]) -> Vec<(f32, u32)> {
        let mut all: Vec<_> = logits.iter().copied().zip(0..).collect();
        all.sort_by(most_likely_first);
        all.truncate(CANDIDATES);
        all
    }

    #[test]
    fn a_few_candidates_give_the_token_of_all_logits_or_none() {
        let mut sampler = Sampler::default();
        let (mut decided, mut undecided) = (0, 0);
        for round in 0..600u64 {
            let draw = |i: u64| uniform(round, i) as f32;
            let n = if round % 7 == 0 { 40 } else { 1000 };
            // Few different values make ties; a steep row leaves no doubt, a flat one much.
            let steep = [2.0, 8.0, 30.0][round as usize % 3];
            let logits: Vec<f32> = (0..n)
                .map(|i| ((draw(i) - 0.4) * steep * 8.0).round() / 8.0)
                .collect();
            let history: Vec<u32> = (0..50)
                .map(|i| (draw(5000 + i) * n as f32) as u32)
                .collect();
            let params = SamplingParams {
                temperature: [0.0, 0.7, 1.3][(round / 3) as usize % 3],
                top_k: [1, 20, 63, 64, 0][(round / 9) as usize % 5],
                top_p: [1.0, 0.8][(round / 2) as usize % 2],
                min_p: [0.0, 0.05][(round / 4) as usize % 2],
                repetition_penalty: [1.0, 1.05, 1.5, 0.9][(round / 5) as usize % 4],
                seed: round,
            };
            let want = sampler.sample(&logits, &history, &params, 77);
            match sampler.sample_among(&most_likely(&logits), &history, &params, 77) {
                Some(token) => {
                    decided += 1;
                    assert_eq!(token, want, "{round} {params:?}");
                }
                None => undecided += 1,
            }
        }
        assert!(decided > 150 && undecided > 100, "{decided} {undecided}");
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut s = Sampler::default();
        assert_eq!(
            s.sample(&[0.5, 2.0, 2.0, -1.0], &[], &SamplingParams::greedy(), 0),
            1
        );
        let penalised = SamplingParams {
            repetition_penalty: 2.0,
            ..SamplingParams::greedy()
        };
        assert_eq!(s.sample(&[0.5, 2.0, 1.5, -1.0], &[1, 1], &penalised, 0), 2);
    }

    #[test]
    fn draws_depend_on_seed_and_position_only_and_follow_the_distribution() {
        let logits = [1.0, 0.0, -1.0];
        let p = SamplingParams {
            seed: 7,
            ..params(1.0)
        };
        let draw = |position| Sampler::default().sample(&logits, &[], &p, position);
        let n = 20_000;
        let mut counts = [0usize; 3];
        (0..n).for_each(|i| counts[draw(i) as usize] += 1);
        let want = Sampler::default().probabilities(&logits, &[], &p);
        for (count, want) in counts.iter().zip(want) {
            // Five standard deviations of a binomial share.
            let sd = (want * (1.0 - want) / n as f32).sqrt();
            assert!(
                (*count as f32 / n as f32 - want).abs() < 5.0 * sd,
                "{counts:?}"
            );
        }
        assert_eq!(draw(3), draw(3));
    }

    proptest! {
        #[test]
        fn filters_leave_a_distribution_with_the_most_likely_token(
            logits in prop::collection::vec(-20f32..20.0, 1..200),
            (t, k, p, m) in (0.05f32..3.0, 0usize..50, 0.0f32..=1.0, 0.0f32..=1.0),
        ) {
            let params = SamplingParams { top_k: k, top_p: p, min_p: m, ..params(t) };
            let probabilities = Sampler::default().probabilities(&logits, &[], &params);
            let sum: f32 = probabilities.iter().sum();
            prop_assert!((sum - 1.0).abs() < 1e-4);
            prop_assert!(probabilities[argmax(&logits) as usize] > 0.0);
        }

        #[test]
        fn uniform_is_inside_the_unit_interval(seed: u64, position: u64) {
            let u = uniform(seed, position) as f32;
            prop_assert!((0.0..1.0).contains(&u));
        }
    }
}
