//! How fast weights arrive: `cargo bench --bench load` (threads: `TANDEM_THREADS`, default 2; file in `TMPDIR`).
//!
//! Each line beside a plain loop that reads the same file with `pread` into the same kind of memory. The file has 1 GB
//! and is warm, that is in the page cache, except where a line says cold.

use std::error::Error;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tandem::weights::{Arena, Checkpoint, Dtype, LocalMatrix, Part, Source, load};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The down projection of Qwen2.5-72B: 484 MB in bf16.
const SHAPE: [usize; 2] = [8192, 29568];
const TENSORS: [&str; 2] = ["a.weight", "b.weight"];

fn main() -> Result<()> {
    let threads = std::env::var("TANDEM_THREADS")
        .ok()
        .and_then(|t| t.parse().ok())
        .unwrap_or(2);
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.safetensors");
    let [rows, cols] = SHAPE;
    for stored in ["BF16", "F16"] {
        write(&path, stored)?;
        let checkpoint = Checkpoint::open(dir.path())?;
        let source = Source::Checkpoint(&checkpoint);
        println!(
            "{stored}, {} bytes, {threads} threads",
            checkpoint.total_bytes()
        );
        let dtype = checkpoint.dtype_of(TENSORS)?;
        for _ in 0..2 {
            report("pread loop", plain(&path, threads)?);
            report("whole", run(source, 0..rows, 0..cols, dtype, threads)?);
            report(
                "rows, half",
                run(source, rows / 2..rows, 0..cols, dtype, threads)?,
            );
            report(
                "columns, half",
                run(source, 0..rows, cols / 2..cols, dtype, threads)?,
            );
            report(
                "columns, eighth",
                run(source, 0..rows, 0..cols / 8, dtype, threads)?,
            );
            report(
                "widened to f32",
                run(source, 0..rows, 0..cols, Dtype::F32, threads)?,
            );
        }
        if forget(&path)? {
            report("pread loop, cold", plain(&path, threads)?);
            forget(&path)?;
            report(
                "whole, cold",
                run(source, 0..rows, 0..cols, dtype, threads)?,
            );
            forget(&path)?;
            report(
                "columns, half, cold",
                run(source, 0..rows, cols / 2..cols, dtype, threads)?,
            );
        }
    }
    for threads in [1, threads] {
        println!("random, {threads} threads");
        let source = Source::Random { seed: 1 };
        report("bf16", run(source, 0..rows, 0..cols, Dtype::Bf16, threads)?);
        report("f32", run(source, 0..rows, 0..cols, Dtype::F32, threads)?);
    }
    Ok(())
}

/// Bytes read, bytes placed, seconds.
type Measured = (u64, u64, f64);

fn report(what: &str, (read, placed, seconds): Measured) {
    let rate = |bytes: u64| bytes as f64 / seconds / 1e9;
    println!(
        "  {what:<20} {:6.2} GB/s read {:6.2} GB/s placed",
        rate(read),
        rate(placed)
    );
}

fn run(
    source: Source<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
    dtype: Dtype,
    threads: usize,
) -> Result<Measured> {
    let matrices = TENSORS.map(|tensor| LocalMatrix {
        name: tensor.to_owned(),
        rows: rows.len(),
        cols: cols.len(),
        dtype,
        parts: vec![Part {
            tensor: tensor.to_owned(),
            shape: SHAPE,
            rows: rows.clone(),
            cols: cols.clone(),
            dst_row: 0,
        }],
    });
    let sizes = matrices.iter().map(LocalMatrix::bytes);
    let mut arena = Arena::new(Arena::bytes_for(sizes.clone()))?;
    let mut places = sizes
        .map(|n| arena.take(n))
        .collect::<tandem::Result<Vec<_>>>()?;
    let mut dest: Vec<&mut [u8]> = places.iter_mut().map(|p| &mut **p).collect();
    let stats = load(source, &matrices, &mut dest, threads, &|_| ())?;
    Ok((stats.bytes_read, stats.bytes_placed, stats.seconds))
}

/// What the machine can do: threads that read 4 MiB at a time into fresh memory.
fn plain(path: &Path, threads: usize) -> Result<Measured> {
    const STEP: usize = 4 << 20;
    let file = std::fs::File::open(path)?;
    let len = file.metadata()?.len() as usize / STEP * STEP;
    let mut place = Arena::new(len)?.take(len)?;
    let queue = Mutex::new(place.chunks_exact_mut(STEP).enumerate());
    let failures = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, chunk)) = queue.lock().ok().and_then(|mut q| q.next()) {
                    if file.read_exact_at(chunk, (i * STEP) as u64).is_err() {
                        failures.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    match failures.into_inner() {
        0 => Ok((len as u64, len as u64, start.elapsed().as_secs_f64())),
        n => Err(format!("{n} reads failed").into()),
    }
}

/// Two tensors of [`SHAPE`]; the values do not matter, but a file of holes would not be read from the disk.
fn write(path: &Path, dtype: &str) -> Result<()> {
    let bytes = SHAPE[0] * SHAPE[1] * 2;
    let tensor = |i: usize| {
        let (name, begin, end) = (TENSORS[i], i * bytes, (i + 1) * bytes);
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{SHAPE:?},"data_offsets":[{begin},{end}]}}"#
        )
    };
    let header = format!("{{{},{}}}", tensor(0), tensor(1));
    let file = std::fs::File::create(path)?;
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(header.as_bytes(), 8)?;
    let block = vec![0x3c; 1 << 20];
    let (mut at, end) = (8 + header.len(), 8 + header.len() + 2 * bytes);
    while at < end {
        let n = block.len().min(end - at);
        file.write_all_at(&block[..n], at as u64)?;
        at += n;
    }
    Ok(file.sync_all()?)
}

/// Drops the file from the page cache, if `dd` knows how to.
fn forget(path: &Path) -> Result<bool> {
    let input = format!("if={}", path.display());
    let dd = Command::new("dd")
        .args([&input, "iflag=nocache", "count=0", "status=none"])
        .status();
    Ok(dd?.success())
}
