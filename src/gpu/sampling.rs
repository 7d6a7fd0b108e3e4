//! From logits on the device to a choice on the host: the vocabulary-parallel search, and the gathered rows.

use super::arena;
use super::backend::{GpuBackend, GpuBuf};
use super::driver::{Launch, args};
use super::offload::Offload;
use crate::Result;
use crate::model::Choice;

impl GpuBackend {
    /// The most likely of the tokens `0..n_known` of each wanted row.
    ///
    /// # Errors
    /// Those of the driver, and a lost rank.
    pub(super) fn arg_max(&mut self, n_known: usize) -> Result<Vec<Choice>> {
        let s = self.step.n_wanted;
        let (parts, known) = self.parts_of_ranks(n_known);
        let counts: Vec<usize> = parts.iter().map(|n| 3 * s * n).collect();
        let all: usize = counts.iter().sum();
        if all == 0 {
            return Ok(Vec::new());
        }
        let mut at = self.arena.get("choices_local");
        let mine = parts[self.g.tp_rank];
        if mine > 0 {
            let rows = at.offset(4 * s * mine);
            let sums = at.offset(8 * s * mine);
            let ld = self.g.vocab_local();
            let args = args![self.logits_local, known, ld, at, rows, sums];
            let launch = Launch {
                grid: [mine as u32, s as u32, 1],
                block: [256, 1, 1],
                shared: 0,
            };
            let kernel = self.kernels.sample_partial;
            self.kernels.run(kernel, &launch, &args, self.stream)?;
        }
        if self.g.vocab.len() > 1 {
            let gathered = self.arena.get("choices");
            // SAFETY: the arena outlives the stream's work.
            unsafe { self.comm.all_gather(at, &counts, gathered, self.stream) }?;
            at = gathered;
        }
        let offset = self.arena.offset(at);
        let memory = self.arena.memory();
        self.logits_host
            .download(0..4 * all, memory, offset, self.stream)?;
        self.wait()?;
        let words = bytemuck::cast_slice(&self.logits_host.as_slice()[..4 * all]);
        Ok(choose(words, &parts, &self.g.vocab, s))
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
        self.wait()?;
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

    /// Waits until the step is done, also the part of it that the host has.
    fn wait(&mut self) -> Result<()> {
        let done = self.comm.synchronize(self.stream);
        self.offload.as_ref().map_or(Ok(()), Offload::check)?;
        done
    }

    /// Into how many parts each rank's share of the first `n_known` tokens is cut, and how many of them this rank has.
    fn parts_of_ranks(&self, n_known: usize) -> (Vec<usize>, usize) {
        let mut left = n_known;
        let known = self.g.vocab.iter().map(|&rows| {
            let here = rows.min(left);
            left -= here;
            here
        });
        let known: Vec<usize> = known.collect();
        let parts = known.iter().map(|&n| arena::sample_parts(n)).collect();
        (parts, known[self.g.tp_rank])
    }
}

/// Joins what `sample.cu` found in the parts of every row, on every rank: per rank maxima, ids within the rank's rows, and
/// sums of exp(logit - maximum), each `[n_rows, parts]`.
fn choose(words: &[u32], parts: &[usize], vocab: &[usize], n_rows: usize) -> Vec<Choice> {
    let row = |row: usize| {
        let mut best = (f32::NEG_INFINITY, 0u32);
        let mut all: Vec<(f32, f32)> = Vec::new();
        let (mut begin, mut first_id) = (0, 0u32);
        for (&n, &rows) in parts.iter().zip(vocab) {
            for part in 0..n {
                let word = |array: usize| words[begin + (array * n_rows + row) * n + part];
                let (max, id, sum) = (f32::from_bits(word(0)), word(1), f32::from_bits(word(2)));
                // Ranks and parts come in no order of ids, so ties are settled here: the lowest id.
                if max > best.0 || (max == best.0 && first_id.wrapping_add(id) < best.1) {
                    best = (max, first_id.wrapping_add(id));
                }
                all.push((max, sum));
            }
            begin += 3 * n_rows * n;
            first_id += rows as u32;
        }
        let term = |&(max, sum): &(f32, f32)| f64::from(sum) * f64::from(max - best.0).exp();
        let sum: f64 = all.iter().filter(|p| p.1 > 0.0).map(term).sum();
        Choice {
            token: best.1,
            logit: best.0,
            log_sum_exp: f64::from(best.0) + sum.ln(),
        }
    };
    (0..n_rows).map(row).collect()
}
