//! From the files straight to the final place, in parallel.
//!
//! Whole rows of the right type are read where they will stay. A column cut is one range a row: of long rows each is read
//! where it will stay, too. Where that would be many small reads, whole rows go through a thread's bounce buffer and the
//! wanted columns are copied out; so do elements that have to be widened.

use super::checkpoint::{Checkpoint, Shard};
use super::pieces::{self, PIECE, Piece};
use super::random::Random;
use super::text::{dims, quote};
use super::{Dtype, LocalMatrix, Part};
use crate::{Error, Result};
use half::f16;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A column cut whose rows are this long, in bytes, is read row by row. From page cache, two threads placed 11 GB/s of rows
/// of 18 KiB this way and 8.5 GB/s of 9 KiB, against 5 GB/s through the bounce buffer; at 3.5 KiB both gave 5 GB/s.
const LONG_ROW: usize = 4 << 10;

/// Where weights come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The files of a checkpoint.
    Checkpoint(&'a Checkpoint),
    /// No files: the same reproducible random tensors for every world size.
    Random {
        /// Different seeds give different weights.
        seed: u64,
    },
}

/// What a load did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadStats {
    /// Bytes read from files; more than were placed where columns were cut or elements widened from less.
    pub bytes_read: u64,
    /// Bytes of the local matrices that were filled.
    pub bytes_placed: u64,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Extra host memory that [`load`] takes, in bytes: each thread's bounce buffer.
pub fn load_overhead(threads: usize) -> usize {
    threads.max(1).saturating_mul(PIECE)
}

/// Where the elements of one part come from, and how they are stored.
struct Tensor<'a> {
    part: &'a Part,
    /// Element type in the local matrix.
    dtype: Dtype,
    origin: Origin<'a>,
}

enum Origin<'a> {
    File {
        shard: &'a Shard,
        offset: u64,
        stored: Dtype,
    },
    Random(Random),
}

/// Fills `dest[i]`, of `matrices[i].bytes()` bytes, with `matrices[i]`, using `threads` threads.
///
/// `progress` is called from any of them with the number of bytes just placed; the calls add up to the sum of all
/// `bytes()`.
///
/// # Errors
/// A tensor that is missing, of another shape, or of a type that the matrix cannot hold exactly; a read that fails or a
/// file that changed since it was opened; parts that do not cover their matrix. What `dest` then holds is unspecified.
pub fn load(
    source: Source<'_>,
    matrices: &[LocalMatrix],
    dest: &mut [&mut [u8]],
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<LoadStats> {
    let start = Instant::now();
    let (tensors, mut pieces) = prepare(source, matrices, dest)?;
    check_unchanged(source)?;
    pieces.sort_by_key(|p| tensors[p.part].place_in_source(p));
    let work = Work {
        tensors,
        bytes_placed: pieces.iter().map(|p| p.dst.len() as u64).sum(),
        queue: Mutex::new(pieces.into_iter()),
        failed: AtomicBool::new(false),
        bytes_read: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        // A thread that the system refuses is no reason to fail: this one works too.
        let others: Vec<_> = (1..threads)
            .map_while(|_| {
                std::thread::Builder::new()
                    .spawn_scoped(scope, || work.run(progress))
                    .ok()
            })
            .collect();
        let mine = work.run(progress);
        others.into_iter().fold(mine, |result, other| {
            result.and(
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        })
    })?;
    check_unchanged(source)?;
    Ok(LoadStats {
        bytes_read: work.bytes_read.into_inner(),
        bytes_placed: work.bytes_placed,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// A file that is written to while it is read gives a mixture of two checkpoints.
fn check_unchanged(source: Source<'_>) -> Result<()> {
    match source {
        Source::Checkpoint(c) => c.shards().iter().try_for_each(Shard::check_unchanged),
        Source::Random { .. } => Ok(()),
    }
}

/// Finds every part's tensor and cuts everything into pieces; reads no data.
fn prepare<'a, 'd>(
    source: Source<'a>,
    matrices: &'a [LocalMatrix],
    dest: &'d mut [&mut [u8]],
) -> Result<(Vec<Tensor<'a>>, Vec<Piece<'d>>)> {
    if matrices.len() != dest.len() {
        let (m, d) = (matrices.len(), dest.len());
        return Err(Error::failed(format_args!(
            "internal error: {m} matrices for {d} places"
        )));
    }
    let (mut tensors, mut cut) = (Vec::new(), Vec::new());
    for (m, dest) in matrices.iter().zip(dest) {
        let mut rest: &mut [u8] = dest;
        for part in pieces::parts_in_order(m, rest.len())? {
            let (place, below) = rest.split_at_mut(part.rows.len() * m.cols * m.dtype.size());
            rest = below;
            let origin = Origin::find(source, m, part)?;
            let stored = match origin {
                Origin::File { stored, .. } => stored,
                Origin::Random(_) => m.dtype,
            };
            pieces::cut(part, tensors.len(), stored.size(), place, &mut cut);
            tensors.push(Tensor {
                part,
                dtype: m.dtype,
                origin,
            });
        }
    }
    Ok((tensors, cut))
}

impl<'a> Origin<'a> {
    fn find(source: Source<'a>, m: &LocalMatrix, part: &Part) -> Result<Self> {
        let checkpoint = match source {
            Source::Random { seed } => return Ok(Origin::Random(Random::new(seed, &part.tensor))),
            Source::Checkpoint(checkpoint) => checkpoint,
        };
        let info = checkpoint.require(&part.tensor)?;
        let stored = checkpoint.usable_dtype(&part.tensor, info)?;
        let wrong = |what: String| {
            let name = quote(&part.tensor);
            Error::file(
                checkpoint.path_of(info),
                format_args!("tensor {name} {what}"),
            )
        };
        if info.matrix_shape() != Some(part.shape) {
            let (have, want) = (dims(&info.shape), dims(&part.shape));
            return Err(wrong(format!("has shape {have}, the plan asks for {want}")));
        }
        if stored.join(m.dtype) != m.dtype {
            let (dtype, name) = (m.dtype, quote(&m.name));
            return Err(wrong(format!(
                "is {stored}, which {dtype} ({name}) cannot hold exactly"
            )));
        }
        let shard = checkpoint.shard(info);
        Ok(Origin::File {
            shard,
            offset: info.offset,
            stored,
        })
    }
}

impl Tensor<'_> {
    /// Index in the tensor of a piece's first element.
    fn first_element(&self, piece: &Piece<'_>) -> usize {
        piece.rows.start * self.part.shape[1] + piece.cols.start
    }

    /// The order of pieces that reads every file from front to back.
    fn place_in_source(&self, piece: &Piece<'_>) -> (usize, u64) {
        match &self.origin {
            Origin::File {
                shard,
                offset,
                stored,
            } => (
                shard.number,
                offset + (self.first_element(piece) * stored.size()) as u64,
            ),
            Origin::Random(_) => (0, 0),
        }
    }

    /// Fills a piece; the number of bytes read from a file. `bounce` is empty, or as long as it was left.
    fn fill(&self, piece: &mut Piece<'_>, bounce: &mut Vec<u8>) -> Result<u64> {
        let (first, all_cols) = (self.first_element(piece), self.part.shape[1]);
        let (rows, width) = (piece.rows.len(), piece.cols.len());
        let (shard, offset, stored) = match &self.origin {
            Origin::Random(random) => {
                let row_bytes = width * self.dtype.size();
                for (i, row) in piece.dst.chunks_exact_mut(row_bytes).enumerate() {
                    random.fill((first + i * all_cols) as u64, self.dtype, row);
                }
                return Ok(0);
            }
            Origin::File {
                shard,
                offset,
                stored,
            } => (shard, *offset, *stored),
        };
        let at = offset + (first * stored.size()) as u64;
        if stored == self.dtype && (width == all_cols || rows == 1) {
            self.read(shard, piece.dst, at)?;
            return Ok(piece.dst.len() as u64);
        }
        let span = ((rows - 1) * all_cols + width) * stored.size();
        let row_bytes = width * self.dtype.size();
        if stored == self.dtype && row_bytes >= LONG_ROW {
            // The ranks of a node need what lies between: a file that is not in memory yet had better be read as a whole.
            shard.will_need(at, span);
            for (at, row) in (at..)
                .step_by(all_cols * stored.size())
                .zip(piece.dst.chunks_exact_mut(row_bytes))
            {
                self.read(shard, row, at)?;
            }
            return Ok(piece.dst.len() as u64);
        }
        bounce.resize(bounce.len().max(span), 0);
        self.read(shard, &mut bounce[..span], at)?;
        let all_rows = bounce[..span].chunks(all_cols * stored.size());
        for (src, dst) in all_rows.zip(piece.dst.chunks_exact_mut(row_bytes)) {
            widen(&src[..width * stored.size()], stored, dst, self.dtype);
        }
        Ok(span as u64)
    }

    fn read(&self, shard: &Shard, into: &mut [u8], at: u64) -> Result<()> {
        shard.file.read_exact_at(into, at).map_err(|e| {
            let (name, len) = (quote(&self.part.tensor), into.len());
            let why = match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    "the file ends before; it changed since it was opened".to_owned()
                }
                _ => e.to_string(),
            };
            Error::file(
                &shard.path,
                format_args!("tensor {name}: cannot read {len} bytes at offset {at}: {why}"),
            )
        })
    }
}

thread_local! {
    /// A thread's bounce buffer, kept from one load to its next.
    static BOUNCE: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// What the threads share.
struct Work<'a, 'd> {
    tensors: Vec<Tensor<'a>>,
    queue: Mutex<std::vec::IntoIter<Piece<'d>>>,
    failed: AtomicBool,
    bytes_read: AtomicU64,
    bytes_placed: u64,
}

impl Work<'_, '_> {
    /// Fills pieces until none is left or a thread has failed.
    fn run(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        BOUNCE.with_borrow_mut(|bounce| self.run_with(bounce, progress))
    }

    fn run_with(&self, bounce: &mut Vec<u8>, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        while !self.failed.load(Ordering::Relaxed) {
            let Some(mut piece) = self
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .next()
            else {
                break;
            };
            let read = self.tensors[piece.part]
                .fill(&mut piece, bounce)
                .inspect_err(|_| self.failed.store(true, Ordering::Relaxed))?;
            self.bytes_read.fetch_add(read, Ordering::Relaxed);
            progress(piece.dst.len() as u64);
        }
        Ok(())
    }
}

/// Copies elements of `from` to elements of `to`; the caller has made sure that `to` holds every one exactly.
fn widen(src: &[u8], from: Dtype, dst: &mut [u8], to: Dtype) {
    if from == to {
        return dst.copy_from_slice(src);
    }
    debug_assert_eq!(
        to,
        Dtype::F32,
        "f32 is the only type that is wider than another"
    );
    let (src, dst) = (src.as_chunks::<2>().0, dst.as_chunks_mut::<4>().0);
    for (src, dst) in src.iter().zip(dst) {
        *dst = match from {
            // The bits and not the value, so that a NaN stays the same NaN.
            Dtype::Bf16 => (u32::from(u16::from_le_bytes(*src)) << 16).to_le_bytes(),
            _ => f16::from_le_bytes(*src).to_f32().to_le_bytes(),
        };
    }
}
