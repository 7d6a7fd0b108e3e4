//! What can be said of a checkpoint's data before it is loaded: whether two tensors are the same, and whether two
//! checkpoints are.

use super::checkpoint::{Checkpoint, FNV_OFFSET, TensorInfo, fnv1a};
use crate::{Error, Result};
use std::os::unix::fs::FileExt;

/// Bytes that are compared at a time.
const COMPARED: usize = 1 << 20;

/// Samples of a checkpoint's data, about, and of one tensor at most; bytes of each; threads that take them.
const SAMPLES: usize = 4096;
const SAMPLES_OF_TENSOR: usize = 16;
const SAMPLE: usize = 64;
const SAMPLERS: usize = 16;

impl Checkpoint {
    /// Equal for copies of a checkpoint wherever they lie, so that ranks can compare what they opened.
    ///
    /// It covers file names, sizes and headers, and samples of every tensor's data: a fine-tune beside its base differs.
    /// A few thousand short reads, side by side, since a network file system takes its time for each.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn fingerprint(&self) -> Result<u64> {
        let tensors = Vec::from_iter(&self.tensors);
        let samples = (SAMPLES / tensors.len().max(1)).clamp(1, SAMPLES_OF_TENSOR);
        let of_some = |some: &[(&String, &TensorInfo)]| -> Result<Vec<u64>> {
            let one = |(name, tensor): &(&String, &TensorInfo)| self.sampled(name, tensor, samples);
            some.iter().map(one).collect()
        };
        let pieces = tensors.chunks(tensors.len().div_ceil(SAMPLERS).max(1));
        let hashes = std::thread::scope(|scope| {
            let begin = |piece| {
                let thread = std::thread::Builder::new();
                // A thread that the system refuses is no reason to fail.
                let started = thread.spawn_scoped(scope, move || of_some(piece));
                started.map_err(|_| of_some(piece))
            };
            let started: Vec<_> = pieces.map(begin).collect();
            let end = |one: Result<std::thread::ScopedJoinHandle<'_, _>, _>| match one {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|p| std::panic::resume_unwind(p)),
                Err(done) => done,
            };
            started.into_iter().map(end).collect::<Result<Vec<_>>>()
        })?;
        let all = hashes.iter().flatten();
        Ok(all.fold(self.fingerprint, |h, x| fnv1a(h, &x.to_le_bytes())))
    }

    /// Hash of a tensor's name and of some of its bytes: one sample somewhere in each of so many equal parts.
    fn sampled(&self, name: &str, tensor: &TensorInfo, samples: usize) -> Result<u64> {
        let shard = self.shard(tensor);
        let (mut hash, mut buffer) = (fnv1a(FNV_OFFSET, name.as_bytes()), [0; SAMPLE]);
        let part = tensor.bytes / samples as u64;
        for i in 0..samples as u64 {
            let room = part.saturating_sub(SAMPLE as u64) + 1;
            let at = part * i + fnv1a(hash, &i.to_le_bytes()) % room;
            let n = (tensor.bytes - at).min(SAMPLE as u64) as usize;
            let read = shard
                .file
                .read_exact_at(&mut buffer[..n], tensor.offset + at);
            read.map_err(|e| Error::file(&shard.path, e))?;
            hash = fnv1a(hash, &buffer[..n]);
        }
        Ok(hash)
    }

    /// Whether two tensors are of one type and shape and hold the same bytes; reads as far as they do.
    ///
    /// # Errors
    /// A tensor that is missing, or cannot be read.
    pub fn same_data(&self, a: &str, b: &str) -> Result<bool> {
        let (a, b) = (self.require(a)?, self.require(b)?);
        if (a.stored_dtype, &a.shape) != (b.stored_dtype, &b.shape) {
            return Ok(false);
        }
        let mut buffers = [vec![0; COMPARED], vec![0; COMPARED]];
        for at in (0..a.bytes).step_by(COMPARED) {
            let n = (a.bytes - at).min(COMPARED as u64) as usize;
            for (tensor, buffer) in [a, b].iter().zip(&mut buffers) {
                let shard = self.shard(tensor);
                let read = shard
                    .file
                    .read_exact_at(&mut buffer[..n], tensor.offset + at);
                read.map_err(|e| Error::file(&shard.path, e))?;
            }
            if buffers[0][..n] != buffers[1][..n] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
