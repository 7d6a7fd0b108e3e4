//! The forward pass against transformers in float32: every golden model, on 1 to 4 ranks, in every way a prompt can be
//! cut into steps.

use crate::support::{Golden, Ranked, golden, on_ranks, relative_error, tiny_models};
use tandem::layout::{KV_BLOCK, Limits};
use tandem::model::{Batch, BatchSeq};

/// Both sides compute in f32 from the same weights; they differ in the order of sums only, which for these depths and
/// widths stays near 1e-6. A wrong rotation, mask or slice shows at 1e-2 and above.
const TOLERANCE: f64 = 1e-4;

const LIMITS: Limits = Limits {
    max_step_tokens: 256,
    max_logit_rows: 256,
    n_kv_blocks: 40,
};

/// A sequence that is being fed, with its blocks in an order of its own.
struct Feed<'a> {
    ids: &'a [u32],
    blocks: Vec<u32>,
    done: usize,
    logits: Vec<f32>,
}

impl<'a> Feed<'a> {
    fn new(ids: &'a [u32], first_block: u32) -> Self {
        // Not in ascending order: a block table that is ignored must show.
        let n = ids.len().div_ceil(KV_BLOCK) as u32;
        Feed {
            ids,
            blocks: (first_block..first_block + n).rev().collect(),
            done: 0,
            logits: Vec::new(),
        }
    }

    fn left(&self) -> usize {
        self.ids.len() - self.done
    }
}

/// One step over the next `n` tokens of each feed; the logits of all of them are kept.
fn step(rank: &mut Ranked, feeds: &mut [(&mut Feed, usize)]) {
    let mut batch = Batch::default();
    for (feed, n) in feeds.iter() {
        let (start, context_len) = (batch.tokens.len(), feed.done + n);
        batch.tokens.extend(&feed.ids[feed.done..context_len]);
        batch.positions.extend(feed.done as u32..context_len as u32);
        let blocks = feed.blocks[..context_len.div_ceil(KV_BLOCK)].to_vec();
        batch.seqs.push(BatchSeq {
            start,
            len: *n,
            context_len,
            blocks,
        });
    }
    let total = batch.tokens.len();
    batch.logit_rows = (0..total as u32).collect();
    let logits = rank.forward(&batch).unwrap();
    let vocab = logits.len() / total;
    let mut rows = logits.chunks(vocab);
    for (feed, n) in feeds {
        rows.by_ref()
            .take(*n)
            .for_each(|row| feed.logits.extend_from_slice(row));
        feed.done += *n;
    }
}

/// Feeds one prompt in steps of `chunk` tokens.
fn in_chunks(rank: &mut Ranked, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut feed = Feed::new(ids, 3);
    while feed.left() > 0 {
        let n = chunk.min(feed.left());
        step(rank, &mut [(&mut feed, n)]);
    }
    feed.logits
}

#[test]
fn logits_match_transformers_for_every_world_size_and_chunking() {
    for name in tiny_models() {
        let dir = golden("models").join(&name);
        let file = Golden::read(&dir.join("golden.safetensors"));
        for tp_size in [1, 2, 3, 4, 8] {
            let (short, long) = (file.ids("short.ids"), file.ids("long.ids"));
            let results = on_ranks(&dir, tp_size, LIMITS, |rank| {
                let whole = |rank: &mut Ranked, ids: &[u32]| in_chunks(rank, ids, 256);
                (
                    whole(rank, &short),
                    whole(rank, &long),
                    in_chunks(rank, &long, 23),
                    in_chunks(rank, &long, 1),
                )
            });
            let (want_short, want_long) = (file.f32("short.logits"), file.f32("long.logits"));
            for (r, (a, b, chunked, single)) in results.iter().enumerate() {
                let runs = [
                    (a, &want_short),
                    (b, &want_long),
                    (chunked, &want_long),
                    (single, &want_long),
                ];
                for (i, (got, want)) in runs.into_iter().enumerate() {
                    let vocab = want.len() / if i == 0 { short.len() } else { long.len() };
                    for (position, (got, want)) in
                        got.chunks(vocab).zip(want.chunks(vocab)).enumerate()
                    {
                        let error = relative_error(got, want);
                        assert!(
                            error < TOLERANCE,
                            "{name}, rank {r} of {tp_size}, run {i}, position {position}: error {error:.1e}"
                        );
                    }
                }
                assert!(
                    results[0].0 == *a,
                    "{name}: rank {r} of {tp_size} holds other bits than rank 0"
                );
            }
        }
    }
}

#[test]
fn a_mixed_batch_equals_its_sequences_alone() {
    for name in ["qwen2-9heads", "qwen3-tied"] {
        let dir = golden("models").join(name);
        let file = Golden::read(&dir.join("golden.safetensors"));
        let (short, long) = (file.ids("short.ids"), file.ids("long.ids"));
        for tp_size in [1, 2, 4] {
            on_ranks(&dir, tp_size, LIMITS, |rank| {
                let mut a = Feed::new(&long, 0);
                let mut b = Feed::new(&short, 10);
                let mut c = Feed::new(&short[5..], 20);
                // A prompt and a decode token, two chunks and a decode token, three decode tokens.
                step(rank, &mut [(&mut a, 40), (&mut b, 1)]);
                step(rank, &mut [(&mut b, 7), (&mut c, 20), (&mut a, 1)]);
                while c.left() > 0 {
                    step(rank, &mut [(&mut c, 1), (&mut a, 1), (&mut b, 1)]);
                }
                let alone = |rank: &mut Ranked, ids: &[u32]| in_chunks(rank, ids, 256);
                for (feed, ids) in [(a, &long[..]), (b, &short), (c, &short[5..])] {
                    let want = alone(rank, ids);
                    assert!(
                        feed.logits.iter().all(|x| x.is_finite()),
                        "{name} on {tp_size}: not finite"
                    );
                    let error = relative_error(&feed.logits, &want[..feed.logits.len()]);
                    // The same sums in another order: far below what a mixed-up cache would give.
                    assert!(error < 1e-5, "{name} on {tp_size}: error {error:.1e}");
                }
            });
        }
    }
}
