//! Weights without files, for benchmarks: the same tensors for every world size and every way to cut them.
//!
//! An element depends on the seed, the tensor's name and its row and column alone. Elements `2i` and `2i + 1` of a tensor
//! are the halves of output `i` of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
//! OOPSLA 2014), whose state after `i` steps is `key + i · GOLDEN`: every output is reached in one step.
//! The sum of a half's four bytes is nearly normal (Irwin–Hall) and indexes a table of the values.

use super::Dtype;
use super::checkpoint::{FNV_OFFSET, fnv1a};
use half::{bf16, f16};

/// Sums of four bytes, 0 to 4 × 255, rounded up so that a mask replaces the bounds check.
const SUMS: usize = 1024;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The values of one tensor.
pub(super) struct Random {
    key: u64,
    values: Box<[bf16; SUMS]>,
}

impl Random {
    /// The tensor `name`: norm weights near 1, biases near 0, everything else about N(0, 0.02²).
    ///
    /// Values are bf16, whatever type holds them, so that this type does not change them.
    pub fn new(seed: u64, name: &str) -> Self {
        let (mean, sd) = if name.ends_with("norm.weight") {
            (1.0, 0.02)
        } else if name.ends_with(".bias") {
            (0.0, 0.002)
        } else {
            (0.0, 0.02)
        };
        // A byte has variance (256² - 1) / 12; four of them add up.
        let sum_sd = (4.0 * 65535.0 / 12.0f32).sqrt();
        let sum_mean = 4.0 * 255.0 / 2.0;
        let values =
            std::array::from_fn(|s| bf16::from_f32(mean + sd * (s as f32 - sum_mean) / sum_sd));
        Random {
            key: mix(fnv1a(FNV_OFFSET, name.as_bytes()) ^ mix(seed)),
            values: Box::new(values),
        }
    }

    /// Writes elements `first`, `first + 1`, … (row · columns + column) to `dst` as `dtype`.
    pub fn fill(&self, first: u64, dtype: Dtype, dst: &mut [u8]) {
        match dtype {
            Dtype::Bf16 => self.fill_as(first, dst, bf16::to_le_bytes),
            Dtype::F16 => self.fill_as(first, dst, |v| f16::from_f32(v.to_f32()).to_le_bytes()),
            Dtype::F32 => self.fill_as(first, dst, |v| v.to_f32().to_le_bytes()),
        }
    }

    fn fill_as<const N: usize>(&self, first: u64, dst: &mut [u8], bytes: impl Fn(bf16) -> [u8; N]) {
        let value = |sum: usize| bytes(self.values[sum % SUMS]);
        let sums = |pair: u64| byte_sums(mix(self.key.wrapping_add(pair.wrapping_mul(GOLDEN))));
        let elements = dst.as_chunks_mut::<N>().0;
        let odd = usize::from(first % 2 == 1).min(elements.len());
        let (head, elements) = elements.split_at_mut(odd);
        let mut pair = first / 2;
        if let [second_half] = head {
            *second_half = value(sums(pair)[1]);
            pair += 1;
        }
        let (pairs, last) = elements.as_chunks_mut::<2>();
        for two in pairs {
            *two = sums(pair).map(value);
            pair += 1;
        }
        if let [first_half] = last {
            *first_half = value(sums(pair)[0]);
        }
    }
}

/// SplitMix64's output function.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The sums of the lower and of the upper four bytes: bytes added into 16-bit lanes, then neighbouring lanes.
fn byte_sums(x: u64) -> [usize; 2] {
    const LANES: u64 = 0x00ff_00ff_00ff_00ff;
    let twos = (x & LANES) + ((x >> 8) & LANES);
    let fours = twos + (twos >> 16);
    [fours & 0xffff, (fours >> 32) & 0xffff].map(|sum| sum as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, n: usize) -> Vec<f64> {
        let mut bytes = vec![0; n * 4];
        Random::new(7, name).fill(0, Dtype::F32, &mut bytes);
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f64::from(f32::from_le_bytes(b)))
            .collect()
    }

    fn moments(x: &[f64]) -> (f64, f64, f64) {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let kurtosis = x.iter().map(|v| (v - mean).powi(4)).sum::<f64>() / n / var.powi(2);
        (mean, var.sqrt(), kurtosis)
    }

    /// Tolerances: five standard errors of a million draws are 1e-4 for the mean and 7e-5 for the deviation; bf16
    /// rounding adds less. The excess kurtosis of Irwin–Hall with n = 4 is -6/5/4 = -0.3.
    #[test]
    fn matrices_are_nearly_normal_norms_near_one_and_biases_small() {
        let (mean, sd, kurtosis) = moments(&sample("layers.0.mlp.up_proj.weight", 1 << 20));
        assert!(
            mean.abs() < 1e-4 && (sd - 0.02).abs() < 1e-4 && (kurtosis - 2.7).abs() < 0.03,
            "{mean} {sd} {kurtosis}"
        );
        for norm in ["model.norm.weight", "model.layers.0.input_layernorm.weight"] {
            assert!(sample(norm, 1000).iter().all(|v| (v - 1.0).abs() < 0.15));
        }
        assert!(
            sample("layers.0.q_proj.bias", 1000)
                .iter()
                .all(|v| v.abs() < 0.015)
        );
    }

    #[test]
    fn seed_and_name_make_a_difference_and_neighbours_do_not_correlate() {
        let (a, b) = (sample("a.weight", 1 << 16), sample("b.weight", 1 << 16));
        let dot = |x: &[f64], y: &[f64]| {
            x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>() / x.len() as f64 / 0.0004
        };
        // The correlation of 65536 independent pairs has a standard error of 1/256.
        assert!(dot(&a, &b).abs() < 0.02 && dot(&a[1..], &a).abs() < 0.02);
        let (mut x, mut y) = ([0; 64], [0; 64]);
        Random::new(1, "a").fill(0, Dtype::Bf16, &mut x);
        Random::new(2, "a").fill(0, Dtype::Bf16, &mut y);
        assert_ne!(x, y);
    }

    #[test]
    fn every_value_is_exact_in_every_type() {
        for name in ["a.norm.weight", "a.bias", "a.weight"] {
            for v in Random::new(0, name).values.iter() {
                assert_eq!(f16::from_f32(v.to_f32()).to_f32(), v.to_f32(), "{name}");
            }
        }
    }

    /// The first outputs of the published SplitMix64 for seed 1234567, as the generator's reference page lists them.
    #[test]
    fn the_generator_is_splitmix64() {
        let seed = 1_234_567u64;
        let out = [1, 2, 3].map(|i: u64| mix(seed.wrapping_add(i.wrapping_mul(GOLDEN))));
        assert_eq!(
            out,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423
            ]
        );
    }

    #[test]
    fn byte_sums_are_exact() {
        for x in [0, u64::MAX, 0x0102_0304_0506_0708, GOLDEN, mix(3)] {
            let bytes = x.to_le_bytes().map(usize::from);
            assert_eq!(
                byte_sums(x),
                [0, 4].map(|at| bytes[at..at + 4].iter().sum::<usize>())
            );
        }
    }
}
