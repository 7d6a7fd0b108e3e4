//! A GPU for tests: the driver's interface on the CPU, the same kernels compiled for the host.
//!
//! It does what a real driver will not: fresh memory is poisoned, every address is checked, guard zones lie around every
//! allocation, streams run as late and in as odd an order as their promises allow, and faults come when they are asked
//! for. It is compiled for tests only.

mod compiler;
mod memory;
mod queue;
#[cfg(test)]
mod tests;

pub use compiler::Edit;
pub use memory::{Memory, POISON};
pub use queue::HostWork;

use super::cache::Cache;
use super::driver::{
    Arg, DevicePtr, Driver, Event, Function, Graph, IpcHandle, Launch, MemoryInfo, Pinned,
    Properties, Stream,
};
use super::kernels::Source;
use crate::{Error, Result};
use compiler::{Kernel, Module};
use memory::Kind;
use queue::{Execute, Op, Queues};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the stand-in should be and do; counts begin at 1.
#[derive(Debug, Clone)]
pub struct Options {
    /// Draws the order of streams, blocks and threads.
    pub seed: u64,
    /// Which device of its host it is.
    pub ordinal: u32,
    /// Compute capability, by which some kernels are chosen; 9.0 unless said.
    pub compute: (u32, u32),
    /// Device memory, in bytes.
    pub total_memory: u64,
    /// The allocation, of device or pinned memory, that is refused.
    pub refuse_alloc: Option<u64>,
    /// The copy that fails.
    pub fail_copy: Option<u64>,
    /// The launch at which the device is lost.
    pub lose_device_at_launch: Option<u64>,
    /// How long a stream waits for a value that another device should write.
    pub patience: Duration,
    /// A change to the kernels.
    pub edit: Option<Edit>,
    /// Where compiled kernels are kept.
    pub cache: Cache,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            seed: 1,
            ordinal: 0,
            compute: (9, 0),
            total_memory: 8 << 30,
            refuse_alloc: None,
            fail_copy: None,
            lose_device_at_launch: None,
            // The emulation is slow, and the machine that runs it may be busy.
            patience: Duration::from_secs(60),
            edit: None,
            cache: Cache::of_user()
                .unwrap_or_else(|| Cache::at(std::env::temp_dir().join("tandem"))),
        }
    }
}

/// The stand-in for one device.
pub struct Standin {
    properties: Properties,
    state: Mutex<State>,
}

struct State {
    queues: Queues,
    device: Device,
}

/// What operations act on.
struct Device {
    options: Options,
    memory: Memory,
    modules: HashMap<&'static str, Arc<Module>>,
    kernels: Vec<Arc<Kernel>>,
    counts: Counts,
    seeds: u64,
    lost: Option<Error>,
    misuses: Vec<String>,
}

#[derive(Default)]
struct Counts {
    allocs: u64,
    copies: u64,
    launches: u64,
}

impl Standin {
    /// A device as `options` describe it.
    pub fn new(options: Options) -> Standin {
        let mut uuid = *b"tandem stand-in\0";
        uuid[15] = options.ordinal as u8;
        let properties = Properties {
            name: "stand-in".into(),
            uuid,
            compute: options.compute,
            sm_count: 4,
            total_memory: options.total_memory,
            max_shared: 227 << 10,
            l2_bytes: 1 << 20,
        };
        let queues = Queues::new(options.seed, options.patience);
        let device = Device {
            memory: Memory::new(options.total_memory),
            modules: HashMap::new(),
            kernels: Vec::new(),
            counts: Counts::default(),
            seeds: options.seed,
            lost: None,
            misuses: Vec::new(),
            options,
        };
        Standin {
            properties,
            state: Mutex::new(State { queues, device }),
        }
    }

    /// Enqueues work of the host that stands for a device library's, `what` for its errors; it is ordered, recorded and
    /// replayed like a kernel.
    ///
    /// # Errors
    /// Those of any call on the driver.
    pub fn enqueue_host(&self, what: &'static str, work: HostWork, stream: Stream) -> Result<()> {
        self.submit(what, stream, Op::Host { what, work })
    }

    /// How long anything on the device waits for another device.
    pub fn patience(&self) -> Duration {
        self.lock().device.options.patience
    }

    /// How many launches the device has run, and how many allocations and copies were asked of it.
    pub fn counts(&self) -> (u64, u64, u64) {
        let counts = &self.lock().device.counts;
        (counts.launches, counts.allocs, counts.copies)
    }

    /// What was returned that was not to be returned, or not yet; owners only log it.
    pub fn misuses(&self) -> Vec<String> {
        self.lock().device.misuses.clone()
    }

    /// How many graphs there are.
    pub fn graphs(&self) -> usize {
        self.lock().queues.graphs()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` unless the device is lost; errors name the call.
    fn call<T>(&self, call: &str, f: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        let outcome = match &state.device.lost {
            Some(e) => Err(e.clone()),
            None => f(&mut state),
        };
        if state.device.lost.is_some() {
            // Work may hold what other ranks take for a sign of life: the sending end of a channel.
            state.queues.clear();
        }
        outcome.map_err(|e| {
            Error::failed(format_args!(
                "GPU {} (stand-in): {call}: {e}",
                state.device.options.ordinal
            ))
        })
    }

    /// Appends to a stream; one time in four something that is ready runs right away.
    fn submit(&self, call: &str, stream: Stream, op: Op) -> Result<()> {
        self.call(call, |s| {
            s.queues.enqueue(stream.0, op)?;
            if s.queues.random().is_multiple_of(4) {
                s.queues.run_one(&mut s.device)?;
            }
            Ok(())
        })
    }

    fn wait_for(
        &self,
        call: &str,
        run: impl FnOnce(&mut Queues, &mut Device) -> Result<()>,
    ) -> Result<()> {
        self.call(call, |s| {
            if s.queues.capturing() {
                return Err(Error::failed(
                    "the host must not wait while work is recorded",
                ));
            }
            run(&mut s.queues, &mut s.device)?;
            s.device.memory.check_all_guards()
        })
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        let state = self.lock();
        let ranges: Vec<_> = state.device.memory.ranges().collect();
        for module in state.device.modules.values() {
            ranges.iter().for_each(|r| module.unregister(r.0));
        }
    }
}

impl Device {
    fn alloc(&mut self, bytes: usize, kind: Kind) -> Result<u64> {
        self.counts.allocs += 1;
        let (n, free, total) = (
            self.counts.allocs,
            self.memory.free_bytes(),
            self.options.total_memory,
        );
        let refused = self.options.refuse_alloc == Some(n);
        let memory = if refused {
            Err(Error::failed("out of memory"))
        } else {
            self.memory.alloc(bytes, kind)
        };
        let of = |e| match kind {
            Kind::Device => Error::failed(format_args!(
                "{bytes} bytes: {e}; {free} of {total} bytes are free"
            )),
            _ => Error::failed(format_args!("{bytes} bytes: {e}")),
        };
        let ptr = memory.map_err(of)?;
        self.modules
            .values()
            .for_each(|m| m.register((ptr, ptr + bytes as u64)));
        Ok(ptr)
    }

    fn pin(&mut self, ptr: u64, bytes: usize) -> Result<()> {
        self.counts.allocs += 1;
        if self.options.refuse_alloc == Some(self.counts.allocs) {
            return Err(Error::failed(format_args!("{bytes} bytes: not permitted")));
        }
        self.memory.lock(ptr, bytes)?;
        self.modules
            .values()
            .for_each(|m| m.register((ptr, ptr + bytes as u64)));
        Ok(())
    }

    fn free(&mut self, ptr: u64, kind: Kind) -> Result<()> {
        self.modules.values().for_each(|m| m.unregister(ptr));
        let freed = self.memory.free(ptr, kind);
        freed.inspect_err(|e| self.misuses.push(e.to_string()))
    }

    fn module(&mut self, source: &'static Source) -> Result<Arc<Module>> {
        if let Some(module) = self.modules.get(source.name) {
            return Ok(module.clone());
        }
        let module = Module::load(source, &self.options.cache, self.options.edit.as_ref())?;
        self.memory.ranges().for_each(|r| module.register(r));
        self.modules.insert(source.name, module.clone());
        Ok(module)
    }

    fn copy(&mut self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        self.counts.copies += 1;
        if self.options.fail_copy == Some(self.counts.copies) {
            return Err(self.lose("a copy failed (injected)"));
        }
        self.memory.copy(dst, src, bytes)
    }

    fn launch(&mut self, kernel: &Kernel, launch: &Launch, args: &[u64]) -> Result<()> {
        self.counts.launches += 1;
        if self.options.lose_device_at_launch == Some(self.counts.launches) {
            return Err(self.lose("the device is lost (injected)"));
        }
        self.seeds = self
            .seeds
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(1);
        // SAFETY: the arguments are as the caller of `Driver::launch` has promised.
        unsafe { kernel.run(launch, args, self.seeds) }
    }

    fn lose(&mut self, why: &str) -> Error {
        let e = Error::failed(why);
        self.lost = Some(e.clone());
        e
    }
}

impl Execute for Device {
    fn execute(&mut self, op: &Op) -> Result<()> {
        let outcome = match op {
            Op::Copy { dst, src, bytes } => self.copy(*dst, *src, *bytes),
            Op::Fill { dst, value, bytes } => self.memory.fill(*dst, *value, *bytes),
            Op::Launch {
                kernel,
                launch,
                args,
            } => self.launch(kernel, launch, args),
            Op::WriteValue { ptr, value } => self.memory.store(*ptr, *value),
            Op::Host { what, work } => {
                work(&mut self.memory).map_err(|e| Error::failed(format_args!("{what}: {e}")))
            }
            Op::Record { .. } | Op::Wait { .. } | Op::WaitValue { .. } | Op::Graph { .. } => Ok(()),
        };
        // As on a real device, a fault in enqueued work is the end of it.
        outcome.inspect_err(|e| {
            self.lost.get_or_insert(e.clone());
        })
    }

    fn value_at(&self, ptr: u64) -> Result<u32> {
        self.memory.load(ptr)
    }
}

impl Driver for Standin {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.call("memory", |s| {
            Ok(MemoryInfo {
                free: s.device.memory.free_bytes(),
                total: s.device.options.total_memory,
            })
        })
    }

    fn synchronize_device(&self) -> Result<()> {
        self.wait_for("synchronize", |q, d| q.run_stream(None, d))
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        self.call("alloc", |s| {
            s.device.alloc(bytes, Kind::Device).map(DevicePtr)
        })
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        self.call("free", |s| s.device.free(ptr.0, Kind::Device))
    }

    fn alloc_pinned(&self, bytes: usize, _: Pinned) -> Result<*mut u8> {
        self.call("alloc_pinned", |s| {
            s.device.alloc(bytes, Kind::Pinned).map(|p| p as *mut u8)
        })
    }

    unsafe fn free_pinned(&self, ptr: *mut u8) -> Result<()> {
        self.call("free_pinned", |s| s.device.free(ptr as u64, Kind::Pinned))
    }

    unsafe fn pin(&self, ptr: *mut u8, bytes: usize) -> Result<()> {
        self.call("pin", |s| s.device.pin(ptr as u64, bytes))
    }

    unsafe fn unpin(&self, ptr: *mut u8) -> Result<()> {
        self.call("unpin", |s| s.device.free(ptr as u64, Kind::Locked))
    }

    fn create_stream(&self) -> Result<Stream> {
        self.call("create_stream", |s| Ok(Stream(s.queues.create_stream())))
    }

    fn is_idle(&self, stream: Stream) -> Result<bool> {
        // Whoever asks again and again sees progress.
        self.call("is_idle", |s| {
            s.queues.run_one(&mut s.device)?;
            s.queues.is_empty(stream.0)
        })
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.wait_for("synchronize", |q, d| q.run_stream(Some(stream.0), d))
    }

    fn destroy_stream(&self, stream: Stream) -> Result<()> {
        self.call("destroy_stream", |s| {
            s.queues.run_stream(Some(stream.0), &mut s.device)?;
            s.queues.destroy_stream(stream.0)
        })
    }

    fn create_event(&self, _: bool) -> Result<Event> {
        self.call("create_event", |s| Ok(Event(s.queues.create_event())))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.call("record", |s| s.queues.record(event.0, stream.0))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.call("wait", |s| s.queues.wait(stream.0, event.0))
    }

    fn is_complete(&self, event: Event) -> Result<bool> {
        // Whoever asks again and again sees progress.
        self.call("is_complete", |s| {
            s.queues.run_one(&mut s.device)?;
            s.queues.is_complete(event.0)
        })
    }

    fn synchronize_event(&self, event: Event) -> Result<()> {
        self.wait_for("synchronize_event", |q, d| q.run_event(event.0, d))
    }

    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32> {
        self.call("elapsed_ms", |s| s.queues.elapsed_ms(from.0, to.0))
    }

    fn destroy_event(&self, event: Event) -> Result<()> {
        self.call("destroy_event", |s| s.queues.destroy_event(event.0))
    }

    unsafe fn upload(
        &self,
        dst: DevicePtr,
        src: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        self.submit(
            "upload",
            stream,
            Op::Copy {
                dst: dst.0,
                src: src as u64,
                bytes,
            },
        )
    }

    unsafe fn download(
        &self,
        dst: *mut u8,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        self.submit(
            "download",
            stream,
            Op::Copy {
                dst: dst as u64,
                src: src.0,
                bytes,
            },
        )
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        self.submit(
            "copy",
            stream,
            Op::Copy {
                dst: dst.0,
                src: src.0,
                bytes,
            },
        )
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<()> {
        self.submit(
            "fill",
            stream,
            Op::Fill {
                dst: dst.0,
                value,
                bytes,
            },
        )
    }

    fn function(&self, source: &'static Source, name: &str) -> Result<Function> {
        self.call("function", |s| {
            let kernel = s.device.module(source)?.kernel(name)?;
            s.device.kernels.push(Arc::new(kernel));
            Ok(Function(s.device.kernels.len() as u64 - 1))
        })
    }

    unsafe fn launch(
        &self,
        function: Function,
        launch: &Launch,
        args: &[Arg],
        stream: Stream,
    ) -> Result<()> {
        let kernel = self.call("launch", |s| {
            let kernel = s.device.kernels.get(function.0 as usize).cloned();
            kernel.ok_or_else(|| Error::failed("invalid handle: no such function"))
        })?;
        let args = args.iter().map(|a| a.0).collect();
        self.submit(
            "launch",
            stream,
            Op::Launch {
                kernel,
                launch: *launch,
                args,
            },
        )
    }

    fn begin_capture(&self, stream: Stream) -> Result<()> {
        self.call("begin_capture", |s| s.queues.begin_capture(stream.0))
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph> {
        self.call("end_capture", |s| s.queues.end_capture(stream.0).map(Graph))
    }

    unsafe fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()> {
        self.call("launch_graph", |s| s.queues.launch_graph(graph.0, stream.0))
    }

    fn destroy_graph(&self, graph: Graph) -> Result<()> {
        self.call("destroy_graph", |s| s.queues.destroy_graph(graph.0))
    }

    unsafe fn wait_value(&self, stream: Stream, ptr: DevicePtr, value: u32) -> Result<()> {
        self.submit("wait_value", stream, Op::WaitValue { ptr: ptr.0, value })
    }

    unsafe fn write_value(&self, stream: Stream, ptr: DevicePtr, value: u32) -> Result<()> {
        self.submit("write_value", stream, Op::WriteValue { ptr: ptr.0, value })
    }

    fn export(&self, ptr: DevicePtr) -> Result<IpcHandle> {
        self.call("export", |s| s.device.memory.export(ptr.0))
    }

    fn import(&self, handle: &IpcHandle) -> Result<DevicePtr> {
        self.call("import", |s| {
            let (begin, bytes) = s.device.memory.import(handle)?;
            s.device
                .modules
                .values()
                .for_each(|m| m.register((begin, begin + bytes as u64)));
            Ok(DevicePtr(begin))
        })
    }

    unsafe fn close_import(&self, ptr: DevicePtr) -> Result<()> {
        self.call("close_import", |s| s.device.free(ptr.0, Kind::Imported))
    }
}
