//! Draws: of each row's most likely tokens, found over all ranks' parts of the vocabulary, one becomes the step's choice.
//!
//! Behind the step's graph, not in it: fewer graphs, and the host, a step ahead, has the time for some launches.

use super::backend::GpuBackend;
use super::driver::{DevicePtr, Function, Launch, args};
use crate::Result;
use crate::layout::{CANDIDATES, lists};

impl GpuBackend {
    /// Enqueues the draws of the step's wanted rows, in place of the most likely tokens.
    ///
    /// # Errors
    /// Those of the driver and the collective.
    pub(super) fn draw(&mut self) -> Result<()> {
        let s = self.step.n_wanted;
        let Some(draws) = self.step.draws else {
            return Ok(());
        };
        let mut list = self.local_candidates(s, draws)?;
        let ranks = self.g.vocab.len();
        if ranks > 1 {
            let counts = vec![2 * CANDIDATES * s; ranks];
            let all = self.arena.get("candidates_ranks");
            // SAFETY: the arena outlives the stream's work.
            unsafe { self.comm.all_gather(list, &counts, all, self.stream) }?;
            list = self.arena.get("candidates_even");
            let from = (all, ranks * CANDIDATES, s * CANDIDATES, CANDIDATES);
            self.merge_candidates(from, list, s)?;
        }
        let token = self.arena.get("chosen");
        let logit = token.offset(4 * self.limits.max_logit_rows);
        let (one_warp_each, args) = (Launch::linear(s, 32), args![list, draws, token, logit]);
        let kernel = self.kernels.draw;
        self.kernels.run(kernel, &one_warp_each, &args, self.stream)
    }

    /// Enqueues the search among this rank's logits; where the lists will be, one for each row.
    fn local_candidates(&mut self, s: usize, draws: DevicePtr) -> Result<DevicePtr> {
        let mut buffers = [
            self.arena.get("candidates_even"),
            self.arena.get("candidates_odd"),
        ];
        let known = self.known_here();
        if known == 0 {
            // SAFETY: the arena outlives the stream's work, and the buffer has at least one list for each row.
            unsafe {
                self.driver
                    .fill(buffers[0], 0, 8 * CANDIDATES * s, self.stream)
            }?;
            return Ok(buffers[0]);
        }
        let (ld, first_id) = (self.g.vocab_local(), self.g.first_row);
        let (seqs, tables) = (self.step.seqs, self.step.tables);
        let history = self.arena.get("history");
        let args = args![
            self.logits_local,
            known,
            ld,
            first_id,
            draws,
            seqs,
            tables,
            history,
            buffers[0]
        ];
        let mut n_lists = lists(known);
        self.run_candidates(self.kernels.candidates, n_lists, s, &args)?;
        while n_lists > 1 {
            let n = n_lists * CANDIDATES;
            self.merge_candidates((buffers[0], n, CANDIDATES, n), buffers[1], s)?;
            buffers.reverse();
            n_lists = lists(n);
        }
        Ok(buffers[0])
    }

    /// Enqueues a round of the tournament: from (keys, keys of a row, strides of groups and rows) to shorter lists.
    fn merge_candidates(
        &self,
        (from, n, group_stride, row_stride): (DevicePtr, usize, usize, usize),
        to: DevicePtr,
        s: usize,
    ) -> Result<()> {
        let args = args![from, n, group_stride, row_stride, to];
        self.run_candidates(self.kernels.candidates_merge, lists(n), s, &args)
    }

    fn run_candidates(
        &self,
        kernel: Function,
        n_lists: usize,
        rows: usize,
        args: &[super::driver::Arg],
    ) -> Result<()> {
        let launch = Launch {
            grid: [n_lists as u32, rows as u32, 1],
            block: [512, 1, 1],
            shared: 0,
        };
        self.kernels.run(kernel, &launch, args, self.stream)
    }
}
