//! Causal attention over a paged KV cache, for prefill chunks and decode tokens in one call.
//!
//! The lanes of a vector are query rows: all query heads that share a KV head, of as many tokens as fit two vectors. Keys and
//! values, each `f32[n_blocks][n_kv_heads][KV_BLOCK][head_dim]` of a layer with this rank's heads, are broadcast from where
//! they lie (`tile`), the softmax is computed online over chunks of positions
//! (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135) and needs no sum across lanes. Where a decode
//! step has fewer tasks than threads, a task's positions are divided and the parts merged in a fixed order
//! (as in Flash-Decoding, Dao et al., 2023).

mod decode;
mod prefill;
#[cfg(test)]
mod tests;

use super::isa::Kernel;
use super::pool::Shards;
use super::simd::{Lanes, Simd};
use super::tile::transpose;
use super::{Kernels, Pool};
use crate::layout::KV_BLOCK;
use decode::{MAX_ROWS, Narrow, NarrowState};
use prefill::State;

/// Positions between two updates of the running maximum.
const CHUNK: usize = 4 * KV_BLOCK;
/// Fewest positions worth a task of their own.
const MIN_SPLIT: usize = 4 * CHUNK;
/// Tasks a thread wants before positions are divided.
const TASKS_PER_THREAD: usize = 4;
/// The score of a position that a row must not see, and the running maximum before any position. Finite, so that
/// differences are.
const MASKED: f32 = -1e30;

/// Where a head's first position in a block begins, in elements from the start of the layer's cache.
#[inline(always)]
pub(super) fn kv_offset(block: usize, head: usize, n_kv_heads: usize, head_dim: usize) -> usize {
    (block * n_kv_heads + head) * KV_BLOCK * head_dim
}

/// Sizes of one rank's heads.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads on this rank, a multiple of `n_kv_heads`; 0 for a rank without heads.
    pub n_heads: usize,
    /// KV heads on this rank.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on `q·k`, usually `1/√head_dim`.
    pub scale: f32,
}

/// One sequence of a step.
#[derive(Debug, Clone, Copy)]
pub struct SeqView<'a> {
    /// The row of its first new token.
    pub q_start: usize,
    /// Its new tokens, whose keys and values are in the cache already.
    pub q_len: usize,
    /// Its tokens after this step; the new ones are the last.
    pub context_len: usize,
    /// The cache's block for every [`KV_BLOCK`] positions.
    pub block_table: &'a [u32],
}

/// Query rows `row..` of one sequence and KV head, over some of its positions.
#[derive(Clone)]
struct Task {
    seq: usize,
    kv_head: usize,
    /// First row: `token · heads per KV head + head`.
    row: usize,
    positions: std::ops::Range<usize>,
    /// Which part of how many, and where the parts' results lie.
    parts: usize,
    partial: usize,
}

impl Kernels {
    /// `out[T, n_heads·head_dim]`: each token of `q[T, n_heads·head_dim]` attends to its sequence up to itself.
    ///
    /// Rows of `out` that no sequence names are left alone.
    ///
    /// # Panics
    /// If a block table or a row range does not fit the buffers.
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &mut self,
        pool: &Pool,
        shape: AttentionShape,
        q: &[f32],
        k_cache: &[f32],
        v_cache: &[f32],
        seqs: &[SeqView<'_>],
        out: &mut [f32],
    ) {
        if shape.n_heads == 0 {
            return;
        }
        check(&shape, q, k_cache, v_cache, seqs, out);
        let (isa, hd) = (pool.isa(), shape.head_dim);
        let width = 2 * isa.dispatch(Lanes);
        let mut tasks = whole_tasks(&shape, seqs, width);
        let n_partials = split_tasks(&mut tasks, &shape, seqs, pool.threads());
        let partial_len = (hd + 2) * width;
        let partials = Shards::new(self.packed.get(n_partials * partial_len));
        let out = Shards::new(out);
        let locals = Shards::new(&mut self.locals);
        let view = View {
            shape,
            q,
            k_cache,
            v_cache,
            seqs,
            out: &out,
        };
        pool.for_each_chunk(tasks.len(), |tid, i| {
            let task = &tasks[i];
            // SAFETY: each thread has a scratch of its own, each part of a divided task a partial result.
            let (scratch, partial) = unsafe {
                (
                    &mut locals.part(tid, 1)[0],
                    (task.parts > 1)
                        .then(|| partials.part(task.partial * partial_len, partial_len)),
                )
            };
            isa.dispatch(Attend {
                view: &view,
                task,
                scratch: scratch.get(scratch_len(hd, width)),
                partial,
            });
        });
        if n_partials == 0 {
            return;
        }
        let firsts: Vec<&Task> = tasks
            .iter()
            .filter(|t| t.positions.start == 0 && t.parts > 1)
            .collect();
        pool.for_each_chunk(firsts.len(), |_, i| {
            let task = firsts[i];
            // SAFETY: the parts of a task lie side by side and are merged by one thread.
            let parts =
                unsafe { partials.part(task.partial * partial_len, task.parts * partial_len) };
            isa.dispatch(Merge {
                view: &view,
                task,
                parts,
            });
        });
    }
}

fn check(
    shape: &AttentionShape,
    q: &[f32],
    k_cache: &[f32],
    v_cache: &[f32],
    seqs: &[SeqView<'_>],
    out: &[f32],
) {
    let row = shape.n_heads * shape.head_dim;
    let block = shape.n_kv_heads * KV_BLOCK * shape.head_dim;
    assert!(row > 0 && shape.n_kv_heads > 0 && shape.n_heads.is_multiple_of(shape.n_kv_heads));
    assert_eq!(q.len(), out.len());
    assert_eq!(k_cache.len(), v_cache.len());
    for seq in seqs {
        assert!((seq.q_start + seq.q_len) * row <= q.len());
        assert!(seq.q_len <= seq.context_len);
        let used = &seq.block_table[..seq.context_len.div_ceil(KV_BLOCK)];
        assert!(
            used.iter()
                .all(|&b| (b as usize + 1) * block <= k_cache.len())
        );
    }
}

/// One task a tile of rows, the longest first: threads that take them in turn end together.
fn whole_tasks(shape: &AttentionShape, seqs: &[SeqView<'_>], width: usize) -> Vec<Task> {
    let group = shape.n_heads / shape.n_kv_heads;
    let mut tasks = Vec::new();
    for (i, seq) in seqs.iter().enumerate() {
        let rows = seq.q_len * group;
        for row in (0..rows).step_by(width) {
            let last_token = ((row + width).min(rows) - 1) / group;
            let end = seq.context_len - seq.q_len + last_token + 1;
            tasks.extend((0..shape.n_kv_heads).map(|kv_head| Task {
                seq: i,
                kv_head,
                row,
                positions: 0..end,
                parts: 1,
                partial: 0,
            }));
        }
    }
    tasks.sort_by_key(|t| std::cmp::Reverse(t.positions.end));
    tasks
}

/// Divides the positions of decode tasks when there are too few tasks; returns the number of partial results.
fn split_tasks(
    tasks: &mut Vec<Task>,
    shape: &AttentionShape,
    seqs: &[SeqView<'_>],
    threads: usize,
) -> usize {
    let wanted = TASKS_PER_THREAD * threads;
    if threads == 1 || tasks.len() >= wanted {
        return 0;
    }
    let most = wanted.div_ceil(tasks.len().max(1));
    let group = shape.n_heads / shape.n_kv_heads;
    let mut partials = 0;
    let divided = tasks.iter().flat_map(|task| {
        let n = task.positions.end;
        // All rows of a decode task see all its positions; a prefill tile's rows do not.
        let parts = if seqs[task.seq].q_len == 1 && group > 0 {
            (n / MIN_SPLIT).clamp(1, most)
        } else {
            1
        };
        let step = n.div_ceil(parts).next_multiple_of(CHUNK);
        let parts = n.div_ceil(step);
        let first = partials;
        partials += if parts > 1 { parts } else { 0 };
        (0..parts).map(move |i| Task {
            positions: i * step..((i + 1) * step).min(n),
            parts,
            partial: first + i,
            ..task.clone()
        })
    });
    *tasks = divided.collect();
    partials
}

/// Queries and sums `[head_dim][width]` each, scores `[CHUNK][width]`, maximum, total and limit of each row.
fn scratch_len(head_dim: usize, width: usize) -> usize {
    (2 * head_dim + CHUNK + 3) * width
}

/// The buffers of a call.
struct View<'a> {
    shape: AttentionShape,
    q: &'a [f32],
    k_cache: &'a [f32],
    v_cache: &'a [f32],
    seqs: &'a [SeqView<'a>],
    out: &'a Shards<f32>,
}

impl View<'_> {
    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    /// How many rows a task has.
    fn rows(&self, task: &Task, width: usize) -> usize {
        width.min(self.seqs[task.seq].q_len * self.group() - task.row)
    }

    /// Where row `r` of a task lies in `q` and `out`.
    fn row_offset(&self, task: &Task, r: usize) -> usize {
        let (token, head) = ((task.row + r) / self.group(), (task.row + r) % self.group());
        let row = self.seqs[task.seq].q_start + token;
        (row * self.shape.n_heads + task.kv_head * self.group() + head) * self.shape.head_dim
    }

    /// How many positions row `r` of a task may see.
    fn limit(&self, task: &Task, r: usize) -> usize {
        let seq = &self.seqs[task.seq];
        seq.context_len - seq.q_len + (task.row + r) / self.group() + 1
    }

    /// The task's queries times the scale, row by row.
    #[inline(always)]
    fn scaled_queries(&self, task: &Task, rows: usize, out: &mut [f32]) {
        let hd = self.shape.head_dim;
        for (r, out) in out.chunks_exact_mut(hd).take(rows).enumerate() {
            let q = &self.q[self.row_offset(task, r)..][..hd];
            for (out, q) in out.iter_mut().zip(q) {
                *out = q * self.shape.scale;
            }
        }
    }

    /// Where the blocks from position `start` on begin in the cache: as many as the task has, for a chunk and one more.
    #[inline(always)]
    fn offsets(&self, task: &Task, start: usize) -> [usize; CHUNK / KV_BLOCK + 1] {
        let blocks = start / KV_BLOCK..task.positions.end.div_ceil(KV_BLOCK);
        let table = &self.seqs[task.seq].block_table[blocks];
        let mut offsets = [0; CHUNK / KV_BLOCK + 1];
        for (offset, &block) in offsets.iter_mut().zip(table) {
            let shape = &self.shape;
            *offset = kv_offset(
                block as usize,
                task.kv_head,
                shape.n_kv_heads,
                shape.head_dim,
            );
        }
        offsets
    }

    /// Writes `sums[head_dim][width] / total[width]` to the task's rows of `out`; `rows_first` is room for them.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        s: S,
        task: &Task,
        sums: &mut [f32],
        total: &[f32],
        rows_first: &mut [f32],
    ) {
        let (hd, width) = (self.shape.head_dim, 2 * S::LANES);
        let rows = self.rows(task, width);
        for sums in sums.chunks_exact_mut(width) {
            for (sum, total) in sums.iter_mut().zip(total) {
                *sum /= total;
            }
        }
        assert!(sums.len() >= hd * width && rows_first.len() >= hd * width);
        // SAFETY: both hold `hd · width` elements, as asserted.
        unsafe {
            let (src, dst) = (sums.as_ptr(), rows_first.as_mut_ptr());
            transpose(s, (hd, rows), src, width, dst, hd);
        }
        for (r, row) in rows_first.chunks_exact(hd).take(rows).enumerate() {
            // SAFETY: a row of `out` belongs to one task.
            unsafe { self.out.part(self.row_offset(task, r), hd) }.copy_from_slice(row);
        }
    }
}

/// One task.
struct Attend<'a> {
    view: &'a View<'a>,
    task: &'a Task,
    scratch: &'a mut [f32],
    /// Where sums, maximum and total go if other tasks have the other positions.
    partial: Option<&'a mut [f32]>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (hd, width) = (self.view.shape.head_dim, 2 * S::LANES);
        if self.view.rows(self.task, width) <= MAX_ROWS && hd.is_multiple_of(S::LANES) {
            return self.narrow(s);
        }
        let wide = self.view.rows(self.task, width) > S::LANES;
        let (queries, rest) = self.scratch.split_at_mut(hd * width);
        let (sums, rest) = rest.split_at_mut(hd * width);
        let (scores, rest) = rest.split_at_mut(CHUNK * width);
        let (maximum, rest) = rest.split_at_mut(width);
        let (total, limit) = rest.split_at_mut(width);
        let mut state = State {
            queries,
            sums,
            scores,
            maximum,
            total,
            limit,
        };
        state.begin(s, self.view, self.task);
        for start in self.task.positions.clone().step_by(CHUNK) {
            let n = CHUNK.min(self.task.positions.end - start);
            state.chunk(s, self.view, self.task, start, n, wide);
        }
        let State {
            queries,
            sums,
            maximum,
            total,
            ..
        } = state;
        match self.partial {
            None => self.view.finish(s, self.task, sums, total, queries),
            Some(partial) => {
                let (partial_sums, rest) = partial.split_at_mut(hd * width);
                partial_sums.copy_from_slice(sums);
                rest[..width].copy_from_slice(maximum);
                rest[width..].copy_from_slice(total);
            }
        }
    }
}

impl Attend<'_> {
    /// A task with too few rows to fill vectors with.
    #[inline(always)]
    fn narrow<S: Simd>(self, s: S) {
        let (view, task) = (self.view, self.task);
        let (hd, width) = (view.shape.head_dim, 2 * S::LANES);
        let rows = view.rows(task, width);
        let (queries, rest) = self.scratch.split_at_mut(rows * hd);
        let sums = &mut rest[..rows * hd];
        view.scaled_queries(task, rows, queries);
        sums.fill(0.0);
        let narrow = Narrow {
            head_dim: hd,
            k_cache: view.k_cache,
            v_cache: view.v_cache,
            limits: std::array::from_fn(|r| view.limit(task, r.min(rows - 1))),
        };
        let mut state = NarrowState {
            queries,
            sums,
            maximum: [MASKED; MAX_ROWS],
            total: [0.0; MAX_ROWS],
        };
        for start in task.positions.clone().step_by(CHUNK) {
            let n = CHUNK.min(task.positions.end - start);
            let offsets = view.offsets(task, start);
            narrow.chunk(s, rows, &mut state, &offsets, start, n);
        }
        let NarrowState {
            sums,
            maximum,
            total,
            ..
        } = state;
        let Some(partial) = self.partial else {
            for (r, sums) in sums.chunks_exact(hd).enumerate() {
                // SAFETY: a row of `out` belongs to one task.
                let out = unsafe { view.out.part(view.row_offset(task, r), hd) };
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum / total[r];
                }
            }
            return;
        };
        for (r, sums) in sums.chunks_exact(hd).enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                partial[i * width + r] = *sum;
            }
            partial[hd * width + r] = maximum[r];
            partial[(hd + 1) * width + r] = total[r];
        }
    }
}

/// Combines the partial results of one divided task.
struct Merge<'a> {
    view: &'a View<'a>,
    task: &'a Task,
    /// `[part][sums: head_dim · width, maximum: width, total: width]`.
    parts: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (hd, width) = (self.view.shape.head_dim, 2 * S::LANES);
        let len = (hd + 2) * width;
        let (first, others) = self.parts.split_at_mut(len);
        for other in others.chunks_exact(len) {
            for lane in (0..width).step_by(S::LANES) {
                // SAFETY: a part has `hd + 2` rows of `width`, the last two the maximum and the total.
                unsafe {
                    let (a, b) = (first.as_mut_ptr().add(lane), other.as_ptr().add(lane));
                    let (max_a, max_b) = (s.load(a.add(hd * width)), s.load(b.add(hd * width)));
                    let max = s.max(max_a, max_b);
                    let (fa, fb) = (s.exp(s.sub(max_a, max)), s.exp(s.sub(max_b, max)));
                    for i in (0..hd).chain([hd + 1]) {
                        let (a, b) = (a.add(i * width), b.add(i * width));
                        s.store(a, s.fma(s.load(a), fa, s.mul(s.load(b), fb)));
                    }
                    s.store(a.add(hd * width), max);
                }
            }
        }
        let (sums, rest) = first.split_at_mut(hd * width);
        // The next part has served its purpose.
        self.view.finish(s, self.task, sums, &rest[width..], others);
    }
}
