//! What needs NVIDIA's libraries or a GPU: ignored unless asked for by name.
//!
//!     TANDEM_NVRTC=/folder/of/libnvrtc cargo test --release --lib nvrtc_ -- --ignored
//!     cargo test --release --lib gpu_ -- --ignored --test-threads 1

use super::super::cache::Cache;
use super::super::cuda::{self, Cuda};
use super::super::driver::{Driver, IpcHandle, Launch, Pinned, args};
use super::super::kernels::{self, Compiler, HEADERS, OPTIONS, SOURCES};
use super::super::memory::{DeviceBuffer, OwnedEvent, PinnedBuffer};
use super::super::nvrtc::Nvrtc;
use super::*;

/// Every architecture that the kernels are meant for.
const ARCHS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"];

fn nvrtc() -> Nvrtc {
    let folder =
        std::env::var_os("TANDEM_NVRTC").expect("TANDEM_NVRTC: the folder of libnvrtc.so.*");
    Nvrtc::open_in(&[PathBuf::from(folder)]).unwrap()
}

#[test]
#[ignore = "needs TANDEM_NVRTC, the folder of libnvrtc.so.*"]
fn nvrtc_compiles_every_kernel() {
    let nvrtc = nvrtc();
    println!("NVRTC {:?}", nvrtc.version().unwrap());
    for arch in ARCHS {
        let arch = format!("--gpu-architecture={arch}");
        let options: Vec<String> = std::iter::once(arch)
            .chain(OPTIONS.iter().map(|o| o.to_string()))
            .collect();
        for source in SOURCES {
            let cubin = nvrtc.compile(source, HEADERS, &options).unwrap();
            assert!(
                cubin.starts_with(b"\x7fELF"),
                "{} for {options:?}",
                source.name
            );
        }
    }
}

#[test]
#[ignore = "needs TANDEM_NVRTC, the folder of libnvrtc.so.*"]
fn nvrtc_says_where_a_source_is_wrong() {
    let nvrtc = nvrtc();
    let broken = kernels::Source {
        name: "broken",
        text: "\n__device__ int f() { return nothing; }",
    };
    let e = nvrtc
        .compile(&broken, HEADERS, &["--gpu-architecture=sm_80".into()])
        .unwrap_err()
        .to_string();
    assert!(e.contains("broken.cu(2)") && e.contains("nothing"), "{e}");
    let e = nvrtc
        .compile(SOURCES[0], HEADERS, &["--gpu-architecture=sm_12345".into()])
        .unwrap_err()
        .to_string();
    assert!(e.contains("sm_12345"), "{e}");
}

#[test]
#[ignore = "needs TANDEM_NVRTC, the folder of libnvrtc.so.*"]
fn nvrtc_is_not_needed_once_the_cache_is_filled() {
    // Once it is open, it is found by its name.
    nvrtc();
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let made = kernels::build(&["sm_80".into()], &cache).unwrap();
    assert_eq!(made, SOURCES.len());
    let compiler = Compiler::new("sm_80".into(), Some(cache.clone()));
    for source in SOURCES {
        assert!(compiler.cubin(source).unwrap().starts_with(b"\x7fELF"));
    }
    assert!(!compiler.has_opened_nvrtc());
}

/// Without NVIDIA's software every entry is one clear line; on a machine with a GPU there is nothing to see here.
#[test]
fn missing_libraries_are_errors_and_no_panics() {
    if cuda::device_count().is_ok() {
        return;
    }
    let errors = [
        Cuda::open(0, None).err(),
        super::super::cublaslt::CublasLt::open().err(),
        super::super::nccl::Library::open().err(),
        Nvrtc::open().err(),
    ];
    for (error, what) in errors
        .into_iter()
        .zip(["the CUDA driver", "cublasLt", "NCCL", "NVRTC"])
    {
        let Some(e) = error.map(|e| e.to_string()) else {
            continue;
        };
        println!("{e}");
        assert!(e.starts_with(&format!("{what} is missing: no lib")), "{e}");
        assert!(
            e.contains("in the loader's path") && !e.contains('\n'),
            "{e}"
        );
    }
}

fn gpu() -> Arc<dyn Driver> {
    Arc::new(Cuda::open(0, Cache::of_user()).unwrap())
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_properties_and_errors_are_in_words() {
    let driver = gpu();
    println!("{:?} {:?}", driver.properties(), driver.memory().unwrap());
    let p = driver.properties();
    assert!(p.sm_count > 0 && p.compute >= (8, 0) && p.uuid != [0; 16]);
    let e = driver.alloc(1 << 50).unwrap_err().to_string();
    println!("{e}");
    assert!(
        e.contains("cuMemAlloc") && e.contains("1125899906842624 bytes wanted"),
        "{e}"
    );
    let many = cuda::device_count().unwrap();
    let e = Cuda::open(many, None).err().unwrap().to_string();
    assert!(
        e.contains(&format!("GPU {many}: this process sees {many}")),
        "{e}"
    );
    let e = driver
        .function(&kernels::NORM, "rms_morn")
        .unwrap_err()
        .to_string();
    assert!(e.contains("rms_morn"), "{e}");
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_memory_copies_streams_events_and_graphs() {
    let driver = gpu();
    let (a, b) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    let n = 64 << 20;
    let x = DeviceBuffer::new(&driver, n, "x").unwrap();
    let y = DeviceBuffer::new(&driver, n, "y").unwrap();
    let mut host = PinnedBuffer::new(&driver, n, Pinned::Cached, "host").unwrap();
    host.as_mut_slice()
        .iter_mut()
        .enumerate()
        .for_each(|(i, v)| *v = (i * 7 % 251) as u8);
    let want = host.as_slice().to_vec();
    let (from, to) = (
        OwnedEvent::new(&driver, true).unwrap(),
        OwnedEvent::new(&driver, true).unwrap(),
    );
    from.record(a).unwrap();
    host.upload(0..n, &x, 0, a).unwrap();
    to.record(a).unwrap();
    let event = driver.create_event(false).unwrap();
    driver.record(event, a).unwrap();
    driver.wait(b, event).unwrap();
    // SAFETY: inside the buffers, which outlive the streams' work.
    unsafe { driver.copy(y.ptr(), x.ptr(), n, b) }.unwrap();
    driver.synchronize(b).unwrap();
    println!(
        "upload: {:.1} GB/s",
        n as f32 / to.ms_since(&from).unwrap() / 1e6
    );
    host.as_mut_slice().fill(0);
    host.download(0..n, &y, 0, b).unwrap();
    driver.synchronize(b).unwrap();
    assert!(host.as_slice() == want);

    let (forked, joined) = (
        driver.create_event(false).unwrap(),
        driver.create_event(false).unwrap(),
    );
    // SAFETY: as above.
    let graph = unsafe {
        driver.begin_capture(a).unwrap();
        driver.record(forked, a).unwrap();
        driver.wait(b, forked).unwrap();
        driver.fill(x.ptr(), 2, n, b).unwrap();
        driver.record(joined, b).unwrap();
        driver.wait(a, joined).unwrap();
        driver.copy(y.ptr(), x.ptr(), n, a).unwrap();
        driver.end_capture(a).unwrap()
    };
    for _ in 0..3 {
        // SAFETY: as recorded.
        unsafe {
            driver.fill(x.ptr(), 9, n, a).unwrap();
            driver.launch_graph(graph, a).unwrap();
        }
        host.download(0..n, &y, 0, a).unwrap();
        driver.synchronize(a).unwrap();
        assert!(host.as_slice().iter().all(|&v| v == 2));
    }
    driver.destroy_graph(graph).unwrap();

    // SAFETY: as above.
    unsafe {
        driver.fill(x.ptr(), 0, 4, a).unwrap();
        driver.synchronize(a).unwrap();
        driver.wait_value(b, x.ptr(), 5).unwrap();
        driver.fill(y.ptr(), 1, 4, b).unwrap();
        assert!(!driver.is_idle(b).unwrap());
        driver.write_value(a, x.ptr(), 5).unwrap();
    }
    driver.synchronize_device().unwrap();
    assert!(driver.is_idle(b).unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_norm_kernel_launches() {
    let driver = gpu();
    let stream = driver.create_stream().unwrap();
    let (rows, hidden, eps) = (5usize, 3584usize, 1e-6f32);
    let x: Vec<f32> = (0..rows * hidden)
        .map(|i| (i as f32 * 0.37).sin())
        .collect();
    let weight: Vec<half::bf16> = (0..hidden)
        .map(|i| half::bf16::from_f32(0.5 + (i % 64) as f32 / 64.0))
        .collect();
    let bytes = [
        bytemuck::cast_slice::<_, u8>(&x),
        bytemuck::cast_slice(&weight),
    ]
    .concat();
    let mut host = PinnedBuffer::new(&driver, bytes.len(), Pinned::Cached, "host").unwrap();
    host.as_mut_slice().copy_from_slice(&bytes);
    let dx = DeviceBuffer::new(&driver, bytes.len(), "x").unwrap();
    let dh = DeviceBuffer::new(&driver, rows * hidden * 2, "h").unwrap();
    // Nothing is added.
    let dp = DeviceBuffer::new(&driver, rows * hidden * 2, "partial").unwrap();
    // SAFETY: inside the buffer, which outlives the stream's work.
    unsafe { driver.fill(dp.ptr(), 0, dp.bytes(), stream) }.unwrap();
    host.upload(0..bytes.len(), &dx, 0, stream).unwrap();
    let f = driver.function(&kernels::NORM, "add_rms_norm").unwrap();
    let args = args![
        dp.ptr(),
        dx.ptr(),
        dx.ptr().offset(x.len() * 4),
        dh.ptr(),
        hidden,
        eps
    ];
    // SAFETY: the parameters of norm.cu; the buffers outlive the stream's work.
    unsafe { driver.launch(f, &Launch::linear(rows, 448), &args, stream) }.unwrap();
    host.download(0..rows * hidden * 2, &dh, 0, stream).unwrap();
    driver.synchronize(stream).unwrap();
    let got: &[half::bf16] = bytemuck::cast_slice(&host.as_slice()[..rows * hidden * 2]);
    for r in 0..rows {
        let row = &x[r * hidden..][..hidden];
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / hidden as f64;
        for i in 0..hidden {
            let want = f64::from(row[i]) / (mean + f64::from(eps)).sqrt() * weight[i].to_f64();
            // One rounding to bf16 (8 significant bits) moves a value by 2^-8 of it at most; f32's own are far below.
            assert!(
                (got[r * hidden + i].to_f64() - want).abs() <= want.abs() / 255.0 + 1e-6,
                "{r} {i}"
            );
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_golden_models() {
    for name in golden_names() {
        let dir = models().join(&name);
        let golden = Golden::open(&dir);
        let parts = Parts::cuda(Cuda::open(0, Cache::of_user()).unwrap(), None, 0).unwrap();
        let mut rank = Rank::load(&dir, 1, 0, parts, LIMITS).unwrap();
        let outcome = both_prompts(&mut rank, &golden).unwrap();
        check_prompts(&name, &outcome, &golden);
        assert!(
            both_prompts(&mut rank, &golden).unwrap() == outcome,
            "{name}: a second run differs"
        );
    }
}

/// A child process maps this one's memory, reads it and writes to it.
#[test]
#[ignore = "needs a GPU"]
fn gpu_memory_is_shared_between_processes() {
    const HANDLE: &str = "TANDEM_TEST_IPC_HANDLE";
    let driver = gpu();
    let stream = driver.create_stream().unwrap();
    let n = 2 << 20;
    let mut host = PinnedBuffer::new(&driver, n, Pinned::Cached, "host").unwrap();
    let mine = DeviceBuffer::new(&driver, n, "mine").unwrap();
    if let Ok(hex) = std::env::var(HANDLE) {
        let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        let theirs = driver
            .import(&IpcHandle(std::array::from_fn(byte)))
            .unwrap();
        // SAFETY: both ranges are `n` long and outlive the stream's work.
        unsafe {
            driver.copy(mine.ptr(), theirs, n, stream).unwrap();
            driver.fill(theirs, 4, n, stream).unwrap();
        }
        host.download(0..n, &mine, 0, stream).unwrap();
        driver.synchronize(stream).unwrap();
        assert!(host.as_slice().iter().all(|&v| v == 3));
        // SAFETY: nothing uses it any more.
        return unsafe { driver.close_import(theirs) }.unwrap();
    }
    // SAFETY: inside the buffer, which outlives the stream's work.
    unsafe { driver.fill(mine.ptr(), 3, n, stream) }.unwrap();
    driver.synchronize(stream).unwrap();
    let hex: String = driver
        .export(mine.ptr())
        .unwrap()
        .0
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let name = "gpu_memory_is_shared_between_processes";
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let status = child
        .args(["--ignored", name, "--nocapture"])
        .env(HANDLE, hex)
        .status()
        .unwrap();
    assert!(status.success());
    host.download(0..n, &mine, 0, stream).unwrap();
    driver.synchronize(stream).unwrap();
    assert!(host.as_slice().iter().all(|&v| v == 4));
}
