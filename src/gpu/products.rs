//! Products with a weight matrix, by the kernel or the library that suits the number of rows; where a part of the matrix is
//! not on the device, together with the host.

use super::backend::GpuBackend;
use super::driver::{DevicePtr, Launch, args};
use super::gemm::{Out, Product};
use super::launch::Kernels;
use super::load::GpuWeight;
use super::offload::{HostShare, Offload, TIMEOUT_MS};
use crate::Result;

/// Up to this many rows a product is a GEMV of our own; beyond, the library's.
pub(super) const GEMV_ROWS: usize = 8;
/// Blocks that fetch the host's share.
const FETCHING: usize = 32;

/// What a product ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// bf16
    Bf16,
    /// f32
    F32,
    /// bf16, silu(gate) · up
    Gated,
}

/// Where a product goes: columns from `y` on of rows of `ld` elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub y: DevicePtr,
    pub ld: usize,
    pub form: Form,
}

impl Target {
    /// The columns from `column` on.
    fn at_column(self, column: usize) -> Target {
        let size = if self.form == Form::F32 { 4 } else { 2 };
        Target {
            y: self.y.offset(column * size),
            ..self
        }
    }
}

/// Rows of a matrix that lie together; a unit of a gated one is a feature.
#[derive(Debug, Clone, Copy)]
struct Rows {
    w: DevicePtr,
    units: usize,
    k: usize,
    /// Of a gated matrix: 8 gate rows and their 8 up rows in turn, as in host memory.
    tiled: bool,
}

impl GpuBackend {
    /// `y[m, n] = x[m, k] · wᵀ`, or the gated product.
    pub(super) fn product(
        &mut self,
        x: DevicePtr,
        w: &GpuWeight,
        m: usize,
        to: Target,
    ) -> Result<()> {
        if self.graphs.has_launched() {
            return Ok(());
        }
        if let Some(part) = w.host
            && let Some(mut offload) = self.offload.take()
        {
            let done = self.shared_product(&mut offload, part, x, w, m, to);
            self.offload = Some(offload);
            return done;
        }
        self.resident_product(x, w, m, to)
    }

    fn resident_product(
        &mut self,
        x: DevicePtr,
        w: &GpuWeight,
        m: usize,
        to: Target,
    ) -> Result<()> {
        let rows = Rows {
            w: w.ptr,
            units: w.resident,
            k: w.cols,
            tiled: false,
        };
        self.multiply(x, rows, m, to)
    }

    /// GPU, link and cores at once: the cores begin first and are waited for last.
    fn shared_product(
        &mut self,
        offload: &mut Offload,
        part: usize,
        x: DevicePtr,
        w: &GpuWeight,
        m: usize,
        to: Target,
    ) -> Result<()> {
        let gated = offload.part(part).gated;
        // Rows that nobody reads are not computed, but what was brought for them is passed over all the same.
        let wanted = !self.idle();
        if wanted && let Some((share, ..)) = offload.share_of(part) {
            self.hand_over(share, part, x, m, w.cols)?;
        }
        if wanted {
            self.resident_product(x, w, m, to)?;
        }
        while let Some((t, w)) = offload.arrive(part)? {
            let rows = Rows {
                w,
                units: t.units,
                k: offload.part(part).k,
                tiled: gated,
            };
            if wanted {
                self.multiply(x, rows, m, to.at_column(t.unit))?;
            }
            offload.used()?;
        }
        if wanted && let Some((share, first, units)) = offload.share_of(part) {
            self.take_back(share, m, units, to.at_column(first))?;
        }
        Ok(())
    }

    fn hand_over(
        &self,
        share: &HostShare,
        part: usize,
        x: DevicePtr,
        m: usize,
        k: usize,
    ) -> Result<()> {
        let [host_x, request, state] = share.request();
        let args = args![x, host_x, request, state, part, m, k];
        let launch = Launch::linear((m * k).div_ceil(8 * 256).min(FETCHING), 256);
        self.launch(self.kernels.hand_over, &launch, &args)
    }

    fn take_back(&self, share: &HostShare, m: usize, units: usize, to: Target) -> Result<()> {
        let [host_y, answer, lost, state] = share.answer();
        let args = args![
            host_y, answer, lost, state, to.y, m, units, to.ld, TIMEOUT_MS
        ];
        let launch = Launch::linear((m * units).div_ceil(256).min(FETCHING), 256);
        let kernel = match to.form {
            Form::Bf16 => self.kernels.take_back_bf16,
            Form::F32 => self.kernels.take_back_f32,
            Form::Gated => self.kernels.take_back_gated,
        };
        self.launch(kernel, &launch, &args)
    }

    /// The product with rows that are on the device.
    fn multiply(&mut self, x: DevicePtr, w: Rows, m: usize, to: Target) -> Result<()> {
        if w.units == 0 || self.idle() {
            return Ok(());
        }
        if w.k == 0 {
            // A rank that holds no head or no feature adds nothing to the sum.
            let bytes = m * to.ld * if to.form == Form::F32 { 4 } else { 2 };
            // SAFETY: the buffers of a step are as long as the plan's longest step, which `begin` has checked.
            return unsafe { self.driver.fill(to.y, 0, bytes, self.stream) };
        }
        match (m <= GEMV_ROWS, to.form) {
            (true, _) => self.gemv(x, w, m, to),
            (false, Form::Gated) => {
                let both = Target {
                    y: self.product,
                    ld: 2 * w.units,
                    form: Form::Bf16,
                };
                self.gemm(x, w, 2 * w.units, m, both)?;
                let run = if w.tiled { 8 } else { w.units };
                let args = args![self.product, to.y, w.units, to.ld, run];
                let launch = Kernels::elements(w.units, m);
                self.launch(self.kernels.silu_mul, &launch, &args)
            }
            (false, _) => self.gemm(x, w, w.units, m, to),
        }
    }

    fn gemv(&self, x: DevicePtr, w: Rows, m: usize, to: Target) -> Result<()> {
        let (k, units, no_bias) = (w.k, w.units, DevicePtr(0));
        let tiles = match to.form {
            Form::Gated => units.div_ceil(8),
            _ => units.div_ceil(16),
        };
        let (gemv, launch) = self.kernels.gemv(m, tiles, k);
        if to.form != Form::Gated {
            let args = args![w.w, x, no_bias, to.y, m, units, k, k, to.ld];
            let kernel = if to.form == Form::F32 {
                gemv.f32
            } else {
                gemv.bf16
            };
            return self.launch(kernel, &launch, &args);
        }
        let args = args![w.w, x, to.y, m, units, k, k, to.ld];
        if w.tiled {
            let launch = self.kernels.gemv_launch(tiles, k);
            return self.launch(self.kernels.gemv_gate_up_silu_tiled, &launch, &args);
        }
        self.launch(gemv.gate_up_silu, &launch, &args)
    }

    fn gemm(&mut self, x: DevicePtr, w: Rows, n: usize, m: usize, to: Target) -> Result<()> {
        let out = if to.form == Form::F32 {
            Out::F32
        } else {
            Out::Bf16
        };
        let p = Product {
            x,
            w: w.w,
            y: to.y,
            m,
            n,
            k: w.k,
            ldy: to.ld,
            out,
        };
        // SAFETY: the buffers of a step are as long as the plan's longest step; the weights live as long as the backend, and
        // what arrived over the link stays until `Offload::used`.
        unsafe { self.gemm.matmul(&p, self.workspace, self.stream) }
    }
}
