//! The CUDA driver behind [`Driver`]: every raw call of the GPU path to it is in this file.
//!
//! The bindings are cudarc's, used without its safe layer: that one allocates from pools, whose memory other processes
//! cannot map, and records events behind its user's back, which graphs do not survive. Handles are the driver's pointers
//! as numbers.

use super::cache::Cache;
use super::driver::{
    Arg, DevicePtr, Driver, Event, Function, Graph, IpcHandle, Launch, MemoryInfo, Pinned,
    Properties, Stream,
};
use super::kernels::{Compiler, Source, architecture, side_by_side};
use super::libraries;
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// The oldest driver interface that the calls below exist in.
const OLDEST: c_int = 12000;

/// One CUDA device, in its primary context.
pub struct Cuda {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    properties: Properties,
    /// Kernels may begin before the one in front has ended (from compute capability 9.0 on).
    overlap: bool,
    compiler: Compiler,
    modules: Mutex<HashMap<&'static str, Module>>,
}

/// A loaded cubin.
#[derive(Clone, Copy)]
struct Module(sys::CUmodule);

// SAFETY: handles of the driver may be used from any thread; `enter` makes the context current on each.
unsafe impl Send for Cuda {}
// SAFETY: as above; what changes is behind mutexes.
unsafe impl Sync for Cuda {}

thread_local! {
    /// The context that this thread has made current.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Devices that this process may use.
///
/// # Errors
/// There is no driver, or one that is too old.
pub fn device_count() -> Result<usize> {
    initialize()?;
    let mut n = 0;
    // SAFETY: an out-parameter.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut n) })?;
    Ok(n as usize)
}

fn initialize() -> Result<()> {
    // cudarc panics where the library is missing; once it is open, its own search finds it by its name. The driver belongs
    // to the machine: it is never anywhere but in the loader's path.
    libraries::DRIVER.open_in(&[])?;
    let mut version = 0;
    // SAFETY: an out-parameter; may be called before anything else.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    if version < OLDEST {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::failed(format_args!(
            "the NVIDIA driver supports CUDA {major}.{minor}; 12.0 or later is needed: update the driver or use --device cpu"
        )));
    }
    // SAFETY: no precondition.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(|e| {
        Error::failed(format_args!(
            "{e}; CUDA_VISIBLE_DEVICES may hide the GPUs, and --device cpu runs without"
        ))
    })
}

impl Cuda {
    /// Opens device `ordinal` of those that this process sees; compiled kernels are kept in `cache`.
    ///
    /// # Errors
    /// No driver, an old driver, no such device, or one older than compute capability 8.0.
    pub fn open(ordinal: usize, cache: Option<Cache>) -> Result<Cuda> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::failed(format_args!(
                "GPU {ordinal}: this process sees {count} (numbered from 0; CUDA_VISIBLE_DEVICES may hide some)"
            )));
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: out-parameters; the ordinal was checked.
        unsafe {
            check(
                "cuDeviceGet",
                sys::cuDeviceGet(&mut device, ordinal as c_int),
            )?;
            let properties = properties(device)?;
            if properties.compute < (8, 0) {
                let ((major, minor), name) = (properties.compute, properties.name);
                return Err(Error::failed(format_args!(
                    "GPU {ordinal} ({name}) has compute capability {major}.{minor}; the kernels need 8.0 or later"
                )));
            }
            check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
            )
            .map_err(|e| {
                let name = &properties.name;
                Error::failed(format_args!(
                    "GPU {ordinal} ({name}) has no room for this process: {e}; nvidia-smi shows who else uses it"
                ))
            })?;
            let compiler = Compiler::new(architecture(properties.compute), cache);
            let overlap = properties.compute >= (9, 0);
            Ok(Cuda {
                ordinal,
                device,
                context,
                properties,
                overlap,
                compiler,
                modules: Mutex::default(),
            })
        }
    }

    /// Index among the devices that this process sees.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Switches the overlap of a kernel's start with the end of the one in front; on where the device can.
    pub fn set_overlap(&mut self, on: bool) {
        self.overlap = on && self.properties.compute >= (9, 0);
    }

    /// Makes the context current on this thread.
    fn enter(&self) -> Result<()> {
        if CURRENT.get() != self.context as usize {
            // SAFETY: a live context.
            self.check("cuCtxSetCurrent", unsafe {
                sys::cuCtxSetCurrent(self.context)
            })?;
            CURRENT.set(self.context as usize);
        }
        Ok(())
    }

    fn check(&self, call: &str, code: CUresult) -> Result<()> {
        check(call, code).map_err(|e| Error::failed(format_args!("GPU {}: {e}", self.ordinal)))
    }

    /// Enters the context and makes a call.
    fn call(&self, name: &str, call: impl FnOnce() -> CUresult) -> Result<()> {
        self.enter()?;
        self.check(name, call())
    }

    fn module(&self, source: &'static Source) -> Result<sys::CUmodule> {
        let modules = || self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules().get(source.name) {
            return Ok(module.0);
        }
        // Others may compile meanwhile.
        let cubin = self.compiler.cubin(source)?;
        let mut modules = modules();
        if let Some(module) = modules.get(source.name) {
            return Ok(module.0);
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole cubin (the cache checks it), alive across the call.
        self.call("cuModuleLoadData", || unsafe {
            sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast())
        })?;
        modules.insert(source.name, Module(module));
        Ok(module)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`. What is left in the context goes with the process.
        let code = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        if let Err(e) = self.check("cuDevicePrimaryCtxRelease", code) {
            tracing::debug!("{e}");
        }
        CURRENT.set(0);
    }
}

/// The device's name, size and abilities.
///
/// # Safety
/// `device` is one of the driver's.
unsafe fn properties(device: sys::CUdevice) -> Result<Properties> {
    let get = |what: Attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: an out-parameter and a device of the driver's.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, what, device)
        })?;
        Ok(value as u32)
    };
    let mut name = [0u8; 256];
    let mut uuid = MaybeUninit::<sys::CUuuid>::zeroed();
    let mut total = 0;
    // SAFETY: out-parameters of the sizes given.
    let uuid = unsafe {
        check(
            "cuDeviceGetName",
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device),
        )?;
        check(
            "cuDeviceGetUuid",
            sys::cuDeviceGetUuid_v2(uuid.as_mut_ptr(), device),
        )?;
        check(
            "cuDeviceTotalMem",
            sys::cuDeviceTotalMem_v2(&mut total, device),
        )?;
        uuid.assume_init()
    };
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "?".into(), CStr::to_string_lossy);
    Ok(Properties {
        name: name.into_owned(),
        uuid: uuid.bytes.map(|b| b as u8),
        compute: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sm_count: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        total_memory: total as u64,
        max_shared: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: get(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
    })
}

/// What the driver says of a code, in its own words.
fn check(call: &str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: an out-parameter, which becomes a constant string or stays null.
        unsafe {
            let known = get(code, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", code as u32));
    let what = text(sys::cuGetErrorString).unwrap_or_default();
    Err(Error::failed(format_args!("{call}: {what} ({name})")))
}

fn stream(s: Stream) -> sys::CUstream {
    s.0 as sys::CUstream
}

fn event(e: Event) -> sys::CUevent {
    e.0 as sys::CUevent
}

impl Driver for Cuda {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: out-parameters.
        self.call("cuMemGetInfo", || unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok(MemoryInfo {
            free: free as u64,
            total: total as u64,
        })
    }

    fn synchronize_device(&self) -> Result<()> {
        // SAFETY: no precondition but a current context.
        self.call("cuCtxSynchronize", || unsafe { sys::cuCtxSynchronize() })
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        let mut ptr = 0;
        // SAFETY: an out-parameter.
        let made = self.call("cuMemAlloc", || unsafe {
            sys::cuMemAlloc_v2(&mut ptr, bytes)
        });
        made.map(|()| DevicePtr(ptr)).map_err(|e| {
            let left = self
                .memory()
                .map_or_else(|_| "?".into(), |m| format!("{} of {}", m.free, m.total));
            Error::failed(format_args!(
                "{e}: {bytes} bytes wanted, {left} bytes are free"
            ))
        })
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemFree", || unsafe { sys::cuMemFree_v2(ptr.0) })
    }

    fn alloc_pinned(&self, bytes: usize, kind: Pinned) -> Result<*mut u8> {
        let combined = if kind == Pinned::WriteCombined {
            sys::CU_MEMHOSTALLOC_WRITECOMBINED
        } else {
            0
        };
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP | combined;
        let mut ptr: *mut c_void = std::ptr::null_mut();
        // SAFETY: an out-parameter.
        let made = self.call("cuMemHostAlloc", || unsafe {
            sys::cuMemHostAlloc(&mut ptr, bytes, flags)
        });
        made.map(|()| ptr.cast())
            .map_err(|e| Error::failed(format_args!("{e}: {bytes} bytes of pinned memory wanted")))
    }

    unsafe fn free_pinned(&self, ptr: *mut u8) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemFreeHost", || unsafe {
            sys::cuMemFreeHost(ptr.cast())
        })
    }

    unsafe fn pin(&self, ptr: *mut u8, bytes: usize) -> Result<()> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: passed on to the caller.
        let done = self.call("cuMemHostRegister", || unsafe {
            sys::cuMemHostRegister_v2(ptr.cast(), bytes, flags)
        });
        done.map_err(|e| Error::failed(format_args!("{e}: {bytes} bytes to lock")))
    }

    unsafe fn unpin(&self, ptr: *mut u8) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemHostUnregister", || unsafe {
            sys::cuMemHostUnregister(ptr.cast())
        })
    }

    fn create_stream(&self) -> Result<Stream> {
        let mut made = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: an out-parameter.
        self.call("cuStreamCreate", || unsafe {
            sys::cuStreamCreate(&mut made, flags)
        })?;
        Ok(Stream(made as u64))
    }

    fn is_idle(&self, s: Stream) -> Result<bool> {
        self.enter()?;
        // SAFETY: a stream of this device's.
        match unsafe { sys::cuStreamQuery(stream(s)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => self.check("cuStreamQuery", code).map(|()| true),
        }
    }

    fn synchronize(&self, s: Stream) -> Result<()> {
        // SAFETY: a stream of this device's.
        self.call("cuStreamSynchronize", || unsafe {
            sys::cuStreamSynchronize(stream(s))
        })
    }

    fn destroy_stream(&self, s: Stream) -> Result<()> {
        // SAFETY: a stream of this device's; the driver ends it when its work is done.
        self.call("cuStreamDestroy", || unsafe {
            sys::cuStreamDestroy_v2(stream(s))
        })
    }

    fn create_event(&self, timing: bool) -> Result<Event> {
        let mut made = std::ptr::null_mut();
        let quiet = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: an out-parameter.
        self.call("cuEventCreate", || unsafe {
            sys::cuEventCreate(&mut made, if timing { 0 } else { quiet })
        })?;
        Ok(Event(made as u64))
    }

    fn record(&self, e: Event, s: Stream) -> Result<()> {
        // SAFETY: handles of this device's.
        self.call("cuEventRecord", || unsafe {
            sys::cuEventRecord(event(e), stream(s))
        })
    }

    fn wait(&self, s: Stream, e: Event) -> Result<()> {
        // SAFETY: handles of this device's.
        self.call("cuStreamWaitEvent", || unsafe {
            sys::cuStreamWaitEvent(stream(s), event(e), 0)
        })
    }

    fn is_complete(&self, e: Event) -> Result<bool> {
        self.enter()?;
        // SAFETY: an event of this device's.
        match unsafe { sys::cuEventQuery(event(e)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => self.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn synchronize_event(&self, e: Event) -> Result<()> {
        // SAFETY: an event of this device's.
        self.call("cuEventSynchronize", || unsafe {
            sys::cuEventSynchronize(event(e))
        })
    }

    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32> {
        let mut ms = 0.0;
        // SAFETY: an out-parameter and events of this device's.
        self.call("cuEventElapsedTime", || unsafe {
            sys::cuEventElapsedTime(&mut ms, event(from), event(to))
        })?;
        Ok(ms)
    }

    fn destroy_event(&self, e: Event) -> Result<()> {
        // SAFETY: an event of this device's.
        self.call("cuEventDestroy", || unsafe {
            sys::cuEventDestroy_v2(event(e))
        })
    }

    unsafe fn upload(&self, dst: DevicePtr, src: *const u8, bytes: usize, s: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemcpyHtoDAsync", || unsafe {
            sys::cuMemcpyHtoDAsync_v2(dst.0, src.cast(), bytes, stream(s))
        })
    }

    unsafe fn download(&self, dst: *mut u8, src: DevicePtr, bytes: usize, s: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(dst.cast(), src.0, bytes, stream(s))
        })
    }

    unsafe fn copy(&self, dst: DevicePtr, src: DevicePtr, bytes: usize, s: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemcpyDtoDAsync", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(dst.0, src.0, bytes, stream(s))
        })
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, s: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuMemsetD8Async", || unsafe {
            sys::cuMemsetD8Async(dst.0, value, bytes, stream(s))
        })
    }

    fn prepare(&self, sources: &[&'static Source]) -> Result<()> {
        side_by_side(sources, |source| self.module(source).map(|_| ()))
    }

    fn function(&self, source: &'static Source, name: &str) -> Result<Function> {
        let module = self.module(source)?;
        let c_name =
            CString::new(name).map_err(|_| Error::failed("a kernel's name holds a NUL"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: an out-parameter, a loaded module, a NUL-terminated name.
        let found = self.call("cuModuleGetFunction", || unsafe {
            sys::cuModuleGetFunction(&mut function, module, c_name.as_ptr())
        });
        found
            .map_err(|e| Error::failed(format_args!("{e}: kernel {name} of {}.cu", source.name)))?;
        allow_shared(self, function)?;
        Ok(Function(function as u64))
    }

    unsafe fn launch(&self, f: Function, launch: &Launch, args: &[Arg], s: Stream) -> Result<()> {
        let mut values: Vec<u64> = args.iter().map(|a| a.0).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|v| (v as *mut u64).cast()).collect();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: launch.shared,
            hStream: stream(s),
            attrs: &mut attribute,
            numAttrs: u32::from(self.overlap),
        };
        let function = f.0 as sys::CUfunction;
        let (params, extra) = (pointers.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: all that is pointed to outlives the call, which copies it; the rest is the caller's.
        let done = self.call("cuLaunchKernelEx", || unsafe {
            sys::cuLaunchKernelEx(&config, function, params, extra)
        });
        done.map_err(|e| {
            Error::failed(format_args!(
                "{e}: grid {:?}, block {:?}",
                launch.grid, launch.block
            ))
        })
    }

    fn begin_capture(&self, s: Stream) -> Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this device's.
        self.call("cuStreamBeginCapture", || unsafe {
            sys::cuStreamBeginCapture_v2(stream(s), mode)
        })
    }

    fn end_capture(&self, s: Stream) -> Result<Graph> {
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: out-parameters; the recorded graph is not needed once it is instantiated.
        unsafe {
            self.call("cuStreamEndCapture", || {
                sys::cuStreamEndCapture(stream(s), &mut graph)
            })?;
            let made = self.call("cuGraphInstantiate", || {
                sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0)
            });
            self.call("cuGraphDestroy", || sys::cuGraphDestroy(graph))?;
            made?;
            // Without this the first launch would allocate.
            self.call("cuGraphUpload", || sys::cuGraphUpload(exec, stream(s)))?;
        }
        Ok(Graph(exec as u64))
    }

    unsafe fn launch_graph(&self, graph: Graph, s: Stream) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuGraphLaunch", || unsafe {
            sys::cuGraphLaunch(graph.0 as sys::CUgraphExec, stream(s))
        })
    }

    fn destroy_graph(&self, graph: Graph) -> Result<()> {
        // SAFETY: a graph of this device's.
        self.call("cuGraphExecDestroy", || unsafe {
            sys::cuGraphExecDestroy(graph.0 as sys::CUgraphExec)
        })
    }

    unsafe fn wait_value(&self, s: Stream, ptr: DevicePtr, value: u32) -> Result<()> {
        let at_least = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: passed on to the caller.
        self.call("cuStreamWaitValue32", || unsafe {
            sys::cuStreamWaitValue32_v2(stream(s), ptr.0, value, at_least)
        })
    }

    unsafe fn write_value(&self, s: Stream, ptr: DevicePtr, value: u32) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuStreamWriteValue32", || unsafe {
            sys::cuStreamWriteValue32_v2(stream(s), ptr.0, value, 0)
        })
    }

    fn export(&self, ptr: DevicePtr) -> Result<IpcHandle> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: an out-parameter.
        self.call("cuIpcGetMemHandle", || unsafe {
            sys::cuIpcGetMemHandle(&mut handle, ptr.0)
        })?;
        Ok(IpcHandle(handle.reserved.map(|b| b as u8)))
    }

    fn import(&self, handle: &IpcHandle) -> Result<DevicePtr> {
        let handle = sys::CUipcMemHandle {
            reserved: handle.0.map(|b| b as c_char),
        };
        let peers = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut ptr = 0;
        // SAFETY: an out-parameter; the driver refuses a handle that is none.
        self.call("cuIpcOpenMemHandle", || unsafe {
            sys::cuIpcOpenMemHandle_v2(&mut ptr, handle, peers)
        })?;
        Ok(DevicePtr(ptr))
    }

    unsafe fn close_import(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: passed on to the caller.
        self.call("cuIpcCloseMemHandle", || unsafe {
            sys::cuIpcCloseMemHandle(ptr.0)
        })
    }
}

/// Lets a kernel have all the dynamic shared memory that its static arrays leave.
fn allow_shared(cuda: &Cuda, function: sys::CUfunction) -> Result<()> {
    use sys::CUfunction_attribute as A;
    let mut fixed = 0;
    // SAFETY: an out-parameter and a function of a loaded module.
    cuda.call("cuFuncGetAttribute", || unsafe {
        sys::cuFuncGetAttribute(&mut fixed, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    })?;
    let most = cuda.properties.max_shared as c_int - fixed;
    // SAFETY: a function of a loaded module.
    cuda.call("cuFuncSetAttribute", || unsafe {
        sys::cuFuncSetAttribute(
            function,
            A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            most,
        )
    })
}
