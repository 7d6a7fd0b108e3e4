//! What a machine can do at best, as its ranks have measured it.

use crate::plan::{DeviceKind, GpuRates, Rate, Rates};
use serde::{Deserialize, Serialize};

/// Rows of the sums over ranks of a decode step.
pub const DECODE_ROWS: [usize; 6] = crate::layout::SUM_ROWS;
/// Bytes of the larger sums.
pub const LARGE_SUMS: [usize; 6] = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20, 32 << 20];

/// One rank's GPU. GB are 10⁹ bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GpuCeilings {
    /// Reading its own memory.
    pub read_gbs: f64,
    /// Products of large bf16 matrices.
    pub gemm_tflops: f64,
    /// Pinned host memory to the GPU, no other rank copying.
    pub link_gbs: f64,
    /// The same, all ranks at once.
    pub link_all_gbs: f64,
    /// The same, all ranks at once and their cores reading host memory.
    pub link_beside_cores_gbs: f64,
    /// The rank's cores reading host memory meanwhile.
    pub cores_beside_link_gbs: f64,
}

/// One rank; where not said otherwise all ranks work at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankCeilings {
    /// Its host's name.
    pub host: String,
    /// What it runs on.
    pub device: String,
    /// Bytes of memory that a plan may fill: of its GPU, or of its host for a CPU rank.
    pub memory: u64,
    /// Its GPU's UUID, 32 hexadecimal digits.
    pub gpu_uuid: Option<String>,
    /// Its GPU, on a GPU rank.
    pub gpu: Option<GpuCeilings>,
    /// Its cores reading host memory, in GB/s.
    pub host_read_gbs: f64,
    /// f32 multiply-adds of its cores, in GFLOP/s.
    pub host_gflops: f64,
}

/// The time of one sum over the ranks, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AllReduce {
    /// Bytes of the message.
    pub bytes: usize,
    /// Rows of the residual stream, for a decode step's message.
    pub rows: Option<usize>,
    /// Fused with the residual and the norm, over peer memory, where the ranks can.
    pub fused_us: Option<f64>,
    /// By the collective library, nothing behind it.
    pub library_us: f64,
    /// What was measured at the start of the run, where the ranks have both ways.
    pub at_start: Option<AtStart>,
}

/// The choice between the ways of a sum with the residual add and the norm behind it, on the slowest rank, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AtStart {
    /// Fused, over peer memory.
    pub fused_us: f64,
    /// The library's sum, then a kernel for the rest.
    pub library_us: f64,
    /// Whether steps take the fused sum.
    pub is_fused: bool,
}

/// What the ranks have measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Width of the residual stream in the messages' rows.
    pub hidden: usize,
    /// The way that sums take.
    pub collective: String,
    /// The ranks in order.
    pub ranks: Vec<RankCeilings>,
    /// Sums over the ranks by size; none for one rank.
    pub all_reduce: Vec<AllReduce>,
}

impl AllReduce {
    /// The faster way.
    pub fn best_us(&self) -> f64 {
        self.fused_us
            .map_or(self.library_us, |us| us.min(self.library_us))
    }
}

impl Ceilings {
    /// What the ranks run on.
    pub fn device(&self) -> DeviceKind {
        match self.ranks.iter().any(|r| r.gpu.is_some()) {
            true => DeviceKind::Cuda,
            false => DeviceKind::Cpu,
        }
    }

    /// The rates of a plan; what was not measured stays assumed.
    pub fn rates(&self) -> Rates {
        let kind = self.device();
        let assumed = Rates::assumed(kind, None);
        let gpus = || self.ranks.iter().filter_map(|r| r.gpu);
        let slowest = |of: fn(&GpuCeilings) -> f64| {
            Rate::measured(gpus().map(|g| of(&g)).fold(f64::INFINITY, f64::min))
        };
        let gpu = assumed.gpu.map(|mut gpu: GpuRates| {
            gpu.read_gbs = slowest(|g| g.read_gbs);
            gpu.gemm_tflops = slowest(|g| g.gemm_tflops);
            gpu.link_gbs = slowest(|g| g.link_all_gbs);
            gpu
        });
        // A plan speaks of a node; the ranks of the first one are as good as any.
        let node = || self.ranks.iter().filter(|r| r.host == self.ranks[0].host);
        let sum = |of: fn(&RankCeilings) -> f64| Rate::measured(node().map(of).sum());
        let both = |r: &RankCeilings| {
            let beside = |g: GpuCeilings| g.link_beside_cores_gbs + g.cores_beside_link_gbs;
            r.gpu.map_or(0.0, beside)
        };
        let together = gpu.is_some().then(|| sum(both));
        let mut rates = Rates {
            assumed_for: "this machine",
            gpu,
            host_read_gbs: sum(|r| r.host_read_gbs),
            together_gbs: together,
            host_gemm_tflops: sum(|r| r.host_gflops / 1e3),
            ..assumed
        };
        let small = self.all_reduce.iter().find(|a| a.rows == Some(1));
        if let (Some(small), Some(large)) = (small, self.all_reduce.last())
            && large.bytes > small.bytes
        {
            let further_us = large.best_us() - small.best_us();
            rates.all_reduce_us = Rate::measured(small.best_us());
            if further_us > 0.0 {
                let bytes = (large.bytes - small.bytes) as f64;
                rates.all_reduce_gbs = Rate::measured(bytes / further_us / 1e3);
            }
        }
        rates
    }

    /// Read rate of rank `r`'s own memory and its arithmetic, in GB/s and TFLOP/s.
    pub fn of_rank(&self, r: usize) -> Option<(f64, f64)> {
        let rank = self.ranks.get(r)?;
        Some(match rank.gpu {
            Some(gpu) => (gpu.read_gbs, gpu.gemm_tflops),
            None => (rank.host_read_gbs, rank.host_gflops / 1e3),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Ranks as on a machine of which the figures are known.
    pub fn h200s(n: usize) -> Ceilings {
        let sum = |bytes, rows, fused_us, library_us| AllReduce {
            bytes,
            rows,
            fused_us,
            library_us,
            at_start: fused_us.map(|us| AtStart {
                fused_us: us,
                library_us: library_us + 2.0,
                is_fused: true,
            }),
        };
        let rank = RankCeilings {
            host: "node".to_owned(),
            device: "NVIDIA H200 (GPU 0)".to_owned(),
            memory: 140 << 30,
            gpu_uuid: None,
            gpu: Some(GpuCeilings {
                read_gbs: 4340.0,
                gemm_tflops: 783.0,
                link_gbs: 55.0,
                link_all_gbs: 54.0,
                link_beside_cores_gbs: 50.0,
                cores_beside_link_gbs: 60.0,
            }),
            host_read_gbs: 80.0,
            host_gflops: 2000.0,
        };
        let all_reduce = match n {
            1 => Vec::new(),
            _ => vec![
                sum(16384, Some(1), Some(6.0), 13.0),
                sum(16384 + 10_000_000, None, None, 56.0),
            ],
        };
        Ceilings {
            hidden: 8192,
            collective: "peer memory".to_owned(),
            ranks: vec![rank; n],
            all_reduce,
        }
    }

    #[test]
    fn a_plan_gets_what_was_measured() {
        let mut ceilings = h200s(2);
        ceilings.ranks[1].gpu.as_mut().unwrap().link_all_gbs = 40.0;
        let rates = ceilings.rates();
        let gpu = rates.gpu.unwrap();
        // GPUs are taken to be alike: the slowest speaks for all. Cores are those of the node.
        assert_eq!((gpu.read_gbs.value, gpu.link_gbs.value), (4340.0, 40.0));
        assert_eq!(
            (rates.host_read_gbs.value, rates.host_gemm_tflops.value),
            (160.0, 4.0)
        );
        // Links and cores while both are at work.
        assert_eq!(rates.together_gbs.map(|r| r.value), Some(220.0));
        // The faster way of each size: 6 µs, and 10 MB more in 50 µs more.
        assert_eq!(
            (rates.all_reduce_us.value, rates.all_reduce_gbs.value),
            (6.0, 200.0)
        );
        assert!(gpu.read_gbs.measured && rates.all_reduce_gbs.measured);
        assert!(!rates.file_read_gbs.measured);
        assert!(!h200s(1).rates().all_reduce_us.measured);
    }
}
