//! How fast the machine moves and multiplies: measured where the caller has measured, else assumed and named so.

use super::DeviceKind;
use crate::{Error, Result};
use serde::Serialize;

/// One rate and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// In the unit of the field's name.
    pub value: f64,
    /// Measured on the machine at hand; false for an assumption.
    pub measured: bool,
}

impl Rate {
    /// A figure measured on the machine at hand.
    pub fn measured(value: f64) -> Rate {
        Rate {
            value,
            measured: true,
        }
    }

    const fn assumed(value: f64) -> Rate {
        Rate {
            value,
            measured: false,
        }
    }
}

/// What the latency model needs to know of a machine. GB are 10⁹ bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// The machine that the assumed values stand for.
    pub assumed_for: &'static str,
    /// The GPUs, which are all alike; `None` on a machine without.
    pub gpu: Option<GpuRates>,
    /// All cores of a node reading its memory in matrix-vector products.
    pub host_read_gbs: Rate,
    /// The links and cores of a node, all at work at once, where that was measured.
    pub together_gbs: Option<Rate>,
    /// Matrix products of all cores of a node.
    pub host_gemm_tflops: Rate,
    /// The model's files, all ranks of a node together.
    pub file_read_gbs: Rate,
    /// An all-reduce of a few KiB.
    pub all_reduce_us: Rate,
    /// What larger all-reduces add: bytes of the message per second.
    pub all_reduce_gbs: Rate,
}

/// How fast one GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GpuRates {
    /// Reading its own memory, as fast as a kernel that does nothing else.
    pub read_gbs: Rate,
    /// Matrix products.
    pub gemm_tflops: Rate,
    /// Pinned host memory to the GPU; every GPU has a link of its own.
    pub link_gbs: Rate,
}

/// An A100 of 40 GB with NVLink on PCIe 4: nine tenths of the data sheet's memory rate (1555 GB/s) and four fifths of its
/// bf16 rate (312 TFLOP/s); link, host and all-reduce as such servers commonly reach them.
pub const A100_40GB: Rates = Rates {
    assumed_for: "A100 40 GB, NVLink, PCIe 4",
    gpu: Some(GpuRates {
        read_gbs: Rate::assumed(1400.0),
        gemm_tflops: Rate::assumed(250.0),
        link_gbs: Rate::assumed(24.0),
    }),
    host_read_gbs: Rate::assumed(100.0),
    together_gbs: None,
    host_gemm_tflops: Rate::assumed(2.0),
    file_read_gbs: Rate::assumed(2.0),
    all_reduce_us: Rate::assumed(8.0),
    all_reduce_gbs: Rate::assumed(150.0),
};

/// An H100 of 80 GB with NVLink on PCIe 5 and a host with AMX: rounded figures of one such machine, which still makes
/// them assumptions on any other.
pub const H100_80GB: Rates = Rates {
    assumed_for: "H100 80 GB, NVLink, PCIe 5",
    gpu: Some(GpuRates {
        read_gbs: Rate::assumed(3050.0),
        gemm_tflops: Rate::assumed(650.0),
        link_gbs: Rate::assumed(55.0),
    }),
    ..H200
};

/// An H200 with NVLink on PCIe 5 and a host with AMX: rounded figures of one such machine.
pub const H200: Rates = Rates {
    assumed_for: "H200, NVLink, PCIe 5",
    gpu: Some(GpuRates {
        read_gbs: Rate::assumed(4400.0),
        gemm_tflops: Rate::assumed(700.0),
        link_gbs: Rate::assumed(55.0),
    }),
    host_read_gbs: Rate::assumed(130.0),
    together_gbs: None,
    host_gemm_tflops: Rate::assumed(9.0),
    file_read_gbs: Rate::assumed(2.0),
    all_reduce_us: Rate::assumed(5.0),
    all_reduce_gbs: Rate::assumed(250.0),
};

/// A machine without a GPU: a few cores on two memory channels, ranks that talk through TCP.
pub const SMALL_HOST: Rates = Rates {
    assumed_for: "a small CPU host",
    gpu: None,
    host_read_gbs: Rate::assumed(20.0),
    together_gbs: None,
    host_gemm_tflops: Rate::assumed(0.1),
    file_read_gbs: Rate::assumed(2.0),
    all_reduce_us: Rate::assumed(40.0),
    all_reduce_gbs: Rate::assumed(2.0),
};

impl Rates {
    /// The assumptions for a device of which nothing was measured; a GPU budget above 100 GB speaks for an H200, one above
    /// 60 GB for an H100.
    pub fn assumed(device: DeviceKind, gpu_memory: Option<u64>) -> Rates {
        let above = |limit: u64| gpu_memory.is_some_and(|bytes| bytes > limit);
        match device {
            DeviceKind::Cpu => SMALL_HOST,
            DeviceKind::Cuda if above(100_000_000_000) => H200,
            DeviceKind::Cuda if above(60_000_000_000) => H100_80GB,
            DeviceKind::Cuda => A100_40GB,
        }
    }

    /// The same host without its GPUs: ranks on its cores talk as those of any CPU host do.
    pub fn of_the_host(&self) -> Rates {
        Rates {
            gpu: None,
            all_reduce_us: SMALL_HOST.all_reduce_us,
            all_reduce_gbs: SMALL_HOST.all_reduce_gbs,
            ..*self
        }
    }

    /// The rates that matter on `device`, each with the words a table shows: what it is, and its unit.
    pub fn of(&self, device: DeviceKind) -> Vec<(&'static str, Rate, &'static str)> {
        let host = [
            ("host memory", self.host_read_gbs, "GB/s"),
            ("host products", self.host_gemm_tflops, "TFLOP/s"),
            ("all-reduce", self.all_reduce_us, "µs"),
            ("all-reduce", self.all_reduce_gbs, "GB/s"),
        ];
        let gpu = self.gpu.filter(|_| device == DeviceKind::Cuda).map(|gpu| {
            [
                ("GPU memory", gpu.read_gbs, "GB/s"),
                ("GPU products", gpu.gemm_tflops, "TFLOP/s"),
                ("link", gpu.link_gbs, "GB/s"),
                ("files", self.file_read_gbs, "GB/s"),
            ]
        });
        gpu.into_iter().flatten().chain(host).collect()
    }

    pub(super) fn validate(&self, device: DeviceKind) -> Result<()> {
        if device == DeviceKind::Cuda && self.gpu.is_none() {
            return Err(Error::failed("a plan for GPUs needs the rates of a GPU"));
        }
        let usable = |rate: Rate| rate.value.is_finite() && rate.value > 0.0;
        match self
            .of(device)
            .into_iter()
            .find(|(_, rate, _)| !usable(*rate))
        {
            None => Ok(()),
            Some((name, rate, unit)) => Err(Error::failed(format!(
                "the rate of {name} is {} {unit}: it must be above 0",
                rate.value
            ))),
        }
    }
}
