//! The host one step ahead of the device: the same tokens as step by step, whatever ends where; and the warm-up before.

use super::*;
use crate::engine::{
    Engine, Event, FinishReason, Replica, Request, Sampled, SamplingParams, Scheduler, SeqId, Step,
    StepPlan,
};
use crate::world::{Group, Hello};

/// Never more than one step at a time.
struct StepByStep<S>(S, Vec<Sampled>);

impl<S: Step> Step for StepByStep<S> {
    fn submit(&mut self, plan: &StepPlan) -> Result<bool> {
        self.0.submit(plan)?;
        self.1 = self.0.collect()?;
        Ok(false)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>> {
        Ok(std::mem::take(&mut self.1))
    }
    fn finish(&mut self) -> Result<()> {
        self.0.finish()
    }
}

/// Counts how many steps are under way at a time, at most.
struct Counted<S>(S, usize, usize);

impl<S: Step> Step for Counted<S> {
    fn submit(&mut self, plan: &StepPlan) -> Result<bool> {
        self.1 += 1;
        self.2 = self.2.max(self.1);
        self.0.submit(plan)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>> {
        self.1 -= 1;
        self.0.collect()
    }
    fn finish(&mut self) -> Result<()> {
        self.0.finish()
    }
}

fn replica(dir: &Path, comm: ThreadRanks, warm: bool) -> Replica<GpuBackend> {
    let config = ModelConfig::from_dir(dir).unwrap();
    let (rank, size) = (comm.rank, comm.size());
    let peers: Option<Box<dyn HostCollective>> = match size {
        1 => None,
        _ => Some(Box::new(comm)),
    };
    let options = Options {
        seed: 3 + rank as u64,
        ordinal: rank as u32,
        ..Options::default()
    };
    let standin = Arc::new(Standin::new(options));
    let parts = Parts::standin(&standin, peers, config.hidden_size).unwrap();
    let Rank(mut loaded) = Rank::load(dir, size, rank, parts, LIMITS).unwrap();
    let known = config.vocab_size - PADDING;
    if warm {
        loaded.warm_up(known).unwrap();
        let recorded = loaded.backend.recorded_graphs();
        assert!(recorded > 0);
    }
    Replica::new(
        loaded.backend,
        loaded.model,
        loaded.activations,
        config.vocab_size,
        known,
    )
}

/// Five requests for `places` places in a step and few cache blocks; one sequence is cancelled at its fourth token.
fn answers(
    step: &mut dyn Step,
    stops: &[u32],
    sampling: &[SamplingParams],
    places: usize,
) -> Vec<Vec<Event>> {
    let group = Group::alone(Hello::new(0));
    let max_tokens = if places < 5 { 20 } else { 96 };
    let scheduler = Scheduler::new(LIMITS.n_kv_blocks, max_tokens, places, 100);
    let mut engine = Engine::new(scheduler, step, &group);
    let mut answers: Vec<Vec<Event>> = vec![Vec::new(); 5];
    for i in 0..5u32 {
        let request = Request {
            prompt: (0..5 + 6 * i).map(|t| (t * 37 + i * 11) % 290).collect(),
            max_tokens: 6 + i as usize,
            sampling: sampling[i as usize % sampling.len()].clone(),
            stop_tokens: stops.to_vec(),
        };
        assert_eq!(engine.submit(request).unwrap(), SeqId::from(i));
    }
    while engine.has_work() {
        for event in engine.step().unwrap() {
            let answer = &mut answers[event.id as usize];
            if event.id == 2 && answer.len() == 3 && event.finish.is_none() {
                engine.cancel(event.id);
            }
            answer.push(event);
        }
    }
    engine.finish().unwrap();
    answers
}

fn on_ranks(
    name: &str,
    size: usize,
    run: impl Fn(Replica<GpuBackend>) -> Vec<Vec<Event>> + Sync,
    warm: bool,
) -> Vec<Vec<Event>> {
    let dir = models().join(name);
    let all = ThreadRanks::each(size, |comm| run(replica(&dir, comm, warm)));
    assert!(
        all.iter().all(|a| *a == all[0]),
        "{name} on {size}: ranks differ"
    );
    all.into_iter().next().unwrap()
}

fn tokens(answers: &[Vec<Event>]) -> Vec<Vec<u32>> {
    let of = |a: &Vec<Event>| a.iter().map(|e| e.token).collect();
    answers.iter().map(of).collect()
}

fn ahead_is_the_same(name: &str, size: usize, sampling: &[SamplingParams], places: usize) {
    let without_stops = on_ranks(
        name,
        size,
        |r| answers(&mut StepByStep(r, vec![]), &[], sampling, places),
        false,
    );
    // A token in the middle of one answer, and whatever others it ends.
    let stops = [without_stops[1][2].token, without_stops[4][5].token];
    let want = on_ranks(
        name,
        size,
        |r| answers(&mut StepByStep(r, vec![]), &stops, sampling, places),
        false,
    );
    let stopped = |a: &Vec<Event>| a.last().unwrap().finish == Some(FinishReason::Stop);
    assert!(want.iter().filter(|a| stopped(a)).count() >= 2);
    let got = on_ranks(
        name,
        size,
        |r| {
            let mut counted = Counted(r, 0, 0);
            let answers = answers(&mut counted, &stops, sampling, places);
            assert_eq!(counted.2, 2);
            answers
        },
        true,
    );
    assert_eq!(tokens(&got), tokens(&want), "{name} on {size}");
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert_eq!(got.finish, want.finish);
        // Prompts and attention are cut elsewhere when a place is free a step later, and rounding differs then.
        assert!((got.logprob - want.logprob).abs() < 0.1, "{got:?} {want:?}");
    }
}

#[test]
fn one_step_ahead_gives_the_tokens_of_step_by_step() {
    let greedy = [SamplingParams::greedy()];
    ahead_is_the_same("qwen2-untied", 1, &greedy, 3);
    ahead_is_the_same("qwen3-sharded", 2, &greedy, 5);
}

#[test]
fn greedy_and_drawn_tokens_share_steps() {
    let drawn = SamplingParams {
        temperature: 0.2,
        top_k: 20,
        top_p: 0.9,
        repetition_penalty: 1.1,
        seed: 5,
        ..SamplingParams::greedy()
    };
    ahead_is_the_same("qwen2-untied", 2, &[SamplingParams::greedy(), drawn], 3);
}

/// The host's sampler, with all logits before it, is the reference: kept logits leave every choice to it.
#[test]
fn a_device_draws_what_the_host_would() {
    let params = |temperature, top_k, top_p, min_p, repetition_penalty, seed| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        seed,
        ..SamplingParams::greedy()
    };
    let sampling = [
        params(0.7, 20, 0.8, 0.0, 1.05, 1),
        params(0.3, CANDIDATES, 1.0, 0.05, 1.0, 2),
        params(0.0, 0, 1.0, 0.0, 1.5, 3),
        params(1.3, 50, 0.95, 0.0, 0.9, 4),
        SamplingParams::greedy(),
    ];
    for (name, size) in [
        ("qwen2-untied", 1),
        ("qwen3-sharded", 2),
        ("qwen2-9heads", 3),
    ] {
        let run = |keep: bool| {
            let one = |mut r: Replica<GpuBackend>| {
                if keep {
                    r.keep_logits();
                }
                answers(&mut StepByStep(r, vec![]), &[], &sampling, 5)
            };
            on_ranks(name, size, one, false)
        };
        let (want, got) = (run(true), run(false));
        assert_eq!(tokens(&got), tokens(&want), "{name} on {size}");
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            // The host sums in double precision.
            assert!(
                (got.logprob - want.logprob).abs() < 1e-4,
                "{got:?} {want:?}"
            );
        }
    }
}

/// Three KV heads on two ranks: one cuts attention further than the other, but their sums have to meet in every step of the
/// warm-up.
#[test]
fn uneven_ranks_warm_up_alike() {
    let greedy = [SamplingParams::greedy()];
    let run = |mut r: Replica<GpuBackend>| answers(&mut r, &[], &greedy, 3);
    let answers = on_ranks("qwen2-9heads", 2, run, true);
    assert!(answers.iter().all(|a| !a.is_empty()));
}

/// Decode steps of 3, 5, 2, … sequences with a block each, after the warm-up, on one of the ranks.
fn steps_after_warm_up(dir: &Path, golden: &Golden, comm: ThreadRanks) -> Vec<f32> {
    let (rank, size) = (comm.rank, comm.size());
    let standin = Arc::new(Standin::new(Options {
        seed: 11 + rank as u64,
        ordinal: rank as u32,
        ..Options::default()
    }));
    let peers: Option<Box<dyn HostCollective>> = match size {
        1 => None,
        _ => Some(Box::new(comm)),
    };
    let hidden = ModelConfig::from_dir(dir).unwrap().hidden_size;
    let parts = Parts::standin(&standin, peers, hidden).unwrap();
    let mut rank = Rank::load(dir, size, rank, parts, LIMITS).unwrap();
    let ids = golden.ids("short.ids");
    let vocab = rank.0.activations.logits.cols();
    rank.0.warm_up(vocab - PADDING).unwrap();
    let recorded = rank.0.backend.recorded_graphs();
    let (_, allocated, _) = standin.counts();

    let mut lens = [4, 5, 6, 7, 8, 3];
    let batch = |seqs: &[(usize, usize)]| {
        let prompts: Vec<_> = seqs
            .iter()
            .map(|&(from, to)| (&ids[..], from, to))
            .collect();
        let mut batch = batch_of(&prompts);
        for (seq, block) in batch.seqs.iter_mut().zip([7, 2, 9, 0, 5, 11]) {
            seq.blocks = vec![block];
        }
        batch
    };
    rank.step(&batch(&lens.map(|n| (0, n)))).unwrap();
    let mut all = Vec::new();
    for n in [3, 5, 2, 6, 1, 4, 5] {
        let seqs: Vec<_> = lens[..n].iter().map(|&len| (len, len + 1)).collect();
        let got = rank.step(&batch(&seqs)).unwrap();
        assert_eq!(got.len(), n * vocab);
        let rows = golden.floats("short.logits");
        for (got, &(from, _)) in got.chunks(vocab).zip(&seqs) {
            let (worst, _) = distance(got, &rows[from * vocab..][..vocab], vocab);
            assert!(worst < WORST_ROW, "{n} sequences, token {from}: {worst:.4}");
        }
        lens[..n].iter_mut().for_each(|len| *len += 1);
        all.extend(got);
    }
    assert_eq!(rank.0.backend.recorded_graphs(), recorded);
    assert_eq!(standin.counts().1, allocated);
    all
}

/// Steps of any number of sequences are replays, filled up with rows that change nothing.
#[test]
fn after_the_warm_up_nothing_is_recorded_or_allocated() {
    for (name, size) in [("qwen2-untied", 1), ("qwen3-sharded", 2)] {
        let dir = models().join(name);
        let golden = Golden::open(&dir);
        let outcomes = ThreadRanks::each(size, |comm| steps_after_warm_up(&dir, &golden, comm));
        assert!(outcomes.iter().all(|o| *o == outcomes[0]), "{name}");
    }
}
