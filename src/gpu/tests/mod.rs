//! The whole GPU path against golden files: what transformers computes in float32 for tiny models.

mod against_cpu;
mod ahead;
mod ending;
mod faults;
mod offloaded;
mod on_gpu;
mod probe;

use super::standin::{Options, Standin};
use super::*;
use crate::Result;
use crate::comm::HostCollective;
use crate::config::ModelConfig;
use crate::layout::{CANDIDATES, Geometry, KV_BLOCK, Limits, Shard};
use crate::model::{Backend, Batch, BatchSeq, Choice, check_tensors, forward};
use crate::weights::{Checkpoint, Source};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// The golden tensors of one file, as f32 or i64.
struct Golden {
    header: serde_json::Value,
    data: Vec<u8>,
}

impl Golden {
    fn open(dir: &Path) -> Golden {
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        Golden {
            header,
            data: bytes[8 + n..].to_vec(),
        }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let at = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        &self.data[at(0)..at(1)]
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name)
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.bytes(name)
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as u32)
            .collect()
    }
}

/// Ranks that are threads of one process.
struct ThreadRanks {
    rank: usize,
    to: Vec<Sender<Vec<f32>>>,
    from: Vec<Receiver<Vec<f32>>>,
}

impl ThreadRanks {
    fn all(size: usize) -> Vec<ThreadRanks> {
        let mut ranks: Vec<_> = (0..size)
            .map(|rank| ThreadRanks {
                rank,
                to: vec![],
                from: vec![],
            })
            .collect();
        for from in 0..size {
            for to in 0..size {
                let (sender, receiver) = channel();
                ranks[from].to.push(sender);
                ranks[to].from.push(receiver);
            }
        }
        ranks
    }

    /// What `run` gives on each of `size` ranks, in rank order; each has a thread.
    fn each<T: Send>(size: usize, run: impl Fn(ThreadRanks) -> T + Sync) -> Vec<T> {
        let run = &run;
        std::thread::scope(|scope| {
            let start = |comm: ThreadRanks| scope.spawn(move || run(comm));
            let threads: Vec<_> = ThreadRanks::all(size).into_iter().map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    fn exchange(&mut self, mine: &[f32]) -> Result<Vec<Vec<f32>>> {
        let lost = |_| crate::Error::failed("a rank is gone");
        for to in &self.to {
            to.send(mine.to_vec())
                .map_err(|_| crate::Error::failed("a rank is gone"))?;
        }
        self.from
            .iter()
            .map(|from| from.recv_timeout(Duration::from_secs(60)).map_err(lost))
            .collect()
    }
}

impl HostCollective for ThreadRanks {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.to.len()
    }
    fn all_reduce(&mut self, x: &mut [f32]) -> Result<()> {
        let all = self.exchange(x)?;
        x.fill(0.0);
        all.iter()
            .for_each(|one| x.iter_mut().zip(one).for_each(|(x, y)| *x += y));
        Ok(())
    }
    fn all_gather(&mut self, local: &[f32], counts: &[usize], out: &mut [f32]) -> Result<()> {
        let all = self.exchange(local)?.concat();
        assert_eq!(all.len(), counts.iter().sum::<usize>());
        out.copy_from_slice(&all);
        Ok(())
    }
}

/// Rows of logits that the tests take for padding.
const PADDING: usize = 3;

/// One rank with its model, ready to step.
struct Rank(LoadedRank);

impl Rank {
    fn load(
        dir: &Path,
        tp_size: usize,
        tp_rank: usize,
        parts: Parts,
        limits: Limits,
    ) -> Result<Rank> {
        Rank::load_with(dir, tp_size, tp_rank, parts, limits, Host::default())
    }

    fn load_with(
        dir: &Path,
        tp_size: usize,
        tp_rank: usize,
        parts: Parts,
        limits: Limits,
        host: Host,
    ) -> Result<Rank> {
        let mut config = ModelConfig::from_dir(dir)?;
        let mut checkpoint = Checkpoint::open(dir)?;
        let dtype = check_tensors(&mut config, &mut checkpoint)?;
        let shard = Shard::new(&config, tp_size, tp_rank);
        load_rank(
            &config,
            Source::Checkpoint(&checkpoint),
            dtype,
            &shard,
            limits,
            parts,
            host,
            1,
            &|_| {},
        )
        .map(Rank::of)
    }

    /// The last three tokens only pad the vocabulary.
    fn of(mut loaded: LoadedRank) -> Rank {
        let vocab = loaded.activations.logits.cols();
        loaded.backend.set_known_tokens(vocab - PADDING);
        Rank(loaded)
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let LoadedRank {
            backend,
            model,
            activations,
            ..
        } = &mut self.0;
        forward(backend, model, activations, batch)?;
        let vocab = activations.logits.cols();
        let known = vocab - PADDING;
        let fetch = backend.fetch_choices()?.unwrap();
        let chosen = backend.choices(fetch)?;
        let logits = backend.read_logits(&activations.logits)?.to_vec();
        check_choices(&chosen, &logits, vocab, known);
        Ok(logits)
    }
}

/// What the device chose from each row against the row itself.
fn check_choices(chosen: &[Choice], logits: &[f32], vocab: usize, known: usize) {
    assert_eq!(chosen.len(), logits.len() / vocab);
    for (c, row) in chosen.iter().zip(logits.chunks(vocab)) {
        let row = &row[..known];
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = row.iter().position(|&l| l == max);
        if row.iter().any(|l| l.is_nan()) {
            continue;
        }
        assert_eq!((Some(c.token as usize), c.logit), (first, max));
        let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
        // Sums of a few hundred to a hundred thousand f32 terms between 0 and 1.
        assert!((c.log_sum_exp - (f64::from(max) + sum.ln())).abs() < 1e-4);
    }
}

/// Tokens `from..to` of a sequence whose blocks are scattered over the cache.
fn chunk(ids: &[u32], from: usize, to: usize) -> Batch {
    let blocks = (0..to.div_ceil(KV_BLOCK) as u32).map(|i| 11 - i).collect();
    Batch {
        tokens: ids[from..to].to_vec(),
        positions: (from as u32..to as u32).collect(),
        seqs: vec![BatchSeq {
            start: 0,
            len: to - from,
            context_len: to,
            blocks,
        }],
        logit_rows: (0..(to - from) as u32).collect(),
        draws: Vec::new(),
    }
}

const LIMITS: Limits = Limits {
    max_step_tokens: 96,
    max_logit_rows: 96,
    n_kv_blocks: 12,
};

/// The logits of every position: a prefill of all but the last `decoded` tokens in one or two chunks, then one at a time.
fn logits(rank: &mut Rank, ids: &[u32], first: usize, decoded: usize) -> Result<Vec<f32>> {
    let prefilled = ids.len() - decoded;
    let mut ends = vec![first.min(prefilled), prefilled];
    ends.extend(prefilled + 1..=ids.len());
    ends.dedup();
    let mut all = Vec::new();
    let mut from = 0;
    for to in ends {
        all.extend(rank.step(&chunk(ids, from, to))?);
        from = to;
    }
    Ok(all)
}

/// How far rows of logits are from the golden ones: the root of the mean square of the difference over that of the
/// golden row, for the worst row and for all rows together.
fn distance(got: &[f32], want: &[f32], vocab: usize) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    let square = |it: &mut dyn Iterator<Item = f64>| it.map(|d| d * d).sum::<f64>();
    let ratio = |got: &[f32], want: &[f32]| {
        let off = square(&mut got.iter().zip(want).map(|(g, w)| f64::from(g - w)));
        (off / square(&mut want.iter().map(|w| f64::from(*w)))).sqrt()
    };
    let rows = got.chunks(vocab).zip(want.chunks(vocab));
    // A NaN anywhere is the worst of all.
    let worst = rows
        .map(|(g, w)| ratio(g, w))
        .fold(0.0, |m: f64, r| if r.is_nan() || r > m { r } else { m });
    (worst, ratio(got, want))
}

fn models() -> PathBuf {
    // A test binary that was carried to another machine runs in the root of the repository there.
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = if built.exists() {
        built
    } else {
        Path::new(".")
    };
    root.join("tests/golden/models")
}

/// bf16 keeps 8 bits: each of the roundings on the way to a logit (about ten a layer, and the weights' scale where heads are
/// padded) is off by up to 2^-9 of its value, some 0.1% in the root of the mean square. Two or three layers of them add
/// up to about 1% of a row; a float16 or float32 checkpoint adds the rounding of every weight. One wrong head, position
/// or shard moves a row by 10% and more.
const WORST_ROW: f64 = 0.05;
const ALL_ROWS: f64 = 0.025;

fn check_prompts(name: &str, outcome: &[Vec<f32>], golden: &Golden) {
    for (prompt, got) in ["short", "long"].iter().zip(outcome) {
        let want = golden.floats(&format!("{prompt}.logits"));
        let vocab = want.len() / golden.ids(&format!("{prompt}.ids")).len();
        let (worst, all) = distance(got, &want, vocab);
        println!("{name} {prompt}: worst row {worst:.4}, all rows {all:.4}");
        assert!(
            worst < WORST_ROW && all < ALL_ROWS,
            "{name} {prompt}: worst row {worst:.4}, all rows {all:.4}"
        );
    }
}

/// Both prompts in two chunks and then token by token; the second chunk of one is so short that it takes a decode step's kernels.
fn both_prompts(rank: &mut Rank, golden: &Golden) -> Result<Vec<Vec<f32>>> {
    let short = logits(rank, &golden.ids("short.ids"), 25, 6)?;
    let long = logits(rank, &golden.ids("long.ids"), 50, 3)?;
    Ok(vec![short, long])
}

fn check_golden(name: &str, tp_size: usize, compute: (u32, u32)) {
    let dir = models().join(name);
    let golden = Golden::open(&dir);
    let outcomes = ThreadRanks::each(tp_size, |comm| {
        let rank = comm.rank;
        let options = Options {
            seed: 7 * rank as u64 + 1,
            ordinal: rank as u32,
            compute,
            ..Options::default()
        };
        let peers: Option<Box<dyn HostCollective>> = if tp_size > 1 {
            Some(Box::new(comm))
        } else {
            None
        };
        let hidden = ModelConfig::from_dir(&dir)?.hidden_size;
        let standin = Arc::new(Standin::new(options));
        let parts = Parts::standin(&standin, peers, hidden)?;
        if tp_size > 1 {
            assert_eq!(parts.comm.name(), "peer memory");
        }
        both_prompts(
            &mut Rank::load(&dir, tp_size, rank, parts, LIMITS)?,
            &golden,
        )
    });
    let outcomes: Result<Vec<Vec<Vec<f32>>>> = outcomes.into_iter().collect();
    let outcomes = outcomes.unwrap();
    check_prompts(&format!("{name} on {tp_size}"), &outcomes[0], &golden);
    assert!(
        outcomes.iter().all(|o| *o == outcomes[0]),
        "{name} on {tp_size}: the ranks' logits differ"
    );
}

fn golden_names() -> Vec<String> {
    let entries = std::fs::read_dir(models()).unwrap().map(|e| e.unwrap());
    let cases = entries.filter(|e| e.path().join("golden.safetensors").exists());
    let mut names: Vec<_> = cases
        .map(|e| e.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 12);
    names
}

/// Kernels are chosen by the GPU: those for Hopper, and those for the others.
const HOPPER: (u32, u32) = (9, 0);
const AMPERE: (u32, u32) = (8, 0);

fn check_all_golden(tp_size: usize, compute: (u32, u32)) {
    let check = |name: &String| check_golden(name, tp_size, compute);
    golden_names().iter().for_each(check);
}

#[test]
fn golden_models_on_1_rank() {
    check_all_golden(1, HOPPER);
}

#[test]
fn golden_models_on_1_rank_of_an_older_gpu() {
    check_all_golden(1, AMPERE);
}

#[test]
fn golden_models_on_2_ranks() {
    check_all_golden(2, HOPPER);
}

#[test]
fn golden_models_on_3_ranks() {
    check_all_golden(3, AMPERE);
}

#[test]
fn golden_models_on_4_ranks() {
    check_all_golden(4, HOPPER);
}

/// One decode token of each sequence, or the rest of its prompt where it has not begun.
fn batch_of(prompts: &[(&[u32], usize, usize)]) -> Batch {
    let mut batch = Batch::default();
    for (i, &(ids, from, to)) in prompts.iter().enumerate() {
        let start = batch.tokens.len();
        batch.tokens.extend(&ids[from..to]);
        batch.positions.extend(from as u32..to as u32);
        // Six blocks each, scattered.
        let blocks = (0..to.div_ceil(KV_BLOCK) as u32)
            .map(|b| 2 * b + i as u32)
            .collect();
        batch.seqs.push(BatchSeq {
            start,
            len: to - from,
            context_len: to,
            blocks,
        });
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
    }
    batch
}

/// Prefill of one sequence beside decode of another, then both decoding in one batch, graphs and all.
#[test]
fn sequences_share_steps_without_disturbing_each_other() {
    for name in ["qwen2-untied", "qwen3-sharded"] {
        let dir = models().join(name);
        let golden = Golden::open(&dir);
        let (short, long) = (golden.ids("short.ids"), golden.ids("long.ids"));
        let parts = Parts::standin(&Arc::new(Standin::new(Options::default())), None, 0).unwrap();
        let mut rank = Rank::load(&dir, 1, 0, parts, LIMITS).unwrap();
        let mut steps = vec![
            batch_of(&[(&long, 0, 80)]),
            batch_of(&[(&short, 0, 26), (&long, 80, 81)]),
        ];
        steps.extend(
            (0..10).map(|i| batch_of(&[(&short, 26 + i, 27 + i), (&long, 81 + i, 82 + i)])),
        );
        for batch in &mut steps[..1] {
            // The long sequence keeps the blocks that it has in the later steps.
            batch.seqs[0].blocks = (0..5).map(|b| 2 * b + 1).collect();
            // A chunk that is not the last of its prompt wants no logits at all.
            batch.logit_rows.clear();
        }
        for batch in &steps {
            let got = rank.step(batch).unwrap();
            for (row, seq) in got.chunks(300).zip(&batch.seqs) {
                let prompt = if seq.blocks[0] == 0 { "short" } else { "long" };
                let all = golden.floats(&format!("{prompt}.logits"));
                let (worst, _) = distance(row, &all[(seq.context_len - 1) * 300..][..300], 300);
                assert!(
                    worst < WORST_ROW,
                    "{name} {prompt} {}: {worst:.4}",
                    seq.context_len
                );
            }
        }
        assert!(rank.0.backend.recorded_graphs() >= 1);
    }
}

fn run_with(options: Options) -> Result<Vec<f32>> {
    let dir = models().join("qwen2-tied");
    let golden = Golden::open(&dir);
    let parts = Parts::standin(&Arc::new(Standin::new(options)), None, 0)?;
    let mut rank = Rank::load(&dir, 1, 0, parts, LIMITS)?;
    logits(&mut rank, &golden.ids("short.ids"), 25, 6)
}

#[test]
fn the_same_run_gives_the_same_bits_in_any_order_of_streams_and_blocks() {
    let with = |seed| {
        run_with(Options {
            seed,
            ..Options::default()
        })
        .unwrap()
    };
    assert_eq!(with(1), with(2));
}

#[test]
fn ranks_without_peer_memory_take_the_other_way_together() {
    let exchanged = ThreadRanks::each(3, |mut comm| {
        let mine = [comm.rank as u8, 255];
        let agreed = super::one_shot::ranks_agree(&mut comm, mine[0] != 1).unwrap();
        (
            agreed,
            super::one_shot::exchange_bytes(&mut comm, &mine).unwrap(),
        )
    });
    assert!(
        exchanged
            .iter()
            .all(|e| *e == (false, vec![0, 255, 1, 255, 2, 255]))
    );
}
