//! Against softmax attention in f64.

use super::super::testing::{Rng, assert_close, pools};
use super::*;

/// Softmax attention of one row over `context` positions, in f64.
fn reference(
    q: &[f32],
    scale: f32,
    context: usize,
    kv: impl Fn(usize) -> (Vec<f32>, Vec<f32>),
) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    let scores: Vec<f64> = (0..context)
        .map(|p| dot(q, &kv(p).0) * f64::from(scale))
        .collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let mut out = vec![0.0; q.len()];
    for (p, score) in scores.iter().enumerate() {
        for (out, v) in out.iter_mut().zip(kv(p).1) {
            *out += (score - max).exp() / total * f64::from(v);
        }
    }
    out
}

struct Case {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    /// (new tokens, context after them) of each sequence.
    seqs: &'static [(usize, usize)],
}

const CASES: &[Case] = &[
    Case {
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        seqs: &[(1, 1), (5, 5), (1, 700), (20, 83), (0, 4)],
    },
    Case {
        n_heads: 14,
        n_kv_heads: 2,
        head_dim: 16,
        seqs: &[(1, 2000)],
    },
    Case {
        n_heads: 40,
        n_kv_heads: 1,
        head_dim: 12,
        seqs: &[(3, 70), (1, 33)],
    },
    Case {
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: 5,
        seqs: &[(70, 70), (17, 600)],
    },
    Case {
        n_heads: 0,
        n_kv_heads: 0,
        head_dim: 64,
        seqs: &[(1, 1)],
    },
];

fn run(pool: &Pool, case: &Case) {
    let &Case {
        n_heads,
        n_kv_heads,
        head_dim: hd,
        seqs,
    } = case;
    let mut rng = Rng::new(11);
    let blocks: usize = seqs.iter().map(|&(_, n)| n.div_ceil(KV_BLOCK)).sum();
    // Blocks are handed out from the last to the first; what no position uses is NaN and must not be read.
    let mut k = vec![f32::NAN; blocks * n_kv_heads * KV_BLOCK * hd];
    let mut v = k.clone();
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    let tables: Vec<Vec<u32>> = seqs
        .iter()
        .map(|&(_, n)| {
            (0..n.div_ceil(KV_BLOCK))
                .map(|_| free.pop().unwrap())
                .collect()
        })
        .collect();
    let at = |table: &[u32], position: usize, head: usize| {
        kv_offset(table[position / KV_BLOCK] as usize, head, n_kv_heads, hd)
            + position % KV_BLOCK * hd
    };
    for (&(_, n), table) in seqs.iter().zip(&tables) {
        for (position, head) in (0..n).flat_map(|p| (0..n_kv_heads).map(move |h| (p, h))) {
            let range = at(table, position, head)..at(table, position, head) + hd;
            k[range.clone()].copy_from_slice(&rng.floats(hd, 2.0));
            v[range].copy_from_slice(&rng.floats(hd, 1.0));
        }
    }
    let tokens: usize = seqs.iter().map(|s| s.0).sum();
    let q = rng.floats(tokens * n_heads * hd, 2.0);
    let mut start = 0;
    let views: Vec<SeqView<'_>> = seqs
        .iter()
        .zip(&tables)
        .map(|(&(q_len, context_len), block_table)| {
            start += q_len;
            SeqView {
                q_start: start - q_len,
                q_len,
                context_len,
                block_table,
            }
        })
        .collect();
    let shape = AttentionShape {
        n_heads,
        n_kv_heads,
        head_dim: hd,
        scale: 0.7 / (hd as f32).sqrt(),
    };
    let mut kernels = Kernels::new(pool);
    let mut out = vec![f32::NAN; q.len()];
    kernels.attention(pool, shape, &q, &k, &v, &views, &mut out);
    for view in &views {
        for (t, h) in (0..view.q_len).flat_map(|t| (0..n_heads).map(move |h| (t, h))) {
            let row = ((view.q_start + t) * n_heads + h) * hd;
            let kv_head = h / (n_heads / n_kv_heads);
            let context = view.context_len - view.q_len + t + 1;
            let expected = reference(&q[row..row + hd], shape.scale, context, |p| {
                let at = at(view.block_table, p, kv_head);
                (k[at..at + hd].to_vec(), v[at..at + hd].to_vec())
            });
            // A score of size 3 is exact to 3 · 2⁻²⁴ · √head_dim, and its error passes through exp unchanged.
            assert_close(&out[row..row + hd], &expected, 3e-6);
        }
    }
    let mut again = vec![f32::NAN; q.len()];
    kernels.attention(pool, shape, &q, &k, &v, &views, &mut again);
    assert_eq!(out, again, "the same call gives the same bits");
}

#[test]
fn every_shape_matches_softmax_attention_in_f64() {
    for pool in pools() {
        CASES.iter().for_each(|case| run(&pool, case));
    }
}

#[test]
fn every_position_of_a_divided_task_is_covered_once() {
    let shape = AttentionShape {
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 8,
        scale: 1.0,
    };
    let table: Vec<u32> = (0..1000).collect();
    for context_len in [1, 255, 256, 512, 513, 5000] {
        let seqs = [SeqView {
            q_start: 0,
            q_len: 1,
            context_len,
            block_table: &table,
        }];
        let mut tasks = whole_tasks(&shape, &seqs, 32);
        let partials = split_tasks(&mut tasks, &shape, &seqs, 8);
        for kv_head in 0..2 {
            let mine: Vec<&Task> = tasks.iter().filter(|t| t.kv_head == kv_head).collect();
            let covered: Vec<usize> = mine.iter().flat_map(|t| t.positions.clone()).collect();
            assert_eq!(covered, (0..context_len).collect::<Vec<_>>());
            assert!(mine.iter().all(|t| t.parts == mine.len()));
        }
        assert_eq!(partials, if tasks.len() > 2 { tasks.len() } else { 0 });
    }
}
