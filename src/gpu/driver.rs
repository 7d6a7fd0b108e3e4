//! All that the GPU path asks of a driver, as one small interface.
//!
//! Two things implement it: the CUDA driver (`cuda.rs`) and a stand-in that runs the same kernels on the CPU
//! (`standin`), so that everything above this line is tested where there is no GPU. Handles are plain numbers;
//! `memory.rs` wraps those that own something.

use super::kernels::Source;
use crate::Result;

/// An address in device memory, or of pinned host memory as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

/// An ordered queue of device work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(pub u64);

/// A point in a stream that others can wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Event(pub u64);

/// A compiled kernel on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Function(pub u64);

/// Recorded work, ready to be launched again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// A handle of device memory that another process on the same host can open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

/// What the device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// E.g. `NVIDIA H200`.
    pub name: String,
    /// Identifies the device whatever its index in a process is.
    pub uuid: [u8; 16],
    /// Compute capability, e.g. `(9, 0)`.
    pub compute: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Device memory, in bytes.
    pub total_memory: u64,
    /// Largest dynamic shared memory of a block that opts in, in bytes.
    pub max_shared: u32,
    /// Second-level cache, in bytes.
    pub l2_bytes: u64,
}

/// Free and total device memory, in bytes, all processes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not allocated by anybody.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// How the host uses pinned memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pinned {
    /// The CPU writes and reads it.
    Cached,
    /// The CPU only ever writes it, front to back: reading it back is slow beyond use.
    WriteCombined,
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
}

impl Launch {
    /// `grid` blocks of `block` threads, without dynamic shared memory.
    pub fn linear(grid: usize, block: u32) -> Launch {
        Launch {
            grid: [grid as u32, 1, 1],
            block: [block, 1, 1],
            shared: 0,
        }
    }

    /// The launch rule of `norm.cu` and `all_reduce.cu`: a block for each row, a thread for eight elements of it.
    pub fn norm(rows: usize, hidden: usize) -> Launch {
        Launch::linear(rows, (hidden / 8).next_multiple_of(32).min(1024) as u32)
    }
}

/// One kernel argument: the low bytes hold a pointer, an integer or a float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arg(pub u64);

impl From<DevicePtr> for Arg {
    fn from(p: DevicePtr) -> Arg {
        Arg(p.0)
    }
}

impl From<u32> for Arg {
    fn from(x: u32) -> Arg {
        Arg(x.into())
    }
}

impl From<i32> for Arg {
    fn from(x: i32) -> Arg {
        Arg(x as u32 as u64)
    }
}

/// A count; the kernels take them as 32-bit integers.
impl From<usize> for Arg {
    fn from(x: usize) -> Arg {
        debug_assert!(i32::try_from(x).is_ok(), "{x} is no count of a kernel");
        Arg(x as u64)
    }
}

impl From<u64> for Arg {
    fn from(x: u64) -> Arg {
        Arg(x)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg(x.to_bits().into())
    }
}

/// Kernel arguments of mixed types, as `[Arg; N]`.
macro_rules! args {
    ($($x:expr),* $(,)?) => { [$($crate::gpu::driver::Arg::from($x)),*] };
}
pub(crate) use args;

/// One device of one process.
///
/// Work is enqueued on streams and may run at any later time; whatever it touches must stay as it is until the stream
/// has been synchronized, which is why those calls are unsafe. A call may be made from any thread.
///
/// # Errors
/// Every call may fail, also with the failure of earlier work on the device; the message names the call, what it was
/// asked for and the limit that it met. After a lost device every further call fails.
pub trait Driver: Send + Sync {
    /// What the device is.
    fn properties(&self) -> &Properties;
    /// Free and total memory, now.
    fn memory(&self) -> Result<MemoryInfo>;
    /// Waits for everything that was enqueued on any stream.
    fn synchronize_device(&self) -> Result<()>;

    /// Allocates `bytes` of device memory at a multiple of 256; the contents are undefined.
    fn alloc(&self, bytes: usize) -> Result<DevicePtr>;
    /// Returns memory of [`Driver::alloc`].
    ///
    /// # Safety
    /// Not yet returned, and no work that uses it is pending.
    unsafe fn free(&self, ptr: DevicePtr) -> Result<()>;
    /// Allocates `bytes` of page-locked host memory; the device can read and write it at the same address.
    fn alloc_pinned(&self, bytes: usize, kind: Pinned) -> Result<*mut u8>;
    /// Returns memory of [`Driver::alloc_pinned`].
    ///
    /// # Safety
    /// Not yet returned, and no work that uses it is pending.
    unsafe fn free_pinned(&self, ptr: *mut u8) -> Result<()>;

    /// Locks host memory of the caller's, so that the device can read and write it at the same address.
    ///
    /// # Safety
    /// The range stays mapped until [`Driver::unpin`].
    unsafe fn pin(&self, ptr: *mut u8, bytes: usize) -> Result<()>;
    /// Ends [`Driver::pin`].
    ///
    /// # Safety
    /// Pinned, and no work that uses it is pending.
    unsafe fn unpin(&self, ptr: *mut u8) -> Result<()>;

    /// A new stream; it does not wait for any other.
    fn create_stream(&self) -> Result<Stream>;
    /// Whether everything enqueued on `stream` is done; does not wait.
    fn is_idle(&self, stream: Stream) -> Result<bool>;
    /// Waits for everything enqueued on `stream`.
    fn synchronize(&self, stream: Stream) -> Result<()>;
    /// Ends a stream once its work is done.
    fn destroy_stream(&self, stream: Stream) -> Result<()>;

    /// A new event, already complete; only events made with `timing` can be passed to [`Driver::elapsed_ms`].
    fn create_event(&self, timing: bool) -> Result<Event>;
    /// The event completes when everything enqueued on `stream` so far has.
    fn record(&self, event: Event, stream: Stream) -> Result<()>;
    /// Later work on `stream` waits for what `event` last recorded.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;
    /// Whether what `event` last recorded is done; does not wait.
    fn is_complete(&self, event: Event) -> Result<bool>;
    /// The calling thread waits for what `event` last recorded.
    fn synchronize_event(&self, event: Event) -> Result<()>;
    /// Milliseconds on the device from one completed event to another.
    fn elapsed_ms(&self, from: Event, to: Event) -> Result<f32>;
    /// Ends an event.
    fn destroy_event(&self, event: Event) -> Result<()>;

    /// Copies `bytes` from pinned host memory to the device.
    ///
    /// # Safety
    /// Both ranges are valid, and unchanged by others, until the stream is synchronized.
    unsafe fn upload(
        &self,
        dst: DevicePtr,
        src: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;
    /// Copies `bytes` from the device to pinned host memory.
    ///
    /// # Safety
    /// Both ranges are valid, and not used by others, until the stream is synchronized.
    unsafe fn download(
        &self,
        dst: *mut u8,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;
    /// Copies `bytes` within the device, or to and from imported memory.
    ///
    /// # Safety
    /// Both ranges are valid until the stream is synchronized.
    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;
    /// Sets `bytes` to `value`.
    ///
    /// # Safety
    /// The range is valid until the stream is synchronized.
    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: usize, stream: Stream) -> Result<()>;

    /// Compiles `sources` on many threads, so that asking for their kernels takes no time afterwards.
    fn prepare(&self, sources: &[&'static Source]) -> Result<()> {
        let _ = sources;
        Ok(())
    }
    /// The kernel `name` of `source`, compiled for this device.
    fn function(&self, source: &'static Source, name: &str) -> Result<Function>;
    /// Runs a kernel.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, order and size, and what they point to is valid until the stream
    /// is synchronized.
    unsafe fn launch(
        &self,
        function: Function,
        launch: &Launch,
        args: &[Arg],
        stream: Stream,
    ) -> Result<()>;

    /// From here on, work enqueued on `stream`, and on streams that wait for it, is recorded and not run.
    fn begin_capture(&self, stream: Stream) -> Result<()>;
    /// Ends the recording; streams that joined it must have been waited for by `stream`.
    fn end_capture(&self, stream: Stream) -> Result<Graph>;
    /// Runs the recorded work.
    ///
    /// # Safety
    /// As for everything that was recorded.
    unsafe fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()>;
    /// Ends a graph; it is not running.
    fn destroy_graph(&self, graph: Graph) -> Result<()>;

    /// Later work on `stream` waits until the 32-bit value at `ptr` is at least `value` (cyclic comparison).
    ///
    /// # Safety
    /// `ptr` is valid and a multiple of 4, until the stream is synchronized.
    unsafe fn wait_value(&self, stream: Stream, ptr: DevicePtr, value: u32) -> Result<()>;
    /// Writes the 32-bit `value` to `ptr` after all earlier work on `stream`.
    ///
    /// # Safety
    /// `ptr` is valid and a multiple of 4, until the stream is synchronized.
    unsafe fn write_value(&self, stream: Stream, ptr: DevicePtr, value: u32) -> Result<()>;

    /// A handle of the allocation that begins at `ptr`, for another process.
    fn export(&self, ptr: DevicePtr) -> Result<IpcHandle>;
    /// Maps another process's allocation; peer access is switched on.
    fn import(&self, handle: &IpcHandle) -> Result<DevicePtr>;
    /// Ends a mapping.
    ///
    /// # Safety
    /// `ptr` came from [`Driver::import`] and no work that uses it is pending.
    unsafe fn close_import(&self, ptr: DevicePtr) -> Result<()>;
}
