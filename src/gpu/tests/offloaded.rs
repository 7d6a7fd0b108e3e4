//! Models whose weights lie partly in host memory and in files: the same golden logits, whatever the placement.

use super::against_cpu::{cut, piece};
use super::*;
use crate::gpu::offload::Cores;
use crate::layout::{Cut, Placement, WORKSPACE};
use crate::plan::{DeviceKind, Plan, Request};
use crate::weights::Dtype;

/// Where `resident` and `pinned` of 16 parts of every matrix go; the rest stays in the files.
fn placement(config: &ModelConfig, shard: &Shard, resident: usize, pinned: usize) -> Placement {
    let g = Geometry::new(config, shard).unwrap();
    let matrices = shard.matrices(config, config.dtype);
    let cut = |name: &str| {
        let Some(m) = matrices.iter().find(|m| m.name.ends_with(name)) else {
            return Cut::default();
        };
        let layout = g.layout(&m.name, m.rows, m.cols);
        let rows = layout.device_rows() / if name == "gate_up" { 2 } else { 1 };
        let upto = |sixteenths: usize| match sixteenths {
            16 => rows,
            n => (rows * n / 16 / 16 * 16).min(rows),
        };
        let (a, b) = (upto(resident), upto(resident + pinned));
        Cut {
            resident: a,
            pinned: b - a,
            file: rows - b,
        }
    };
    let embed = match config.tie_word_embeddings {
        // The head's own cut, but a table to look up in never lies in the files.
        true => {
            let c = cut("embed");
            Cut {
                pinned: c.pinned + c.file,
                file: 0,
                ..c
            }
        }
        false => Cut {
            pinned: shard.vocab.len(),
            ..Cut::default()
        },
    };
    Placement {
        embed,
        qkv: cut("qkv"),
        o: cut(".o"),
        gate_up: cut("gate_up"),
        down: cut("down"),
        head: cut("head"),
    }
}

/// How the weights of a test lie, and who multiplies.
#[derive(Debug, Clone, Copy)]
struct Case {
    resident: usize,
    pinned: usize,
    share: Option<f64>,
}

/// The logits of both golden prompts on every rank, offloaded.
fn run(name: &str, tp_size: usize, case: Case, options: &Options) -> Vec<Result<Vec<Vec<f32>>>> {
    let dir = &models().join(name);
    let golden = &Golden::open(dir);
    ThreadRanks::each(tp_size, |comm| {
        let rank = comm.rank;
        let config = ModelConfig::from_dir(dir)?;
        let shard = Shard::new(&config, tp_size, rank);
        let options = Options {
            seed: options.seed + 7 * rank as u64,
            ordinal: rank as u32,
            ..options.clone()
        };
        let peers: Option<Box<dyn HostCollective>> = match tp_size {
            1 => None,
            _ => Some(Box::new(comm)),
        };
        let standin = Arc::new(Standin::new(options));
        let parts = Parts::standin(&standin, peers, config.hidden_size)?;
        let host = Host {
            placement: placement(&config, &shard, case.resident, case.pinned),
            on_any_rank: true,
            cores: case.share.map(|_| Cores {
                cpus: vec![0, 0],
                exclusive: false,
            }),
            share: Some(case.share.unwrap_or(0.0)),
            files: Some(Arc::new(Checkpoint::open(dir)?)),
        };
        let mut loaded = Rank::load_with(dir, tp_size, rank, parts, LIMITS, host)?;
        let outcome = both_prompts(&mut loaded, golden)?;
        let in_files = case.resident + case.pinned < 16;
        let recorded = loaded.0.backend.recorded_graphs();
        assert_eq!(recorded > 0, !in_files, "{case:?}: {recorded} graphs");
        Ok(outcome)
    })
}

fn check(name: &str, tp_size: usize, case: Case) {
    let golden = Golden::open(&models().join(name));
    let outcomes: Vec<_> = run(name, tp_size, case, &Options::default())
        .into_iter()
        .map(|o| o.unwrap_or_else(|e| panic!("{name} on {tp_size}, {case:?}: {e}")))
        .collect();
    check_prompts(
        &format!("{name} on {tp_size}, {case:?}"),
        &outcomes[0],
        &golden,
    );
    assert!(outcomes.iter().all(|o| *o == outcomes[0]));
}

const CASES: [Case; 6] = [
    // Half on the GPU, the rest streamed; the rest shared; nothing on the GPU but the norms.
    Case {
        resident: 8,
        pinned: 8,
        share: None,
    },
    Case {
        resident: 8,
        pinned: 8,
        share: Some(0.5),
    },
    Case {
        resident: 0,
        pinned: 16,
        share: Some(0.7),
    },
    Case {
        resident: 0,
        pinned: 16,
        share: Some(1.0),
    },
    // Files too, alone and with everything else.
    Case {
        resident: 4,
        pinned: 4,
        share: Some(0.5),
    },
    Case {
        resident: 0,
        pinned: 0,
        share: None,
    },
];

#[test]
fn offloaded_golden_models_on_1_rank() {
    for name in golden_names() {
        let cases = match name.as_str() {
            "qwen2-untied" | "qwen3-tied" => &CASES[..],
            _ => &[SHARED, WITH_FILES],
        };
        cases.iter().for_each(|&case| check(&name, 1, case));
    }
}

#[test]
fn offloaded_golden_models_on_2_and_3_ranks() {
    for (name, tp_size) in [
        ("qwen2-14heads-padded", 2),
        ("qwen2-9heads", 3),
        ("qwen3-sharded", 2),
    ] {
        CASES[1..5]
            .iter()
            .for_each(|&case| check(name, tp_size, case));
    }
}

const SHARED: Case = CASES[1];
const WITH_FILES: Case = CASES[4];

/// One rank's outcome with a stand-in as `options` say.
fn one(case: Case, options: Options) -> Result<Vec<Vec<f32>>> {
    run("qwen2-tied", 1, case, &options).remove(0)
}

#[test]
fn a_refused_allocation_of_the_offload_is_an_error_that_says_what_for() {
    let mut refused = Vec::new();
    for n in 1.. {
        let options = Options {
            refuse_alloc: Some(n),
            ..Options::default()
        };
        match one(WITH_FILES, options) {
            Ok(_) => break,
            Err(e) => refused.push(e.to_string()),
        }
    }
    for what in [
        "host memory for offloaded weights",
        "streaming ring",
        "hand-over input",
        "file staging",
    ] {
        let said = |e: &String| e.starts_with(&format!("{what}: "));
        assert!(refused.iter().any(said), "{what}: {refused:#?}");
    }
}

#[test]
fn a_copy_that_fails_ends_the_offloaded_run() {
    // The first copies load the weights; later ones are the ring's.
    for n in [1, 20, 60] {
        let options = Options {
            fail_copy: Some(n),
            ..Options::default()
        };
        let e = one(SHARED, options).unwrap_err().to_string();
        assert!(e.contains("a copy failed (injected)"), "{n}: {e}");
    }
}

/// A copy of a golden model whose file can be damaged, loaded with half of it left in the files.
fn with_files_in(dir: &Path) -> Result<Rank> {
    let from = models().join("qwen2-untied");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), dir.join(file)).unwrap();
    }
    let config = ModelConfig::from_dir(dir)?;
    let shard = Shard::new(&config, 1, 0);
    let parts = Parts::standin(&Arc::new(Standin::new(Options::default())), None, 0)?;
    let host = Host {
        placement: placement(&config, &shard, 4, 4),
        files: Some(Arc::new(Checkpoint::open(dir)?)),
        ..Host::default()
    };
    Rank::load_with(dir, 1, 0, parts, LIMITS, host)
}

#[test]
fn a_checkpoint_that_changes_under_the_run_is_an_error_that_names_it() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str); 2] = [
        (
            |file| {
                std::fs::File::options()
                    .write(true)
                    .open(file)
                    .unwrap()
                    .set_len(9000)
                    .unwrap()
            },
            "truncated",
        ),
        (
            |file| std::fs::write(file, [0u8; 20_000]).unwrap(),
            "overwritten",
        ),
    ];
    let golden = Golden::open(&models().join("qwen2-untied"));
    for (damage, what) in damages {
        let dir = tempfile::tempdir().unwrap();
        let mut rank = with_files_in(dir.path()).unwrap();
        let ids = golden.ids("short.ids");
        rank.step(&chunk(&ids, 0, 20)).unwrap();
        damage(&dir.path().join("model.safetensors"));
        // What was read ahead may still serve a step.
        let outcome = (20..30).try_for_each(|i| rank.step(&chunk(&ids, i, i + 1)).map(drop));
        let e = outcome.expect_err(what).to_string();
        assert!(
            e.contains("model.safetensors") && !e.contains('\n'),
            "{what}: {e}"
        );
    }
}

#[test]
fn weights_without_files_cannot_be_left_in_them() {
    let dir = models().join("qwen2-untied");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let shard = Shard::new(&config, 1, 0);
    let parts = Parts::standin(&Arc::new(Standin::new(Options::default())), None, 0).unwrap();
    let host = Host {
        placement: placement(&config, &shard, 4, 4),
        ..Host::default()
    };
    let e = Rank::load_with(&dir, 1, 0, parts, LIMITS, host)
        .err()
        .unwrap();
    assert!(e.to_string().contains("raise --host-memory"), "{e}");
}

/// A prompt and two tokens, on a device of so many bytes.
fn planned(config: &ModelConfig, plan: &Plan, total_memory: u64) -> Result<Vec<f32>> {
    let rank = &plan.ranks[0];
    let options = Options {
        total_memory,
        ..Options::default()
    };
    let parts = Parts::standin(&Arc::new(Standin::new(options)), None, 0)?;
    let host = Host {
        placement: rank.placement,
        cores: Some(Cores {
            cpus: vec![0, 0],
            exclusive: false,
        }),
        share: Some(0.5),
        ..Host::default()
    };
    let limits = Limits {
        max_step_tokens: plan.max_step_tokens,
        max_logit_rows: 1,
        n_kv_blocks: plan.n_kv_blocks,
    };
    let (source, shard) = (Source::Random { seed: 1 }, &rank.shard);
    let loaded = load_rank(
        config,
        source,
        Dtype::Bf16,
        shard,
        limits,
        parts,
        host,
        2,
        &|_| {},
    )?;
    let mut rank = Rank::of(loaded);
    let mut logits = Vec::new();
    for (from, to) in [(0, 20), (20, 21), (21, 22)] {
        let mut batch = piece(config, from, to, plan.n_kv_blocks);
        batch.logit_rows = vec![(to - from) as u32 - 1];
        logits.extend(rank.step(&batch)?);
    }
    Ok(logits)
}

/// A device with not a byte more than the plan counts holds the run, and the logits are those of a resident run.
#[test]
fn a_planned_budget_holds() {
    let config = cut("qwen2.5-0.5b", 8, 512);
    let request = Request {
        context: 48,
        max_step_tokens: 32,
        files: false,
        sm_count: 4,
        ..Request::new("cut", &config, DeviceKind::Cuda, 1)
    };
    let resident = Plan::new(&config, &request).unwrap();
    let budget = resident.ranks[0].tiers.device - (40 << 20);
    let small = Request {
        gpu_memory: Some(budget),
        ..request
    };
    let offloaded = Plan::new(&config, &small).unwrap();
    let rank = &offloaded.ranks[0];
    assert!(!offloaded.fits() && rank.tiers.device <= budget);
    // The stand-in has neither a runtime of its own nor cublasLt's workspace.
    let device = rank.tiers.device - rank.bytes.runtime - WORKSPACE as u64;
    let want = planned(&config, &resident, 8 << 30).unwrap();
    let got = planned(&config, &offloaded, device).unwrap();
    // As far as two bf16 runs of a few layers that round in different places are from each other.
    let (worst, _) = distance(&got, &want, config.vocab_size);
    assert!(worst < WORST_ROW, "{worst:.4}");
    let e = planned(&config, &offloaded, device - (64 << 20)).unwrap_err();
    assert!(e.to_string().contains("bytes are free"), "{e}");
}

/// One step of three sequences, each of 30 tokens of one prompt and then of one more.
fn three_at_once(rank: &mut Rank, ids: &[u32]) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for (from, to) in [(0, 30), (30, 31), (31, 32), (32, 33)] {
        let mut batch = Batch::default();
        for i in 0..3 {
            let start = batch.tokens.len();
            batch.tokens.extend(&ids[from..to]);
            batch.positions.extend(from as u32..to as u32);
            let blocks = (0..to.div_ceil(KV_BLOCK) as u32).map(|b| 3 * b + i);
            batch.seqs.push(BatchSeq {
                start,
                len: to - from,
                context_len: to,
                blocks: blocks.collect(),
            });
            batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        }
        logits.extend(rank.step(&batch)?);
    }
    Ok(logits)
}

/// Uneven slices may fit one GPU and not the other: the ranks' sums must meet all the same, also in the warm-up. The cut
/// between link and cores is measured here.
#[test]
fn a_rank_that_offloads_steps_with_one_that_does_not() {
    let dir = &models().join("qwen2-9heads");
    let golden = &Golden::open(dir);
    let outcomes: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let run = |comm: ThreadRanks| {
            scope.spawn(move || {
                let rank = comm.rank;
                let config = ModelConfig::from_dir(dir).unwrap();
                let shard = Shard::new(&config, 2, rank);
                let options = Options {
                    ordinal: rank as u32,
                    ..Options::default()
                };
                let standin = Arc::new(Standin::new(options));
                let parts = Parts::standin(&standin, Some(Box::new(comm)), config.hidden_size);
                let cut = placement(&config, &shard, 8, 8);
                let host = Host {
                    placement: if rank == 1 { cut } else { Placement::default() },
                    on_any_rank: true,
                    cores: Some(Cores {
                        cpus: vec![0, 0],
                        exclusive: false,
                    }),
                    ..Host::default()
                };
                let mut rank = Rank::load_with(dir, 2, rank, parts.unwrap(), LIMITS, host).unwrap();
                rank.0.warm_up(config.vocab_size - PADDING).unwrap();
                three_at_once(&mut rank, &golden.ids("short.ids")).unwrap()
            })
        };
        let threads: Vec<_> = ThreadRanks::all(2).into_iter().map(run).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(outcomes[0], outcomes[1]);
    let all = golden.floats("short.logits");
    let vocab = all.len() / golden.ids("short.ids").len();
    for (row, got) in outcomes[0].chunks(vocab).enumerate() {
        let (worst, _) = distance(got, &all[(29 + row / 3) * vocab..][..vocab], vocab);
        assert!(worst < WORST_ROW, "row {row}: {worst:.4}");
    }
}
