//! From logits on the device to a choice: the vocabulary-parallel search for the most likely token in the step itself, the
//! way of what was chosen to the host, and the gathered rows.

use super::backend::{GpuBackend, GpuBuf, wait_for};
use super::driver::{Driver, Launch, Pinned, args};
use super::memory::{OwnedEvent, PinnedBuffer};
use super::offload::Offload;
use crate::layout::{Limits, chosen_bytes, sample_parts};
use crate::model::{Choice, Fetch};
use crate::{Error, Result};
use std::sync::Arc;

/// Choices on their way to the host.
pub struct Fetching {
    host: PinnedBuffer,
    arrived: OwnedEvent,
    /// Rows that are on their way; none while it is free.
    rows: Option<usize>,
}

impl Fetching {
    /// Room for the choices of one step.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(driver: &Arc<dyn Driver>, limits: &Limits) -> Result<Fetching> {
        let bytes = chosen_bytes(limits);
        Ok(Fetching {
            host: PinnedBuffer::new(driver, bytes, Pinned::Cached, "choices on the host")?,
            arrived: OwnedEvent::new(driver, false)?,
            rows: None,
        })
    }
}

impl GpuBackend {
    /// Enqueues the search for the most likely known token of each wanted row, over all ranks' parts of the vocabulary.
    ///
    /// # Errors
    /// Those of the driver and the collective.
    pub(super) fn arg_max(&mut self) -> Result<()> {
        let (s, ranks) = (self.rows, self.g.vocab.len());
        if self.idle() {
            return Ok(());
        }
        let known = self.known_here();
        let n_parts = sample_parts(known);
        let parts = self.arena.get("sample_parts");
        let (ids, sums) = (parts.offset(4 * s * n_parts), parts.offset(8 * s * n_parts));
        if n_parts > 0 {
            let args = args![
                self.logits_local,
                known,
                self.g.vocab_local(),
                parts,
                ids,
                sums
            ];
            let launch = Launch {
                grid: [n_parts as u32, s as u32, 1],
                block: [256, 1, 1],
                shared: 0,
            };
            self.launch(self.kernels.sample_partial, &launch, &args)?;
        }
        let one_warp_each = Launch::linear(s, 32);
        let token = self.arena.get("chosen");
        let stride = 4 * self.limits.max_logit_rows;
        let [logit, max, sum] = [1, 2, 3].map(|i| token.offset(i * stride));
        let reduce = self.kernels.sample_reduce;
        if ranks == 1 {
            let args = args![
                parts, ids, sums, n_parts, 1usize, n_parts, token, logit, max, sum
            ];
            return self.launch(reduce, &one_warp_each, &args);
        }
        let (local, all) = (
            self.arena.get("sample_local"),
            self.arena.get("sample_ranks"),
        );
        let args = args![parts, ids, sums, n_parts, self.g.first_row, local];
        self.launch(self.kernels.sample_join, &one_warp_each, &args)?;
        let counts = vec![3 * s; ranks];
        // SAFETY: the arena outlives the stream's work.
        unsafe { self.comm.all_gather(local, &counts, all, self.stream) }?;
        let (ids, sums) = (all.offset(4 * s), all.offset(8 * s));
        let args = args![all, ids, sums, ranks, 3 * s, 1usize, token, logit, max, sum];
        self.launch(reduce, &one_warp_each, &args)
    }

    /// How many of the known tokens are in this rank's part of the vocabulary.
    pub(super) fn known_here(&self) -> usize {
        let before: usize = self.g.vocab[..self.g.tp_rank].iter().sum();
        self.n_known
            .saturating_sub(before)
            .min(self.g.vocab_local())
    }

    /// Enqueues the copy of what the step has chosen.
    ///
    /// # Errors
    /// Those of the driver.
    pub(super) fn start_fetch(&mut self) -> Result<Fetch> {
        let slot = self.turn;
        let fetching = &mut self.fetching[slot];
        if fetching.rows.is_some() {
            return Err(Error::failed(
                "internal error: choices of three steps under way",
            ));
        }
        let at = self.arena.offset(self.arena.get("chosen"));
        let bytes = fetching.host.bytes();
        let memory = self.arena.memory();
        fetching.host.download(0..bytes, memory, at, self.stream)?;
        fetching.arrived.record(self.stream)?;
        fetching.rows = Some(self.step.n_wanted);
        self.turn = 1 - slot;
        Ok(Fetch(slot))
    }

    /// Waits for such a copy.
    ///
    /// # Errors
    /// Those of the driver, and a lost rank.
    pub(super) fn end_fetch(&mut self, Fetch(slot): Fetch) -> Result<Vec<Choice>> {
        let fetching = &mut self.fetching[slot];
        let rows = fetching.rows.take().unwrap_or(0);
        let arrived = wait_for(&fetching.arrived, &mut *self.comm);
        self.offload.as_ref().map_or(Ok(()), Offload::check)?;
        arrived?;
        let words: &[u32] = bytemuck::cast_slice(fetching.host.as_slice());
        let stride = self.limits.max_logit_rows;
        let float = |at: usize| f32::from_bits(words[at]);
        let choice = |row: usize| {
            let [logit, max, sum] = [1, 2, 3].map(|i| float(i * stride + row));
            Choice {
                token: words[row],
                logit,
                log_sum_exp: f64::from(max) + f64::from(sum).ln(),
            }
        };
        Ok((0..rows).map(choice).collect())
    }

    /// The logits of the wanted rows on the host, `[S, vocab]`.
    ///
    /// # Errors
    /// Those of the driver, and a lost rank.
    pub(super) fn gathered_logits<'a>(&'a mut self, logits: &'a GpuBuf) -> Result<&'a [f32]> {
        let (s, vocab) = (self.step.n_wanted, logits.cols);
        let bytes = s * vocab * 4;
        if self.g.vocab.len() > 1 && s > 0 {
            let counts: Vec<usize> = self.g.vocab.iter().map(|rows| rows * s).collect();
            let (local, all) = (self.logits_local, logits.ptr);
            // SAFETY: the arena outlives the stream's work.
            unsafe { self.comm.all_gather(local, &counts, all, self.stream) }?;
        }
        self.logits_host.download(
            0..bytes,
            self.arena.memory(),
            self.arena.offset(logits.ptr),
            self.stream,
        )?;
        self.synchronize()?;
        let gathered: &[f32] = bytemuck::cast_slice(&self.logits_host.as_slice()[..bytes]);
        if self.g.vocab.len() == 1 {
            return Ok(gathered);
        }
        // Gathered by rank, wanted by row.
        let (mut from, mut column) = (0, 0);
        for &rows in &self.g.vocab {
            for i in 0..s {
                self.logits[i * vocab + column..][..rows]
                    .copy_from_slice(&gathered[from..from + rows]);
                from += rows;
            }
            column += rows;
        }
        Ok(&self.logits[..s * vocab])
    }
}
