//! Large products by cublasLt, each shape's plan made once. All calls into the library are in this file.
//!
//! Prompts have every length, and the library takes 10 to 20 ms to choose an algorithm for a shape and to load its code. So
//! the choice is made for the next power of two of the rows and serves all row counts down to the one before; the start
//! makes it for every such class (`warm.rs`).
//!
//! Types and constants are cudarc's; the functions are looked up here, because cudarc searches the library by names that
//! a pip installation does not have.

use super::driver::{DevicePtr, Stream};
use super::gemm::{Gemm, Out, Product};
use super::libraries::{self, symbol};
use crate::{Error, Result};
use cudarc::cublaslt::sys::{self, cublasLtMatmulHeuristicResult_t as Heuristic};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr;

/// Scratch memory: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `CUBLAS_OP_T` of cublas_api.h.
const TRANSPOSED: u32 = 1;

type Status = u32;
const INVALID_VALUE: Status = 7;
const NOT_SUPPORTED: Status = 15;
type Handle = *mut c_void;

/// The functions of the library that are used.
#[derive(Clone, Copy)]
struct Api {
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    desc_create: unsafe extern "C" fn(*mut Handle, u32, u32) -> Status,
    desc_set: unsafe extern "C" fn(Handle, u32, *const c_void, usize) -> Status,
    layout_create: unsafe extern "C" fn(*mut Handle, u32, u64, u64, i64) -> Status,
    preference_create: unsafe extern "C" fn(*mut Handle) -> Status,
    preference_set: unsafe extern "C" fn(Handle, u32, *const c_void, usize) -> Status,
    #[allow(clippy::type_complexity, reason = "the library's own signature")]
    heuristic: unsafe extern "C" fn(
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> Status,
    #[allow(clippy::type_complexity, reason = "the library's own signature")]
    matmul: unsafe extern "C" fn(
        Handle,
        Handle,
        *const c_void,
        u64,
        Handle,
        u64,
        Handle,
        *const c_void,
        u64,
        Handle,
        u64,
        Handle,
        *const sys::cublasLtMatmulAlgo_t,
        u64,
        usize,
        u64,
    ) -> Status,
}

/// Rows of x, rows of w, columns of both, elements between rows of y, type of y.
type Shape = (usize, usize, usize, usize, Out);

/// The opened library, the plans made so far, and the algorithms by class of row counts.
pub struct CublasLt {
    api: Api,
    handle: Handle,
    plans: HashMap<Shape, Plan>,
    algorithms: HashMap<Shape, sys::cublasLtMatmulAlgo_t>,
}

/// The row count whose algorithm serves `m` rows.
fn class(m: usize) -> usize {
    m.next_power_of_two().max(16)
}

// SAFETY: the library allows its handle and descriptors on any thread, one at a time.
unsafe impl Send for CublasLt {}

/// All that a product of one shape needs; the descriptors live as long as the process.
#[derive(Clone, Copy)]
struct Plan {
    shape: Descriptors,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// A product's types and sizes, in the library's terms.
#[derive(Clone, Copy)]
struct Descriptors {
    desc: Handle,
    w: Handle,
    x: Handle,
    y: Handle,
}

impl CublasLt {
    /// Opens the library on the current device, whose context is current on this thread.
    ///
    /// # Errors
    /// It is missing (with the places searched), too old, or refuses the device.
    pub fn open() -> Result<CublasLt> {
        let lib = libraries::CUBLASLT.open()?;
        let what = libraries::CUBLASLT.what;
        // SAFETY: the types are those of cublasLt.h, with enumerations as 32-bit integers, pointers as such or as numbers.
        let api = unsafe {
            Api {
                create: symbol(lib, what, "cublasLtCreate")?,
                destroy: symbol(lib, what, "cublasLtDestroy")?,
                desc_create: symbol(lib, what, "cublasLtMatmulDescCreate")?,
                desc_set: symbol(lib, what, "cublasLtMatmulDescSetAttribute")?,
                layout_create: symbol(lib, what, "cublasLtMatrixLayoutCreate")?,
                preference_create: symbol(lib, what, "cublasLtMatmulPreferenceCreate")?,
                preference_set: symbol(lib, what, "cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: symbol(lib, what, "cublasLtMatmulAlgoGetHeuristic")?,
                matmul: symbol(lib, what, "cublasLtMatmul")?,
            }
        };
        let mut handle = ptr::null_mut();
        // SAFETY: an out-parameter.
        check("cublasLtCreate", unsafe { (api.create)(&mut handle) })?;
        Ok(CublasLt {
            api,
            handle,
            plans: HashMap::new(),
            algorithms: HashMap::new(),
        })
    }

    /// The plan of a product, made when there is none; the algorithm is that of its class of row counts, or its own.
    fn plan(&mut self, p: &Product, own: bool) -> Result<Plan> {
        let key = (p.m, p.n, p.k, p.ldy, p.out);
        if !own && let Some(plan) = self.plans.get(&key) {
            return Ok(*plan);
        }
        let plan = self.make_plan(p, own).map_err(|e| {
            Error::failed(format_args!(
                "{e} (product of {} x {} by {} x {})",
                p.m, p.k, p.k, p.n
            ))
        })?;
        self.plans.insert(key, plan);
        Ok(plan)
    }

    fn make_plan(&mut self, p: &Product, own: bool) -> Result<Plan> {
        let shape = self.describe(p)?;
        let m = if own { p.m } else { class(p.m) };
        let key = (m, p.n, p.k, p.ldy, p.out);
        if !own && let Some(&algorithm) = self.algorithms.get(&key) {
            return Ok(Plan { shape, algorithm });
        }
        let asked = self.describe(&Product { m, ..*p })?;
        let algorithm = self.choose(&asked)?;
        if !own {
            self.algorithms.insert(key, algorithm);
        }
        Ok(Plan { shape, algorithm })
    }

    /// The library is column-major: row-major y[m, n] is its yᵀ[n, m] = wᵀᵀ[n, k] · xᵀ[k, m].
    fn describe(&self, p: &Product) -> Result<Descriptors> {
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF as u32;
        let out = if p.out == Out::F32 {
            sys::cudaDataType_t::CUDA_R_32F as u32
        } else {
            bf16
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as u32;
        let scale = sys::cudaDataType_t::CUDA_R_32F as u32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as u32;
        let (m, n, k) = (p.m as u64, p.n as u64, p.k as u64);
        let api = &self.api;
        let layout = |kind, rows: u64, cols: u64, ld: usize| -> Result<Handle> {
            let mut made = ptr::null_mut();
            // SAFETY: an out-parameter.
            let code = unsafe { (api.layout_create)(&mut made, kind, rows, cols, ld as i64) };
            check("cublasLtMatrixLayoutCreate", code).map(|()| made)
        };
        let (w, x) = (layout(bf16, k, n, p.k)?, layout(bf16, k, m, p.k)?);
        let y = layout(out, n, m, p.ldy)?;
        let mut desc = ptr::null_mut();
        // SAFETY: out-parameters, live descriptors, attributes of the sizes that the library documents.
        unsafe {
            check(
                "cublasLtMatmulDescCreate",
                (api.desc_create)(&mut desc, compute, scale),
            )?;
            let set = (api.desc_set)(
                desc,
                attribute,
                ptr::from_ref(&TRANSPOSED).cast(),
                size_of::<u32>(),
            );
            check("cublasLtMatmulDescSetAttribute", set)?;
        }
        Ok(Descriptors { desc, w, x, y })
    }

    /// The library's best algorithm.
    fn choose(&self, d: &Descriptors) -> Result<sys::cublasLtMatmulAlgo_t> {
        let limit =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
                as u32;
        let api = &self.api;
        let mut preference = ptr::null_mut();
        let mut found = Heuristic {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let mut n_found = 0;
        // SAFETY: out-parameters, live descriptors, attributes of the sizes that the library documents.
        unsafe {
            check(
                "cublasLtMatmulPreferenceCreate",
                (api.preference_create)(&mut preference),
            )?;
            let most: u64 = WORKSPACE as u64;
            let set = (api.preference_set)(
                preference,
                limit,
                ptr::from_ref(&most).cast(),
                size_of::<u64>(),
            );
            check("cublasLtMatmulPreferenceSetAttribute", set)?;
            let code = (api.heuristic)(
                self.handle,
                d.desc,
                d.w,
                d.x,
                d.y,
                d.y,
                preference,
                1,
                &mut found,
                &mut n_found,
            );
            check("cublasLtMatmulAlgoGetHeuristic", code)?;
        }
        if n_found == 0 {
            return Err(Error::failed(
                "cublasLt knows no algorithm for this product",
            ));
        }
        Ok(found.algo)
    }

    /// Enqueues a product; the library's status.
    ///
    /// # Safety
    /// As for [`Gemm::matmul`].
    unsafe fn run(&self, plan: &Plan, p: &Product, workspace: DevicePtr, stream: Stream) -> Status {
        let (one, zero) = (1.0f32, 0.0f32);
        let (one, zero) = (ptr::from_ref(&one).cast(), ptr::from_ref(&zero).cast());
        let d = &plan.shape;
        // SAFETY: scalars live across the call; matrices and workspace are the caller's; descriptors live for ever.
        unsafe {
            (self.api.matmul)(
                self.handle,
                d.desc,
                one,
                p.w.0,
                d.w,
                p.x.0,
                d.x,
                zero,
                p.y.0,
                d.y,
                p.y.0,
                d.y,
                &plan.algorithm,
                workspace.0,
                WORKSPACE,
                stream.0,
            )
        }
    }
}

impl Gemm for CublasLt {
    fn workspace_bytes(&self) -> usize {
        WORKSPACE
    }

    unsafe fn matmul(&mut self, p: &Product, workspace: DevicePtr, stream: Stream) -> Result<()> {
        let plan = self.plan(p, false)?;
        // SAFETY: passed on to the caller.
        let mut code = unsafe { self.run(&plan, p, workspace, stream) };
        if matches!(code, INVALID_VALUE | NOT_SUPPORTED) {
            // The class's algorithm does not take this row count; nothing was enqueued.
            let plan = self.plan(p, true)?;
            // SAFETY: passed on to the caller.
            code = unsafe { self.run(&plan, p, workspace, stream) };
        }
        check("cublasLtMatmul", code)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once.
        unsafe { (self.api.destroy)(self.handle) };
    }
}

fn check(call: &str, code: Status) -> Result<()> {
    let what = match code {
        0 => return Ok(()),
        1 => "not initialized",
        3 => "out of memory",
        INVALID_VALUE => "invalid value",
        8 => "the device's architecture is not supported",
        13 => "the GPU failed to run it",
        14 => "internal error",
        NOT_SUPPORTED => "not supported",
        _ => "unknown error",
    };
    Err(Error::failed(format_args!(
        "{call}: {what} (status {code})"
    )))
}
