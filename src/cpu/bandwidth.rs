//! The two ceilings: how fast all threads together read memory (decoding), and multiply and add (prefill).

use super::Pool;
use super::isa::Kernel;
use super::pool::{Shards, piece};
use super::scratch::Scratch;
use super::simd::{Lanes, Simd};
use std::time::Instant;

/// How many sequential streams a thread may read side by side: which is fastest differs between processors.
pub const STREAMS: [usize; 3] = [1, 4, 8];

/// Memory that the threads of a pool read again and again, each its own part.
pub struct ReadBuffer {
    scratch: Scratch,
    len: usize,
}

impl ReadBuffer {
    /// About `bytes`; each thread touches first what it will read, so that the pages are near it.
    pub fn new(pool: &Pool, bytes: usize) -> ReadBuffer {
        let len = (bytes / size_of::<f32>()).max(1);
        let mut scratch = Scratch::new();
        let shards = Shards::new(scratch.get_on_large_pages(len));
        pool.run(|tid, n| {
            let range = piece(len, tid, n);
            // SAFETY: the pieces are disjoint.
            unsafe { shards.part(range.start, range.len()) }.fill(1.0);
        });
        ReadBuffer { scratch, len }
    }

    /// Bytes of one pass.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
    }

    /// Seconds of one pass of all threads, each reading its part as `streams` sequential streams.
    pub fn pass(&mut self, pool: &Pool, streams: usize) -> f64 {
        let buffer = &*self.scratch.get(self.len);
        let isa = pool.isa();
        let start = Instant::now();
        pool.run(|tid, n| {
            let data = &buffer[piece(buffer.len(), tid, n)];
            let largest = isa.dispatch(Read { data, streams });
            assert!(largest >= 0.0); // uses the result, so that the reads stay
        });
        start.elapsed().as_secs_f64()
    }
}

/// Sequential read bandwidth of all threads together over a buffer of `bytes`, in GB/s (10⁹ bytes): the best of several passes,
/// in several orders, after the one that touches the pages.
///
/// For a figure about memory, `bytes` is several times the last-level cache.
pub fn measure_read_bandwidth(pool: &Pool, bytes: usize) -> f64 {
    let mut buffer = ReadBuffer::new(pool, bytes);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        for streams in STREAMS {
            best = best.min(buffer.pass(pool, streams));
        }
    }
    buffer.bytes() as f64 / best / 1e9
}

/// Reads `data` as several streams side by side: how many suit the hardware's prefetchers differs between processors, and a
/// ceiling that a kernel can pass is none.
struct Read<'a> {
    data: &'a [f32],
    streams: usize,
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let step = 4 * S::LANES;
        let mut largest = [s.zero(); 4];
        let each = self.data.len() / self.streams / step;
        for i in 0..each {
            for stream in 0..self.streams {
                let chunk = &self.data[(stream * each + i) * step..][..step];
                for (lane, largest) in largest.iter_mut().enumerate() {
                    // SAFETY: a chunk has 4 · LANES elements.
                    *largest = s.max(*largest, unsafe {
                        s.load(chunk.as_ptr().add(lane * S::LANES))
                    });
                }
            }
        }
        largest.into_iter().map(|v| s.sum(v)).sum()
    }
}

/// The rate of f32 multiply-adds of all threads together on the pool's instruction set, in GFLOP/s (two operations each):
/// the best of five runs on registers alone.
pub fn measure_fma_rate(pool: &Pool) -> f64 {
    const STEPS: usize = 1 << 20;
    let isa = pool.isa();
    let mut best: f64 = 0.0;
    for _ in 0..5 {
        let start = Instant::now();
        pool.run(|_, _| {
            assert!(
                isa.dispatch(Fma {
                    steps: STEPS,
                    by: 0.5
                })
                .is_finite()
            );
        });
        let lanes = isa.dispatch(Lanes);
        let operations = 2 * pool.threads() * STEPS * CHAINS * lanes;
        best = best.max(operations as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}

/// Independent sums: more than latency times issue width on any core.
const CHAINS: usize = 12;

struct Fma {
    steps: usize,
    by: f32,
}

impl Kernel for Fma {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let by = s.splat(std::hint::black_box(self.by));
        let mut acc = [s.zero(); CHAINS];
        for _ in 0..self.steps {
            for acc in &mut acc {
                *acc = s.fma(*acc, by, by);
            }
        }
        acc.into_iter().map(|v| s.sum(v)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::pools;
    use super::*;

    #[test]
    fn rates_are_positive_numbers() {
        for pool in pools() {
            let gb_s = measure_read_bandwidth(&pool, 1 << 20);
            assert!(gb_s.is_finite() && gb_s > 0.0);
            assert!(measure_read_bandwidth(&pool, 0) > 0.0);
            let gflop_s = measure_fma_rate(&pool);
            assert!(gflop_s.is_finite() && gflop_s > 0.0);
        }
    }
}
