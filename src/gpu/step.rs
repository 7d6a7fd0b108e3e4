//! The step at hand: its counts, and where its description lies on the device.

use super::driver::DevicePtr;
use crate::layout::{DRAW_WORDS, KV_BLOCK};
use crate::model::{Batch, BatchSeq};

/// Marks a token whose k and v go nowhere, as in `common.cuh`.
const NO_SLOT: u32 = u32::MAX;

/// Counts of a step, and the addresses of its tables. A decode step may be filled up with rows that nobody reads.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Tokens, filled up.
    pub n_tokens: usize,
    /// Sequences, filled up.
    pub n_seqs: usize,
    /// Rows of logits, filled up.
    pub n_rows: usize,
    /// Rows of logits that somebody reads, the first ones.
    pub n_wanted: usize,
    /// Most tokens that a sequence has in this step.
    pub longest: usize,
    /// Parts that attention cuts the cached tokens into.
    pub splits: usize,
    /// u32 `[n_tokens]`
    pub tokens: DevicePtr,
    /// u32 `[n_tokens]`
    pub positions: DevicePtr,
    /// u32 `[n_tokens]`: block · 16 + place in it.
    pub slots: DevicePtr,
    /// `Seq [n_seqs]` of `common.cuh`.
    pub seqs: DevicePtr,
    /// u32 `[n_rows]`
    pub rows: DevicePtr,
    /// `Draw [n_wanted]` of `candidates.cu`; none where no token is drawn.
    pub draws: Option<DevicePtr>,
    /// The block tables back to back: rows of one block, of which a sequence's `table_row` is the first.
    pub tables: DevicePtr,
}

/// What decides the launches of a decode step: steps with the same key differ in the contents of their tables only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeKey {
    n_seqs: usize,
    splits: usize,
}

impl DecodeKey {
    /// Sequences of the step.
    pub fn n_seqs(&self) -> usize {
        self.n_seqs
    }
}

impl Step {
    /// No step yet; tables will lie at `at`.
    pub fn none(at: DevicePtr) -> Step {
        Step {
            n_tokens: 0,
            n_seqs: 0,
            n_rows: 0,
            n_wanted: 0,
            longest: 0,
            splits: 1,
            tokens: at,
            positions: at,
            slots: at,
            seqs: at,
            rows: at,
            draws: None,
            tables: at,
        }
    }

    /// Writes the description of `batch` into `words`, whose copy lies at `at` on the device; the step and the number of
    /// words. `max_splits` is how far one sequence's attention should be cut up to fill the device; decode steps are filled
    /// up to the next [`bucket`] of `most`.
    pub fn describe(
        batch: &Batch,
        words: &mut [u32],
        at: DevicePtr,
        max_splits: usize,
        most: usize,
    ) -> (Step, usize) {
        let n_seqs = batch.seqs.len();
        let fill = if is_decode(batch) {
            n_seqs..bucket(n_seqs, most)
        } else {
            0..0
        };
        let filled = fill.len();
        let zeros = || std::iter::repeat_n(0, filled);
        let mut words = Words { words, at, n: 0 };
        // Sequences first: they are read 16 bytes at a time. Tables behind what has its place by the counts alone, and draws,
        // which no graph knows, behind those.
        let seqs =
            words.put(seq_rows(batch).chain(fill.clone().flat_map(|row| [row as u32, 1, 0, 0])));
        let tokens = words.put(batch.tokens.iter().copied().chain(zeros()));
        let positions = words.put(batch.positions.iter().copied().chain(zeros()));
        let slots = words.put(slots(batch).chain(std::iter::repeat_n(NO_SLOT, filled)));
        let wanted = batch.logit_rows.iter().copied();
        let rows = words.put(wanted.chain(fill.map(|row| row as u32)));
        let tables = words.put(batch.seqs.iter().flat_map(|s| s.blocks.iter().copied()));
        let draws = (!batch.draws.is_empty()).then(|| words.put_draws(batch));
        let longest = |f: fn(&BatchSeq) -> usize| batch.seqs.iter().map(f).max().unwrap_or(0);
        let step = Step {
            n_tokens: batch.tokens.len() + filled,
            n_seqs: n_seqs + filled,
            n_rows: batch.logit_rows.len() + filled,
            n_wanted: batch.logit_rows.len(),
            longest: longest(|s| s.len),
            splits: splits(longest(|s| s.context_len), n_seqs + filled, max_splits),
            tokens,
            positions,
            slots,
            seqs,
            rows,
            draws,
            tables,
        };
        (step, words.n)
    }

    /// The key of a step in which every sequence has one token and wants its logits.
    pub fn decode_key(&self) -> Option<DecodeKey> {
        let one_each = self.longest == 1 && self.n_rows == self.n_seqs;
        one_each.then_some(DecodeKey {
            n_seqs: self.n_seqs,
            splits: self.splits,
        })
    }
}

/// A step's tables on their way to `at` on the device, one behind the other.
struct Words<'a> {
    words: &'a mut [u32],
    at: DevicePtr,
    n: usize,
}

impl Words<'_> {
    /// Where `values` will lie.
    fn put(&mut self, values: impl Iterator<Item = u32>) -> DevicePtr {
        let begin = self.at.offset(4 * self.n);
        for value in values {
            self.words[self.n] = value;
            self.n += 1;
        }
        begin
    }

    /// 16 bytes are read at a time.
    fn put_draws(&mut self, batch: &Batch) -> DevicePtr {
        let first = self.n.next_multiple_of(4);
        self.n = first + DRAW_WORDS * batch.draws.len();
        put_draws(batch, &mut self.words[first..self.n]);
        self.at.offset(4 * first)
    }
}

/// Four words a sequence: first token, tokens, context, first word of its block table.
fn seq_rows(batch: &Batch) -> impl Iterator<Item = u32> {
    let mut table_row = 0;
    batch.seqs.iter().flat_map(move |s| {
        let row = table_row;
        table_row += s.blocks.len() as u32;
        [s.start as u32, s.len as u32, s.context_len as u32, row]
    })
}

/// Where in the cache each token's K and V go.
fn slots(batch: &Batch) -> impl Iterator<Item = u32> {
    batch.seqs.iter().flat_map(|s| {
        let slot = |p: usize| s.blocks[p / KV_BLOCK] * KV_BLOCK as u32 + (p % KV_BLOCK) as u32;
        (s.context_len - s.len..s.context_len).map(slot)
    })
}

fn put_draws(batch: &Batch, words: &mut [u32]) {
    let seq_of = |row: u32| batch.seqs.partition_point(|s| s.start <= row as usize) - 1;
    let rows = batch.draws.iter().zip(&batch.logit_rows);
    for ((d, &row), words) in rows.zip(words.as_chunks_mut().0) {
        *words = [
            d.temperature.to_bits(),
            d.top_k,
            d.top_p.to_bits(),
            d.min_p.to_bits(),
            d.repetition_penalty.to_bits(),
            d.uniform.to_bits(),
            seq_of(row) as u32,
            0,
        ];
    }
}

/// Whether every sequence has one token and wants its logits.
fn is_decode(batch: &Batch) -> bool {
    batch.seqs.iter().all(|s| s.len == 1) && batch.logit_rows.len() == batch.seqs.len()
}

/// How many sequences a decode step of `n` is filled up to, so that few graphs serve all numbers: the next power of two,
/// or `most`.
fn bucket(n: usize, most: usize) -> usize {
    n.next_power_of_two().min(most).max(n)
}

/// The launch rule of `attention_decode.cu`, in powers of two so that few different graphs are needed while contexts grow.
pub fn splits(longest_context: usize, n_seqs: usize, max_splits: usize) -> usize {
    let all = max_splits / n_seqs.max(1);
    let useful = longest_context
        .div_ceil(128)
        .min(all / 2)
        .max(longest_context.div_ceil(256));
    useful.next_power_of_two().min(all).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Draw;

    #[test]
    fn a_description_says_where_everything_is() {
        let seq = |start, len, context_len, blocks: &[u32]| BatchSeq {
            start,
            len,
            context_len,
            blocks: blocks.to_vec(),
        };
        let batch = Batch {
            tokens: vec![5, 6, 7],
            positions: vec![15, 16, 3],
            seqs: vec![seq(0, 2, 17, &[9, 4]), seq(2, 1, 4, &[2])],
            logit_rows: vec![1, 2],
            draws: Vec::new(),
        };
        let mut words = [0; 40];
        let (step, n) = Step::describe(&batch, &mut words, DevicePtr(1000), 8, 64);
        let at = |p: DevicePtr, n: usize| words[(p.0 as usize - 1000) / 4..][..n].to_vec();
        assert_eq!(at(step.seqs, 8), [0, 2, 17, 0, 2, 1, 4, 2]);
        assert_eq!(at(step.tokens, 3), [5, 6, 7]);
        assert_eq!(at(step.positions, 3), [15, 16, 3]);
        assert_eq!(at(step.slots, 3), [9 * 16 + 15, 4 * 16, 2 * 16 + 3]);
        assert_eq!(at(step.rows, 2), [1, 2]);
        assert_eq!(at(step.tables, 3), [9, 4, 2]);
        assert_eq!((n, step.longest, step.decode_key()), (22, 2, None));
        assert_eq!(step.draws, None);
        let draw = |top_k| Draw {
            temperature: 0.5,
            top_k,
            top_p: 0.75,
            min_p: 0.125,
            repetition_penalty: 1.5,
            uniform: 0.25,
        };
        let draws = vec![draw(20), draw(7)];
        let drawn = Batch { draws, ..batch };
        let (with, n) = Step::describe(&drawn, &mut words, DevicePtr(1000), 8, 64);
        // What a graph reads stays where it was; draws begin at 16 bytes.
        assert_eq!(
            (with.tables, with.draws, n),
            (step.tables, Some(DevicePtr(1096)), 40)
        );
        let bits = [0.5f32, 0.75, 0.125, 1.5, 0.25].map(f32::to_bits);
        let [temperature, top_p, min_p, penalty, uniform] = bits;
        let row = |top_k, seq| [temperature, top_k, top_p, min_p, penalty, uniform, seq, 0];
        assert_eq!(words[24..40], [row(20, 0), row(7, 1)].concat());
    }

    #[test]
    fn a_decode_step_is_filled_up_with_rows_that_touch_nothing() {
        let seq = |start, block| BatchSeq {
            start,
            len: 1,
            context_len: 3,
            blocks: vec![block],
        };
        let batch = Batch {
            tokens: vec![5, 6, 7],
            positions: vec![2; 3],
            seqs: vec![seq(0, 9), seq(1, 4), seq(2, 2)],
            logit_rows: vec![0, 1, 2],
            draws: Vec::new(),
        };
        let mut words = [99; 40];
        let (step, n) = Step::describe(&batch, &mut words, DevicePtr(0), 8, 64);
        let at = |p: DevicePtr, n: usize| words[p.0 as usize / 4..][..n].to_vec();
        assert_eq!((step.n_tokens, step.n_seqs, step.n_rows), (4, 4, 4));
        assert_eq!((step.n_wanted, n), (3, 16 + 4 * 4 + 3));
        assert_eq!(at(step.seqs, 16)[8..], [2, 1, 3, 2, 3, 1, 0, 0]);
        assert_eq!(at(step.tokens, 4), [5, 6, 7, 0]);
        assert_eq!(at(step.positions, 4), [2, 2, 2, 0]);
        assert_eq!(
            at(step.slots, 4),
            [9 * 16 + 2, 4 * 16 + 2, 2 * 16 + 2, NO_SLOT]
        );
        assert_eq!(at(step.rows, 4), [0, 1, 2, 3]);
        assert_eq!(at(step.tables, 3), [9, 4, 2]);
        let key = |most| {
            Step::describe(&batch, &mut [0; 40], DevicePtr(0), 8, most)
                .0
                .decode_key()
        };
        assert_eq!(key(64).unwrap().n_seqs(), 4);
        // As far as there is room, or not at all.
        assert_eq!(key(3).unwrap().n_seqs(), 3);
        assert_eq!(key(0).unwrap().n_seqs(), 3);
        assert_eq!(
            [5, 33, 40, 64, 65].map(|n| bucket(n, 48)),
            [8, 48, 48, 64, 65]
        );
    }

    #[test]
    fn splits_fill_the_device_and_change_seldom() {
        assert_eq!(splits(1, 1, 66), 1);
        assert_eq!(splits(129, 1, 66), 2);
        assert_eq!(splits(1024, 1, 66), 8);
        assert_eq!(splits(1025, 1, 66), 16);
        assert_eq!([splits(4096, 1, 66), splits(4096, 1, 33)], [32, 16]);
        assert_eq!(splits(4097, 1, 33), 32);
        assert_eq!(splits(100_000, 1, 66), 66);
        assert_eq!(splits(100_000, 8, 66), 8);
        assert_eq!(splits(100_000, 100, 66), 1);
    }
}
