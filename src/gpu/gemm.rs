//! Large matrix products: cublasLt on a GPU, plain loops on the stand-in.

use super::driver::{DevicePtr, Stream};
use crate::Result;

/// Element type of a product's result; sums are in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Out {
    /// Rounded once.
    Bf16,
    /// As summed.
    F32,
}

/// `y = x · wᵀ` with x `[m, k]` and w `[n, k]` in bf16, row-major without gaps, and y `[m, n]` in rows of `ldy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// `[m, k]`
    pub x: DevicePtr,
    /// `[n, k]`
    pub w: DevicePtr,
    /// `[m, n]`
    pub y: DevicePtr,
    /// Rows of x.
    pub m: usize,
    /// Rows of w.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// Elements from a row of y to the next.
    pub ldy: usize,
    /// Type of y.
    pub out: Out,
}

/// A library of large products.
pub trait Gemm: Send {
    /// Scratch memory that [`Gemm::matmul`] is given, in bytes.
    fn workspace_bytes(&self) -> usize;

    /// Enqueues a product.
    ///
    /// # Safety
    /// The three matrices and `workspace` are valid until the stream is synchronized.
    ///
    /// # Errors
    /// Those of the library.
    unsafe fn matmul(&mut self, p: &Product, workspace: DevicePtr, stream: Stream) -> Result<()>;
}

/// The stand-in's: f32 sums in the order of k.
#[cfg(test)]
pub struct HostGemm(pub std::sync::Arc<super::standin::Standin>);

#[cfg(test)]
impl Gemm for HostGemm {
    fn workspace_bytes(&self) -> usize {
        0
    }

    unsafe fn matmul(&mut self, p: &Product, _: DevicePtr, stream: Stream) -> Result<()> {
        use half::bf16;
        let p = *p;
        let work = move |memory: &mut super::standin::Memory| {
            let floats = |v: Vec<bf16>| v.into_iter().map(bf16::to_f32).collect::<Vec<_>>();
            let (x, w) = (
                floats(memory.read(p.x.0, p.m * p.k)?),
                floats(memory.read(p.w.0, p.n * p.k)?),
            );
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            for (i, x) in x.chunks_exact(p.k).enumerate() {
                let y = w.chunks_exact(p.k).map(|w| dot(x, w));
                let at = |size: usize| p.y.offset(i * p.ldy * size).0;
                match p.out {
                    Out::F32 => memory.write(at(4), &y.collect::<Vec<f32>>())?,
                    Out::Bf16 => memory.write(at(2), &y.map(bf16::from_f32).collect::<Vec<_>>())?,
                }
            }
            Ok(())
        };
        self.0
            .enqueue_host("gemm", std::sync::Arc::new(work), stream)
    }
}
