//! Every promise of the driver's interface, and every fault, on the stand-in.

use super::*;
use crate::gpu::driver::args;
use crate::gpu::kernels::NORM;
use crate::gpu::memory::{DeviceBuffer, PinnedBuffer};

fn device(options: Options) -> (Arc<Standin>, Arc<dyn Driver>) {
    let standin = Arc::new(Standin::new(options));
    (standin.clone(), standin)
}

fn pinned(driver: &Arc<dyn Driver>, bytes: &[u8]) -> PinnedBuffer {
    let mut buffer = PinnedBuffer::new(driver, bytes.len(), Pinned::Cached, "test").unwrap();
    buffer.as_mut_slice().copy_from_slice(bytes);
    buffer
}

fn buffer(driver: &Arc<dyn Driver>, bytes: usize) -> DeviceBuffer {
    DeviceBuffer::new(driver, bytes, "test").unwrap()
}

fn read(driver: &Arc<dyn Driver>, from: &DeviceBuffer, stream: Stream) -> Vec<u8> {
    let mut out = pinned(driver, &vec![0; from.bytes()]);
    out.download(0..from.bytes(), from, 0, stream).unwrap();
    driver.synchronize(stream).unwrap();
    out.as_slice().to_vec()
}

/// Seeds enough that an order which is wrong one time in four is met.
const SEEDS: u64 = 40;

#[test]
fn fresh_memory_is_poisoned() {
    let (_, driver) = device(Options::default());
    let stream = driver.create_stream().unwrap();
    let fresh = buffer(&driver, 1000);
    assert!(read(&driver, &fresh, stream).iter().all(|&b| b == POISON));
    let floats = read(&driver, &fresh, stream);
    assert!(f32::from_le_bytes(floats[..4].try_into().unwrap()).is_nan());
    assert!(half::bf16::from_le_bytes([floats[0], floats[1]]).is_nan());
}

#[test]
fn copies_past_an_allocation_are_caught() {
    for (dst_at, bytes) in [(0, 65), (1, 64), (100_000, 1)] {
        let (_, driver) = device(Options::default());
        let stream = driver.create_stream().unwrap();
        let (from, to) = (pinned(&driver, &[7; 128]), buffer(&driver, 64));
        // SAFETY: wrong on purpose; the stand-in checks before it touches anything.
        let enqueued = unsafe {
            driver.upload(
                to.ptr().offset(dst_at),
                from.as_slice().as_ptr(),
                bytes,
                stream,
            )
        };
        let e = enqueued
            .and_then(|()| driver.synchronize(stream))
            .unwrap_err()
            .to_string();
        assert!(e.contains("illegal address"), "{e}");
    }
}

#[test]
fn ranges_of_buffers_are_checked_before_anything_is_enqueued() {
    let (standin, driver) = device(Options::default());
    let stream = driver.create_stream().unwrap();
    let (from, to) = (pinned(&driver, &[7; 128]), buffer(&driver, 64));
    for (range, at) in [(0..65, 0), (0..64, 1), (100..129, 0), (0..1, usize::MAX)] {
        let e = from.upload(range, &to, at, stream).unwrap_err().to_string();
        assert!(e.starts_with("internal error: bytes"), "{e}");
    }
    driver.synchronize(stream).unwrap();
    assert_eq!(standin.counts().2, 0);
}

#[test]
fn a_kernel_that_leaves_its_buffers_is_caught() {
    let (_, driver) = device(Options::default());
    let stream = driver.create_stream().unwrap();
    let (x, weight, h) = (
        buffer(&driver, 4 * 64),
        buffer(&driver, 2 * 64),
        buffer(&driver, 2 * 64 - 16),
    );
    let f = driver.function(&NORM, "add_rms_norm").unwrap();
    let partial = weight.ptr();
    let args = args![partial, x.ptr(), weight.ptr(), h.ptr(), 64usize, 1e-6f32];
    // SAFETY: `h` is too short on purpose; the emulation checks every access.
    let enqueued = unsafe { driver.launch(f, &Launch::linear(1, 32), &args, stream) };
    let e = enqueued
        .and_then(|()| driver.synchronize(stream))
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("rms_norm") && e.contains("writes 16 bytes of global memory"),
        "{e}"
    );
}

#[test]
fn guards_show_a_write_that_nothing_checked() {
    let (_, driver) = device(Options::default());
    let stream = driver.create_stream().unwrap();
    let victim = buffer(&driver, 100);
    // SAFETY: the guard zone behind the allocation is mapped; writing to it is what is tested.
    unsafe { (victim.ptr().0 as *mut u8).add(100).write(0) };
    let e = driver.synchronize(stream).unwrap_err().to_string();
    assert!(e.contains("offset 100 of the 100 byte allocation"), "{e}");
}

#[test]
fn memory_is_not_freed_twice_and_its_count_comes_back() {
    let (_, driver) = device(Options {
        total_memory: 1000,
        ..Options::default()
    });
    let ptr = driver.alloc(600).unwrap();
    assert_eq!(
        driver.memory().unwrap(),
        MemoryInfo {
            free: 400,
            total: 1000
        }
    );
    let e = driver.alloc(401).unwrap_err().to_string();
    assert!(
        e.contains("401 bytes: out of memory; 400 of 1000 bytes are free"),
        "{e}"
    );
    // SAFETY: no work is pending; the second call is wrong on purpose and only looked up.
    unsafe {
        driver.free(ptr).unwrap();
        assert!(
            driver
                .free(ptr)
                .unwrap_err()
                .to_string()
                .contains("freed twice")
        );
    }
    assert_eq!(driver.memory().unwrap().free, 1000);
}

#[test]
fn one_stream_keeps_its_order() {
    for seed in 0..SEEDS {
        let (_, driver) = device(Options {
            seed,
            ..Options::default()
        });
        let stream = driver.create_stream().unwrap();
        let x = buffer(&driver, 64);
        for value in 0..10 {
            // SAFETY: inside the buffer, which outlives the stream's work.
            unsafe { driver.fill(x.ptr(), value, 64, stream) }.unwrap();
        }
        assert_eq!(read(&driver, &x, stream), [9; 64]);
    }
}

/// Fills `x` on one stream and copies it to `y` on another, waiting for an event or not; whether y got x's new value.
fn across_streams(seed: u64, wait: bool) -> bool {
    let (_, driver) = device(Options {
        seed,
        ..Options::default()
    });
    let (a, b) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    let (x, y) = (buffer(&driver, 64), buffer(&driver, 64));
    let event = driver.create_event(false).unwrap();
    // SAFETY: inside the buffers, which outlive the streams' work.
    unsafe {
        driver.fill(x.ptr(), 5, 64, a).unwrap();
        driver.record(event, a).unwrap();
        if wait {
            driver.wait(b, event).unwrap();
        }
        driver.copy(y.ptr(), x.ptr(), 64, b).unwrap();
    }
    let got = read(&driver, &y, b);
    driver.synchronize_device().unwrap();
    got == [5; 64]
}

#[test]
fn events_order_streams_and_a_missing_one_shows() {
    assert!((0..SEEDS).all(|seed| across_streams(seed, true)));
    let lucky = (0..SEEDS)
        .filter(|&seed| across_streams(seed, false))
        .count();
    assert!(
        (1..SEEDS as usize).contains(&lucky),
        "without the event, both orders must be met: {lucky}"
    );
}

#[test]
fn reading_before_synchronizing_shows() {
    let stale = (0..SEEDS).filter(|&seed| {
        let (_, driver) = device(Options {
            seed,
            ..Options::default()
        });
        let stream = driver.create_stream().unwrap();
        let x = buffer(&driver, 4);
        let mut out = pinned(&driver, &[1; 4]);
        // SAFETY: inside the buffer, which outlives the stream's work.
        unsafe { driver.fill(x.ptr(), 9, 4, stream) }.unwrap();
        out.download(0..4, &x, 0, stream).unwrap();
        let early = out.as_slice()[0];
        driver.synchronize(stream).unwrap();
        assert_eq!(out.as_slice(), [9; 4]);
        early != 9
    });
    assert!(stale.count() > 0);
}

#[test]
fn events_measure_time_once_they_are_complete() {
    let (_, driver) = device(Options::default());
    let stream = driver.create_stream().unwrap();
    let (from, to) = (
        driver.create_event(true).unwrap(),
        driver.create_event(true).unwrap(),
    );
    driver.record(from, stream).unwrap();
    driver.record(to, stream).unwrap();
    driver.synchronize_event(to).unwrap();
    assert!(driver.elapsed_ms(from, to).unwrap() >= 0.0);
    let fresh = driver.create_event(true).unwrap();
    assert!(driver.elapsed_ms(from, fresh).is_err());
    driver.destroy_event(fresh).unwrap();
    assert!(
        driver
            .record(fresh, stream)
            .unwrap_err()
            .to_string()
            .contains("invalid handle")
    );
}

#[test]
fn a_graph_replays_what_was_recorded_and_runs_nothing_before() {
    for seed in 0..SEEDS {
        let (_, driver) = device(Options {
            seed,
            ..Options::default()
        });
        let (stream, side) = (
            driver.create_stream().unwrap(),
            driver.create_stream().unwrap(),
        );
        let (x, y) = (buffer(&driver, 8), buffer(&driver, 8));
        let (forked, joined) = (
            driver.create_event(false).unwrap(),
            driver.create_event(false).unwrap(),
        );
        // SAFETY: inside the buffers, which outlive the streams' work.
        let graph = unsafe {
            driver.fill(x.ptr(), 1, 8, stream).unwrap();
            driver.fill(y.ptr(), 1, 8, stream).unwrap();
            driver.synchronize(stream).unwrap();
            driver.begin_capture(stream).unwrap();
            driver.record(forked, stream).unwrap();
            driver.wait(side, forked).unwrap();
            driver.fill(x.ptr(), 2, 8, side).unwrap();
            driver.record(joined, side).unwrap();
            driver.wait(stream, joined).unwrap();
            driver.copy(y.ptr(), x.ptr(), 8, stream).unwrap();
            assert!(
                driver
                    .synchronize(stream)
                    .unwrap_err()
                    .to_string()
                    .contains("recorded")
            );
            driver.end_capture(stream).unwrap()
        };
        assert_eq!(read(&driver, &y, stream), [1; 8]);
        for _ in 0..3 {
            // SAFETY: as recorded.
            unsafe {
                driver.fill(x.ptr(), 3, 8, stream).unwrap();
                driver.launch_graph(graph, stream).unwrap();
            }
            assert_eq!(read(&driver, &y, stream), [2; 8]);
        }
        driver.destroy_graph(graph).unwrap();
        // SAFETY: the handle is gone; only looked up.
        assert!(unsafe { driver.launch_graph(graph, stream) }.is_err());
    }
}

#[test]
fn a_capture_with_a_stream_left_behind_is_refused() {
    let (_, driver) = device(Options::default());
    let (stream, side) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    let x = buffer(&driver, 8);
    let event = driver.create_event(false).unwrap();
    driver.begin_capture(stream).unwrap();
    driver.record(event, stream).unwrap();
    driver.wait(side, event).unwrap();
    // SAFETY: inside the buffer.
    unsafe { driver.fill(x.ptr(), 2, 8, side) }.unwrap();
    assert!(
        driver
            .end_capture(stream)
            .unwrap_err()
            .to_string()
            .contains("not waited for")
    );
    let outside = driver.create_event(false).unwrap();
    driver.record(outside, side).unwrap();
    driver.begin_capture(stream).unwrap();
    assert!(
        driver
            .wait(stream, outside)
            .unwrap_err()
            .to_string()
            .contains("outside of the recording")
    );
}

#[test]
fn a_stream_waits_for_a_value_and_no_longer_than_its_patience() {
    let (_, driver) = device(Options {
        patience: Duration::from_millis(50),
        ..Options::default()
    });
    let (a, b) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    let (flag, x) = (buffer(&driver, 4), buffer(&driver, 4));
    // SAFETY: inside the buffers, which outlive the streams' work.
    unsafe {
        driver.fill(flag.ptr(), 0, 4, a).unwrap();
        driver.fill(x.ptr(), 0, 4, a).unwrap();
        driver.synchronize(a).unwrap();
        driver.wait_value(a, flag.ptr(), 7).unwrap();
        driver.fill(x.ptr(), 1, 4, a).unwrap();
        assert!(!driver.is_idle(a).unwrap());
        driver.write_value(b, flag.ptr(), 6).unwrap();
        let e = driver.synchronize(a).unwrap_err().to_string();
        assert!(e.contains("timeout"), "{e}");
        driver.write_value(b, flag.ptr(), 7).unwrap();
    }
    assert_eq!(read(&driver, &x, a), [1; 4]);
}

#[test]
fn exported_memory_is_the_same_memory_elsewhere() {
    let (_, one) = device(Options::default());
    let (_, two) = device(Options {
        ordinal: 1,
        ..Options::default()
    });
    let (s1, s2) = (one.create_stream().unwrap(), two.create_stream().unwrap());
    let x = buffer(&one, 64);
    let seen = two.import(&one.export(x.ptr()).unwrap()).unwrap();
    let y = buffer(&two, 64);
    // SAFETY: inside the buffers, which outlive the streams' work.
    unsafe {
        one.fill(x.ptr(), 3, 64, s1).unwrap();
        one.synchronize(s1).unwrap();
        two.copy(y.ptr(), seen, 64, s2).unwrap();
        assert_eq!(read(&two, &y, s2), [3; 64]);
        two.fill(seen, 4, 64, s2).unwrap();
        two.synchronize(s2).unwrap();
        assert_eq!(read(&one, &x, s1), [4; 64]);
        assert!(one.export(x.ptr().offset(1)).is_err());
        two.close_import(seen).unwrap();
        assert!(
            two.copy(y.ptr(), seen, 64, s2)
                .and_then(|()| two.synchronize(s2))
                .is_err()
        );
    }
    assert!(two.import(&IpcHandle([0; 64])).is_err());
}

#[test]
fn the_nth_allocation_is_refused() {
    let (_, driver) = device(Options {
        refuse_alloc: Some(2),
        ..Options::default()
    });
    let _first = buffer(&driver, 64);
    let e = DeviceBuffer::new(&driver, 64, "KV cache")
        .err()
        .unwrap()
        .to_string();
    assert!(
        e.starts_with("KV cache: GPU 0 (stand-in): alloc: 64 bytes: out of memory"),
        "{e}"
    );
    let _third = buffer(&driver, 64);
}

#[test]
fn a_failed_copy_and_a_lost_device_end_everything_after_them() {
    let failed = Options {
        fail_copy: Some(1),
        ..Options::default()
    };
    let (_, driver) = device(failed);
    let stream = driver.create_stream().unwrap();
    let (from, to) = (pinned(&driver, &[7; 64]), buffer(&driver, 64));
    let copied = from
        .upload(0..64, &to, 0, stream)
        .and_then(|()| driver.synchronize(stream));
    assert!(copied.unwrap_err().to_string().contains("a copy failed"));
    assert!(
        driver
            .alloc(1)
            .unwrap_err()
            .to_string()
            .contains("a copy failed")
    );

    let (_, driver) = device(Options {
        lose_device_at_launch: Some(1),
        ..Options::default()
    });
    let stream = driver.create_stream().unwrap();
    let (x, weight, h) = (
        buffer(&driver, 256),
        buffer(&driver, 128),
        buffer(&driver, 128),
    );
    let f = driver.function(&NORM, "add_rms_norm").unwrap();
    let partial = weight.ptr();
    let args = args![partial, x.ptr(), weight.ptr(), h.ptr(), 64usize, 1e-6f32];
    // SAFETY: the parameters of norm.cu; the buffers outlive the stream's work.
    let ran = unsafe { driver.launch(f, &Launch::linear(1, 32), &args, stream) }
        .and_then(|()| driver.synchronize(stream));
    assert!(ran.unwrap_err().to_string().contains("the device is lost"));
    assert!(
        driver
            .create_stream()
            .unwrap_err()
            .to_string()
            .contains("the device is lost")
    );
}

#[test]
fn an_unknown_kernel_and_a_broken_source_are_named() {
    static BROKEN: Source = Source {
        name: "broken",
        text: "this is no C++",
    };
    let dir = tempfile::tempdir().unwrap();
    let (_, driver) = device(Options {
        cache: Cache::at(dir.path()),
        ..Options::default()
    });
    let e = driver.function(&NORM, "rms_morn").unwrap_err().to_string();
    assert!(e.contains("there is no kernel rms_morn in norm.cu"), "{e}");
    let e = driver.function(&BROKEN, "x").unwrap_err().to_string();
    assert!(e.contains("refuses broken.cu"), "{e}");
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 1, "only norm's object stays: {left:?}");
}
