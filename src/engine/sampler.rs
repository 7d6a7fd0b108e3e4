//! From a row of logits to a token: penalty, temperature, top-k, top-p, min-p, in the order of transformers' `generate`.
//!
//! The random draw is a function of the seed, the sequence's stream and the token's position alone. Every rank holds the
//! same logits and so draws the same token; nothing needs to be sent back. A GPU draws by itself (`kernels/candidates.cu`) where a token is
//! one of the most likely few; what is here then says only how.

use super::Bans;
use crate::layout::CANDIDATES;
use crate::model::Draw;
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
    /// Which of the seed's streams of draws: sequences that run side by side have one each.
    pub stream: u64,
    /// Tokens that may not come.
    pub bans: Bans,
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
            stream: 0,
            bans: Bans::default(),
        }
    }

    /// How a device draws the token for `position`; `None` where all tokens are in question, not only the most likely few.
    pub fn draw(&self, position: usize) -> Option<Draw> {
        let top_k = if self.temperature == 0.0 {
            1
        } else {
            self.top_k
        };
        let on_device = (1..=CANDIDATES).contains(&top_k) && self.bans.is_empty();
        on_device.then(|| Draw {
            temperature: self.temperature,
            top_k: top_k as u32,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            uniform: uniform(self.seed, self.stream, position as u64) as f32,
        })
    }
}

/// Buffers of the sampler, so that a token costs no allocation.
#[derive(Debug, Default)]
pub struct Sampler {
    /// (logit or probability, token), the survivors of the filters; unused where there is no filter.
    candidates: Vec<(f32, u32)>,
    /// Of all tokens: logits, then weights.
    all: Vec<f32>,
    /// Sums of the weights, [`BLOCK`] of them each.
    sums: Vec<f64>,
}

/// Numbers that are summed in single precision.
const BLOCK: usize = 2048;

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
        self.take_in(logits, history, params);
        // Without a finite largest logit there is nothing to draw from; the caller sees which one it is.
        if params.temperature == 0.0 || !largest(&self.all).is_finite() {
            return argmax(&self.all);
        }
        let target = uniform(params.seed, params.stream, position as u64);
        match self.weigh(params) {
            Weighed::All(sum) => self.draw_from_all(target * sum),
            Weighed::Candidates => self.draw_candidate(target),
        }
    }

    fn draw_candidate(&self, target: f64) -> u32 {
        let mut cumulative = 0.0;
        for &(p, token) in &self.candidates {
            cumulative += f64::from(p);
            if target < cumulative {
                return token;
            }
        }
        // Rounding may leave the sum a hair under 1: the draw then belongs to the last candidate.
        self.candidates.last().map_or(0, |c| c.1)
    }

    fn draw_from_all(&self, target: f64) -> u32 {
        let (mut left, mut last) = (target, 0);
        for ((block, &sum), first) in self
            .all
            .chunks(BLOCK)
            .zip(&self.sums)
            .zip((0..).step_by(BLOCK))
        {
            if left >= sum {
                left -= sum;
                continue;
            }
            for (&weight, token) in block.iter().zip(first..) {
                left -= f64::from(weight);
                if weight > 0.0 {
                    last = token;
                }
                if left < 0.0 {
                    break;
                }
            }
            // Rounding may leave a hair at the end of the block.
            break;
        }
        last
    }

    /// The distribution that [`Sampler::sample`] draws from at a temperature above 0, over all tokens.
    pub fn probabilities(
        &mut self,
        logits: &[f32],
        history: &[u32],
        params: &SamplingParams,
    ) -> Vec<f32> {
        self.take_in(logits, history, params);
        match self.weigh(params) {
            Weighed::All(sum) => self.all.iter().map(|w| w / sum as f32).collect(),
            Weighed::Candidates => {
                let mut p = vec![0.0; logits.len()];
                self.candidates
                    .iter()
                    .for_each(|&(q, token)| p[token as usize] = q);
                p
            }
        }
    }

    /// The logits behind penalty and bans.
    fn take_in(&mut self, logits: &[f32], history: &[u32], params: &SamplingParams) {
        self.all.clear();
        self.all.extend_from_slice(logits);
        self.penalise(logits, history, params.repetition_penalty);
        params.bans.visit(history, |token| {
            if let Some(logit) = self.all.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        });
    }

    fn penalise(&mut self, logits: &[f32], history: &[u32], penalty: f32) {
        if penalty == 1.0 {
            return;
        }
        for &token in history {
            // Reading the original makes a repeated token count once.
            if let (Some(&old), Some(new)) =
                (logits.get(token as usize), self.all.get_mut(token as usize))
            {
                *new = penalised(old, penalty);
            }
        }
    }

    /// From logits to weights, or where there is a filter to the probabilities of the candidates that it leaves.
    fn weigh(&mut self, params: &SamplingParams) -> Weighed {
        // From the largest down, so that no temperature is too small for the quotients.
        let max = largest(&self.all);
        let scale = |l: &mut f32| *l = (*l - max) / params.temperature;
        self.all.iter_mut().for_each(scale);
        self.candidates.clear();
        if params.top_k > 0 && params.top_k < self.all.len() {
            self.take_most_likely(params.top_k);
            let c = &mut self.candidates;
            c.iter_mut().for_each(|x| x.0 = exp(x.0));
            normalise(c);
        } else {
            self.all.iter_mut().for_each(|l| *l = exp(*l));
            self.sums.clear();
            self.sums.extend(self.all.chunks(BLOCK).map(sum));
            let sum: f64 = self.sums.iter().sum();
            if params.top_p >= 1.0 && params.min_p <= 0.0 {
                return Weighed::All(sum);
            }
            // The largest weight is 1. All that is lighter than the average of what top-p may drop is not needed to reach
            // it; half of that, because sums are rounded.
            let droppable = f64::from(1.0 - params.top_p.clamp(0.0, 1.0)) * sum;
            let least = params
                .min_p
                .max((0.5 * droppable / self.all.len() as f64) as f32);
            let all = self.all.iter().copied().zip(0..);
            let heavy = all.filter(|x| x.0 >= least);
            self.candidates
                .extend(heavy.map(|(w, token)| (w / sum as f32, token)));
        }
        keep_most_likely(&mut self.candidates, params);
        Weighed::Candidates
    }

    /// Leaves the k most likely of all in `candidates`, and ties with the k-th, as the reference does.
    fn take_most_likely(&mut self, k: usize) {
        // Of four times as many parts, the k-th largest maximum is no larger than the k-th largest of all.
        let parts = self.all.chunks((self.all.len() / (4 * k)).max(1));
        let mut maxima: Vec<f32> = parts.map(largest).collect();
        let (_, &mut bound, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let c = &mut self.candidates;
        c.extend(self.all.iter().copied().zip(0..).filter(|x| x.0 >= bound));
        if c.len() > k {
            let (_, &mut kth, _) = c.select_nth_unstable_by(k - 1, most_likely_first);
            c.retain(|x| x.0 >= kth.0);
        }
    }
}

/// Where the tokens in question are.
enum Weighed {
    /// All of them, with weights of this sum.
    All(f64),
    /// In `candidates`, most likely first.
    Candidates,
}

/// Sorts probabilities, most likely first, as far as top-p and min-p leave any, and drops the others. All of a large
/// vocabulary takes 8 ms to sort, the few hundred that count next to nothing.
fn keep_most_likely(c: &mut Vec<(f32, u32)>, params: &SamplingParams) {
    let enough = match params.top_p {
        p if p < 1.0 => f64::from(p),
        _ => f64::INFINITY,
    };
    let (mut sorted, mut more, mut before, mut least) = (0, 256, 0.0, 0.0);
    while sorted < c.len() {
        let end = (sorted + more).min(c.len());
        let rest = &mut c[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted - 1, most_likely_first);
        }
        rest[..end - sorted].sort_unstable_by(most_likely_first);
        if sorted == 0 {
            least = params.min_p * c[0].0;
        }
        for i in sorted..end {
            if i > 0 && (before >= enough || c[i].0 < least) {
                c.truncate(i);
                break;
            }
            before += f64::from(c[i].0);
        }
        (sorted, more) = (end.min(c.len()), 8 * more);
    }
    normalise(c);
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
    let max = largest(logits);
    logits.iter().position(|&l| l == max).unwrap_or(0) as u32
}

/// Natural logarithm of the softmax's denominator.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = largest(logits);
    let mut block = [0.0; BLOCK];
    let sums = logits.chunks(BLOCK).map(|logits| {
        let block = &mut block[..logits.len()];
        for (e, l) in block.iter_mut().zip(logits) {
            *e = exp(l - max);
        }
        sum(block)
    });
    f64::from(max) + sums.sum::<f64>().ln()
}

// What follows is plain arithmetic, eight numbers side by side, which compilers make vectors of for any processor; and the
// same bits on all of them: ranks have to draw alike.

/// The largest number; infinitely small where there is none.
fn largest(x: &[f32]) -> f32 {
    let (eights, rest) = x.as_chunks::<8>();
    let mut max = [f32::NEG_INFINITY; 8];
    for x in eights {
        for (max, &x) in max.iter_mut().zip(x) {
            *max = if x > *max { x } else { *max };
        }
    }
    max.iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

fn sum(x: &[f32]) -> f64 {
    let (eights, rest) = x.as_chunks::<8>();
    let mut sum = [0.0f32; 8];
    for x in eights {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x;
        }
    }
    sum.iter().chain(rest).map(|&x| f64::from(x)).sum()
}

/// eˣ for x ≤ 0, to 3 ulp; 0 below -87.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 7 (remainder below 2⁻²⁷), as in `cpu/simd.rs`, but
/// without fused operations, which round otherwise and not every processor has.
#[inline]
fn exp(x: f32) -> f32 {
    // Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let p = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let p = 1.0 / 120.0 + r * p;
    let p = 1.0 / 24.0 + r * p;
    let p = 1.0 / 6.0 + r * p;
    let p = 1.0 + r * (1.0 + r * (0.5 + r * p));
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

fn normalise(c: &mut [(f32, u32)]) {
    let sum: f64 = c.iter().map(|x| f64::from(x.0)).sum();
    c.iter_mut().for_each(|x| x.0 /= sum as f32);
}

/// A number in `[0, 1)` from (seed, stream, position): rounds of SplitMix64's mixer (Steele et al., OOPSLA 2014). Stream 0
/// has no round of its own.
fn uniform(seed: u64, stream: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    // 24 bits, so that the value stays below 1 as an f32 too.
    let key = match stream {
        0 => mix(seed),
        n => mix(mix(seed) ^ n),
    };
    (mix(key ^ position) >> 40) as f64 / (1u64 << 24) as f64
}

#[cfg(test)]
mod tests;
