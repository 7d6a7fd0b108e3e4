//! Products with a weight matrix, by the kernel or the library that suits the number of rows.

use super::backend::GpuBackend;
use super::driver::{DevicePtr, args};
use super::gemm::{Out, Product};
use super::launch::Kernels;
use super::load::GpuWeight;
use crate::Result;

/// Up to this many rows a product is a GEMV of our own; beyond, the library's.
pub(super) const GEMV_ROWS: usize = 8;

impl GpuBackend {
    /// `y[m, n] = x[m, k] · wᵀ` in bf16, by the kernel or the library that suits `m`.
    pub(super) fn product(
        &mut self,
        x: DevicePtr,
        w: &GpuWeight,
        y: DevicePtr,
        m: usize,
        out: Out,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.cols);
        if n == 0 || self.idle() {
            return Ok(());
        }
        if k == 0 {
            // A rank that holds no head or no feature adds nothing to the sum.
            let bytes = m * n * if out == Out::F32 { 4 } else { 2 };
            // SAFETY: the buffers of a step are as long as the plan's longest step, which `begin` has checked.
            return unsafe { self.driver.fill(y, 0, bytes, self.stream) };
        }
        if m <= GEMV_ROWS {
            return self.kernels.gemv(self.stream, out, w, x, y, m);
        }
        let p = Product {
            x,
            w: w.ptr,
            y,
            m,
            n,
            k,
            out,
        };
        // SAFETY: as above; the weights live as long as the backend.
        unsafe { self.gemm.matmul(&p, self.workspace, self.stream) }
    }

    /// `mlp = silu(h · gateᵀ) ⊙ (h · upᵀ)` of the rows at hand.
    pub(super) fn gated(
        &mut self,
        h: DevicePtr,
        gate_up: &GpuWeight,
        mlp: DevicePtr,
    ) -> Result<()> {
        let (t, inter) = (self.rows, self.g.padded_inter);
        if inter == 0 {
            return Ok(());
        }
        if t <= GEMV_ROWS {
            let k = self.g.hidden;
            let args = args![gate_up.ptr, h, mlp, t, inter, k, k, inter];
            let launch = self.kernels.gemv_launch(inter.div_ceil(8), k);
            return self.launch(self.kernels.gemv_gate_up_silu, &launch, &args);
        }
        self.product(h, gate_up, self.product, t, Out::Bf16)?;
        let args = args![self.product, mlp, inter];
        self.launch(self.kernels.silu_mul, &Kernels::elements(inter, t), &args)
    }
}
