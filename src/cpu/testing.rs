//! What the kernels' tests share: pools of every instruction set, random values, a tolerance that says what failed.

use super::{Isa, Pool, affinity_cpus};
use crate::weights::Dtype;
use half::{bf16, f16};

/// A pool for every instruction set of this machine, with all threads and with three that share one CPU.
pub fn pools() -> Vec<Pool> {
    let cpus = affinity_cpus();
    let pools = Isa::available().into_iter().flat_map(|isa| {
        [cpus.clone(), vec![cpus[0]; 3]]
            .map(|cpus| Pool::sharing(&cpus).unwrap().with_isa(isa).unwrap())
    });
    pools.collect()
}

/// A small seeded generator (xorshift64*, Vigna 2014).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.next() as usize % (high - low + 1)
    }

    /// Uniform in -scale..scale.
    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let unit = |r: u64| (r as f64 / (1u64 << 52) as f64 - 1.0) as f32;
        (0..n).map(|_| unit(self.next()) * scale).collect()
    }
}

/// Random weights: their bytes as stored (aligned), and their values.
pub fn weights(rng: &mut Rng, dtype: Dtype, n: usize) -> (Aligned, Vec<f32>) {
    let x = rng.floats(n, 1.0);
    let (bytes, values): (Vec<u8>, Vec<f32>) = match dtype {
        Dtype::F32 => (bytemuck::cast_slice(&x).to_vec(), x),
        Dtype::Bf16 => {
            let w: Vec<bf16> = x.into_iter().map(bf16::from_f32).collect();
            let bytes = bytemuck::cast_slice(&w).to_vec();
            (bytes, w.into_iter().map(bf16::to_f32).collect())
        }
        Dtype::F16 => {
            let w: Vec<f16> = x.into_iter().map(f16::from_f32).collect();
            let bytes = bytemuck::cast_slice(&w).to_vec();
            (bytes, w.into_iter().map(f16::to_f32).collect())
        }
    };
    (Aligned::new(&bytes), values)
}

/// Bytes on a cache line.
pub struct Aligned(Vec<[u64; 8]>, usize);

impl Aligned {
    fn new(bytes: &[u8]) -> Aligned {
        let mut lines = vec![[0u64; 8]; bytes.len().div_ceil(64)];
        bytemuck::cast_slice_mut(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Aligned(lines, bytes.len())
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }
}

/// Asserts |a - b| ≤ tolerance · max(1, |b|) element by element.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (&a, &b)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - b).abs() / b.abs().max(1.0);
        assert!(
            error <= tolerance,
            "element {i} of {}: {a} for {b}, off by {error:.1e} (allowed {tolerance:.0e})",
            actual.len()
        );
    }
}
