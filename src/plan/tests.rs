use super::*;
use crate::config::{SHAPES, named_shape};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn request(name: &str, device: DeviceKind, tp_size: usize) -> (ModelConfig, Request) {
    let config = named_shape(name).unwrap();
    let request = Request::new(name, &config, device, tp_size);
    (config, request)
}

fn refusal(config: &ModelConfig, request: &Request) -> String {
    Plan::new(config, request)
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn qwen25_72b_on_two_gpus_of_40_gib() {
    let (config, mut r) = request("qwen2.5-72b", DeviceKind::Cuda, 2);
    (r.gpu_memory, r.host_memory) = (Some(40 * GIB), Some(256 * GIB));
    insta::assert_snapshot!(Plan::new(&config, &r).unwrap());
}

#[test]
fn qwen25_7b_on_one_cpu_rank() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cpu, 1);
    r.host_memory = Some(32 * GIB);
    insta::assert_snapshot!(Plan::new(&config, &r).unwrap());
}

#[test]
fn qwen25_05b_on_three_cpu_ranks() {
    let (config, r) = request("qwen2.5-0.5b", DeviceKind::Cpu, 3);
    let plan = Plan::new(&config, &r).unwrap();
    insta::assert_snapshot!(plan);
    insta::assert_snapshot!("as_json", serde_json::to_string_pretty(&plan).unwrap());
}

#[test]
fn qwen3_32b_on_eight_gpus() {
    let (config, mut r) = request("qwen3-32b", DeviceKind::Cuda, 8);
    r.max_seqs = 16;
    r.rates.gpu.as_mut().unwrap().link_gbs = Rate::measured(25.2);
    insta::assert_snapshot!(Plan::new(&config, &r).unwrap());
}

#[test]
fn many_ranks_print_compactly() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 64);
    r.ranks_per_node = 8;
    let table = Plan::new(&config, &r).unwrap().to_string();
    assert!(table.lines().count() < 16, "{table}");
    insta::assert_snapshot!(table);
}

#[test]
fn a_context_over_the_limit_is_refused_with_both_numbers() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cpu, 1);
    r.context = 40_000;
    let e = Plan::new(&config, &r).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    assert!(
        e.to_string().contains("40000") && e.to_string().contains("32768"),
        "{e}"
    );
}

#[test]
fn what_cannot_be_is_refused() {
    type Change = fn(&mut Request);
    let cases: &[(Change, &str)] = &[
        (|r| r.context = 0, "a context of 0 tokens"),
        (|r| r.tp_size = 0, "0 ranks: must be 1 to 1024"),
        (|r| r.tp_size = usize::MAX, "ranks: must be 1 to 1024"),
        (|r| r.ranks_per_node = 0, "0 ranks per node"),
        (|r| r.max_seqs = 0, "0 sequences"),
        (|r| r.max_seqs = 1 << 40, "sequences: must be 1 to 65536"),
        (|r| r.max_step_tokens = 0, "0 tokens of a step"),
        (|r| r.gpu_memory = Some(1), "--gpu-memory limits GPU ranks"),
        (
            |r| r.rates.host_read_gbs = Rate::measured(0.0),
            "host memory is 0 GB/s",
        ),
        (
            |r| r.rates.all_reduce_us = Rate::measured(f64::NAN),
            "all-reduce is NaN µs",
        ),
    ];
    let (config, mut r) = request("qwen2.5-0.5b", DeviceKind::Cuda, 2);
    r.rates = SMALL_HOST;
    assert!(refusal(&config, &r).contains("needs the rates of a GPU"));
    for (change, expected) in cases {
        let (config, mut r) = request("qwen2.5-0.5b", DeviceKind::Cpu, 2);
        change(&mut r);
        let message = refusal(&config, &r);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn too_little_memory_is_refused_with_the_numbers_of_each_rank() {
    let (config, mut r) = request("smollm2-135m", DeviceKind::Cpu, 2);
    r.host_memory = Some(100 << 20);
    let message = refusal(&config, &r);
    for part in [
        "rank 0 needs",
        "rank 1 needs",
        "weights",
        "KV cache",
        "over the 100.00 MiB",
        "2 ranks of a node",
    ] {
        assert!(message.contains(part), "{message}");
    }
    // Each node has its own memory, and the message speaks of the ranks that share one.
    r.ranks_per_node = 1;
    assert!(refusal(&config, &r).contains("1 rank of a node"));
    // The GPU must hold the KV cache: 28 layers × 2 × 4 heads × 128 × 2 bytes × 4096 tokens = 224 MiB.
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    r.gpu_memory = Some(200 << 20);
    let message = refusal(&config, &r);
    assert!(
        message.contains("KV cache 224.00 MiB") && message.contains("200.00 MiB"),
        "{message}"
    );
}

#[test]
fn an_absurd_model_is_counted_or_refused_but_never_overflows() {
    let (mut config, mut r) = request("qwen3-0.6b", DeviceKind::Cpu, 2);
    (config.n_layers, config.max_position_embeddings) = (1 << 17, 1 << 24);
    (r.context, r.max_seqs, r.max_step_tokens) = (1 << 24, 1 << 16, 1 << 20);
    let message = refusal(&config, &r);
    assert!(message.contains("8 EiB"), "{message}");
    r.device = DeviceKind::Cuda;
    r.rates = H200;
    let message = refusal(&config, &r);
    assert!(message.contains("1 PiB"), "{message}");
}

#[test]
fn the_node_s_memory_goes_to_its_ranks_by_need() {
    // 3 and 6 of 9 heads: the ranks' needs differ, and their sum is what the node must hold.
    let (config, mut r) = request("smollm2-135m", DeviceKind::Cpu, 2);
    let need: u64 = Plan::new(&config, &r)
        .unwrap()
        .ranks
        .iter()
        .map(|p| p.bytes.total)
        .sum();
    r.host_memory = Some(need);
    assert!(Plan::new(&config, &r).is_ok());
    r.host_memory = Some(need - 1);
    assert!(Plan::new(&config, &r).is_err());
    // On a node of its own each has all the memory.
    r.ranks_per_node = 1;
    assert!(Plan::new(&config, &r).is_ok());
}

#[test]
fn the_prediction_is_the_formula_by_hand() {
    // One H200 reads 14.14 GB of weights and 4096 tokens × 57344 bytes of KV a token at 3.8 TB/s.
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    r.rates = H200;
    let p = Plan::new(&config, &r).unwrap().predicted;
    let read = (2.0 * (7_615_616_512.0 - 152_064.0 * 3584.0) + 4096.0 * 57_344.0) / 3.8e12;
    assert!((p.tpot_s / read - 1.0).abs() < 1e-3, "{} {read}", p.tpot_s);
    assert_eq!(p.tpot_bound, Bound::DeviceMemory);
    // A prompt of 1024 is 2 × 6.53 billion elements of the layers a token, at 700 TFLOP/s: 19.1 ms, and some attention.
    assert!((0.0191..0.0200).contains(&p.ttft_s), "{}", p.ttft_s);
    assert_eq!(p.ttft_bound, Bound::Compute);
    // Two ranks: half the bytes and 56 all-reduces of 13 µs.
    r.tp_size = 2;
    let two = Plan::new(&config, &r).unwrap().predicted;
    assert!(
        (two.tpot_s - read / 2.0 - 56.0 * 13e-6).abs() < 2e-5,
        "{}",
        two.tpot_s
    );
}

#[test]
fn what_fits_is_not_offloaded_and_what_does_not_leaves_in_order() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    // Steps that cannot shrink: else a page less would only make them smaller.
    (r.files, r.host_memory, r.max_step_tokens) = (false, Some(64 * GIB), 256);
    let all = Plan::new(&config, &r).unwrap().ranks.remove(0);
    assert!(all.fits && all.tiers.weights_pinned == 0);
    // One page less, and the embedding leaves, whole; the ring is counted from here on.
    r.gpu_memory = Some(all.tiers.device);
    assert_eq!(
        Plan::new(&config, &r).unwrap().ranks[0].placement,
        all.placement
    );
    r.gpu_memory = Some(all.tiers.device - DEVICE_PAGE);
    let one = Plan::new(&config, &r).unwrap().ranks.remove(0);
    assert_eq!(
        (one.placement.embed.resident, one.placement.embed.pinned),
        (0, 152_064)
    );
    assert!(
        one.placement.cuts()[1..]
            .iter()
            .all(|cut| !cut.is_offloaded())
    );
    assert_eq!(one.bytes.ring, (RING_SLOTS * RING_SLOT_BYTES) as u64);
    // A third of the card: every other matrix keeps the same part, within a granule or two.
    r.gpu_memory = Some(5 * GIB);
    let plan = Plan::new(&config, &r).unwrap();
    let cuts = plan.ranks[0].placement.cuts();
    let part = |cut: &Cut| cut.resident as f64 / cut.rows() as f64;
    for cut in &cuts[1..] {
        assert!((part(cut) - part(&cuts[3])).abs() < 0.01, "{cuts:?}");
        assert_eq!(cut.file, 0);
    }
    assert!(plan.ranks[0].tiers.device > 5 * GIB - (8 << 20), "{cuts:?}");
    // Less host memory than is wanted: without files nothing to be done, with them the rest stays there.
    r.host_memory = Some(8 * GIB);
    let message = refusal(&config, &r);
    assert!(
        message.contains("8.00 GiB") && message.contains("random weights"),
        "{message}"
    );
    r.files = true;
    let short = Plan::new(&config, &r).unwrap().ranks.remove(0);
    assert!(
        short.placement.cuts()[1..]
            .iter()
            .all(|cut| cut.file > 0 && cut.pinned > 0)
    );
    assert!(short.tiers.host <= 8 * GIB && short.tiers.host > 8 * GIB - (8 << 20));
    // Too little even for the embedding: it stays on the GPU then, and all others are in the files.
    r.host_memory = Some(1200 << 20);
    let least = Plan::new(&config, &r).unwrap().ranks.remove(0);
    assert_eq!(least.placement.embed, Cut::resident(152_064));
    assert!(least.tiers.host <= 1200 << 20);
}

#[test]
fn a_tied_embedding_is_cut_as_the_head_it_is_and_never_lies_in_files() {
    let (config, mut r) = request("qwen2.5-3b", DeviceKind::Cuda, 1);
    r.gpu_memory = Some(3 * GIB);
    let plan = Plan::new(&config, &r).unwrap().ranks.remove(0);
    let Placement {
        embed, head, down, ..
    } = plan.placement;
    assert_eq!(head.rows(), 0);
    assert!(embed.pinned > 0 && embed.resident > 0 && down.pinned > 0);
    r.host_memory = Some(GIB);
    let plan = Plan::new(&config, &r).unwrap().ranks.remove(0);
    assert_eq!(plan.placement.embed.file, 0);
    assert!(plan.placement.down.file > 0 && plan.placement.down.pinned > 0);
}

#[test]
fn steps_shrink_only_where_that_is_faster() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    (r.rates, r.max_step_tokens) = (H200, 2048);
    let tokens = |r: &Request| Plan::new(&config, r).unwrap().max_step_tokens;
    assert_eq!(tokens(&r), 2048);
    r.gpu_memory = Some(10 * GIB);
    assert_eq!(tokens(&r), 2048);
    // Here the buffers of 2048 tokens would not even fit.
    let small = |r: &Request, tokens| {
        let r = Request {
            gpu_memory: None,
            max_step_tokens: tokens,
            ..r.clone()
        };
        Plan::new(&config, &r).unwrap().ranks.remove(0)
    };
    let (few, many) = (small(&r, 256), small(&r, 2048));
    let least =
        few.tiers.device - few.tiers.weights_on_device + (RING_SLOTS * RING_SLOT_BYTES) as u64;
    assert!(least < many.tiers.device - many.tiers.weights_on_device);
    r.gpu_memory = Some(least + 4 * DEVICE_PAGE);
    assert_eq!(tokens(&r), 256);
    r.gpu_memory = Some(least - DEVICE_PAGE);
    assert!(refusal(&config, &r).contains("can never leave the GPU"));
}

#[test]
fn lists_of_ranks_are_short() {
    assert_eq!(runs(&[3]), "3");
    assert_eq!(runs(&[0, 1, 2, 5]), "0-2,5");
    assert_eq!(runs(&[0, 2, 4, 6, 8]), "0,2,4,… (5)");
    assert_eq!(rank_list(&[0, 1]), "ranks 0-1");
}

#[test]
fn every_named_shape_has_a_plan_for_1_to_16_ranks() {
    for name in SHAPES {
        for device in [DeviceKind::Cpu, DeviceKind::Cuda] {
            for tp_size in 1..=16 {
                let (config, r) = request(name, device, tp_size);
                let plan = Plan::new(&config, &r).unwrap();
                assert_eq!(plan.ranks.len(), tp_size);
                assert!(plan.ranks.iter().all(|rank| rank.fits));
                assert!(plan.predicted.tpot_s > 0.0 && plan.predicted.ttft_s.is_finite());
                let table = plan.to_string();
                let rows = table.lines().filter(|line| line.ends_with("  yes")).count();
                assert!(
                    rows == tp_size || tp_size > 8 && (1..tp_size).contains(&rows),
                    "{table}"
                );
            }
        }
    }
}

prop_compose! {
    fn any_request()(
        name in prop::sample::select(SHAPES.to_vec()),
        device in prop::sample::select(vec![DeviceKind::Cpu, DeviceKind::Cuda]),
        tp_size in 1usize..17,
        ranks_per_node in 1usize..17,
        max_seqs in 1usize..40,
        context in 1usize..8192,
        max_step_tokens in 1usize..2048,
        gpu_memory in prop::option::of(GIB..90 * GIB),
        host_memory in prop::option::of(GIB / 4..300 * GIB),
        files: bool,
    ) -> (ModelConfig, Request) {
        let config = named_shape(name).unwrap();
        let gpu_memory = gpu_memory.filter(|_| device == DeviceKind::Cuda);
        let base = Request::new(name, &config, device, tp_size);
        let r = Request { ranks_per_node, max_seqs, context, max_step_tokens, gpu_memory, host_memory, files, ..base };
        (config, r)
    }
}

/// One rank's bytes: sums that hold, a budget that holds, every row in one place.
fn check_places(
    config: &ModelConfig,
    r: &Request,
    rank: &RankPlan,
) -> std::result::Result<(), TestCaseError> {
    let Tiers {
        device, host, file, ..
    } = rank.tiers;
    prop_assert_eq!(device + host + file, rank.bytes.total);
    let parts: u64 = rank.bytes.parts().iter().map(|(_, bytes)| bytes).sum();
    prop_assert_eq!(parts, rank.bytes.total);
    let whole = Placement::all_resident(config, &rank.shard);
    // Published shapes need no padding: the rows of the device are those of the model.
    for (cut, all) in rank.placement.cuts().iter().zip(whole.cuts()) {
        prop_assert_eq!(cut.rows(), all.rows());
        for end in [cut.resident, cut.resident + cut.pinned] {
            prop_assert!(end.is_multiple_of(CUT_ROWS) || end == cut.rows());
        }
    }
    prop_assert_eq!(rank.placement.embed.file, 0);
    if r.device == DeviceKind::Cpu {
        prop_assert!(rank.fits && rank.placement == whole && device == 0);
        return Ok(());
    }
    prop_assert!(r.gpu_memory.is_none_or(|limit| device <= limit));
    prop_assert_eq!(rank.fits, !rank.placement.is_offloaded());
    prop_assert_eq!(rank.fits, rank.bytes.ring == 0);
    prop_assert!(r.files || file == 0);
    let weights = rank.tiers.weights_on_device + rank.tiers.weights_pinned + file;
    prop_assert_eq!(weights, rank.bytes.weights);
    let embed = rank.placement.embed;
    if !config.tie_word_embeddings {
        prop_assert!(embed.resident == 0 || embed.pinned == 0);
    }
    // What a step writes and attends to never leaves the device.
    prop_assert!(device >= rank.bytes.kv + rank.bytes.activations + rank.bytes.runtime);
    // The budget is filled well: less is left than one granule of every matrix.
    let streams = rank.placement.cuts()[1..].iter().any(Cut::is_offloaded);
    if let Some(limit) = r.gpu_memory.filter(|_| streams) {
        let granule = |rows: usize, bytes: usize| (rows.min(CUT_ROWS) * bytes) as u64;
        let widest = config.hidden_size.max(rank.shard.intermediate.len());
        let slack = granule(CUT_ROWS, 4 * widest) * config.n_layers as u64 + DEVICE_PAGE;
        let embed_stays = !config.tie_word_embeddings && embed.pinned == 0;
        prop_assert!(
            limit - device <= slack || embed_stays,
            "{} left",
            limit - device
        );
    }
    Ok(())
}

proptest! {
    #[test]
    fn budgets_hold_and_every_byte_has_one_place((config, r) in any_request()) {
        let Ok(plan) = Plan::new(&config, &r) else { return Ok(()) };
        for node in plan.ranks.chunks(r.ranks_per_node) {
            for rank in node {
                check_places(&config, &r, rank)?;
            }
            let on_host: u64 = node.iter().map(|rank| rank.tiers.host).sum();
            prop_assert!(r.host_memory.is_none_or(|limit| on_host <= limit));
            let shares: Option<u64> = node.iter().map(|rank| rank.budget.host).sum();
            prop_assert!(shares.is_none_or(|sum| sum <= r.host_memory.unwrap()));
        }
        prop_assert!(plan.n_kv_blocks * KV_BLOCK >= r.max_seqs * r.context);
        prop_assert!(plan.max_step_tokens >= r.max_seqs && plan.max_step_tokens <= r.max_seqs * r.context);
    }

    #[test]
    fn more_memory_is_never_slower_and_never_refused(
        (config, r) in any_request(), gpu in 0..64 * GIB, host in 0..128 * GIB,
    ) {
        let more = Request {
            gpu_memory: r.gpu_memory.map(|bytes| bytes + gpu),
            host_memory: r.host_memory.map(|bytes| bytes + host),
            ..r.clone()
        };
        if let Ok(plan) = Plan::new(&config, &r) {
            let (less, more) = (plan.predicted, Plan::new(&config, &more).unwrap().predicted);
            // A part in 10⁹ for the order of floating-point sums.
            prop_assert!(more.request_s <= less.request_s * (1.0 + 1e-9), "{} {}", more.request_s, less.request_s);
        }
    }

    #[test]
    fn more_context_never_takes_fewer_bytes((config, r) in any_request(), extra in 1usize..8192) {
        let unlimited = Request { gpu_memory: None, host_memory: None, ..r };
        let longer = Request { context: unlimited.context + extra, ..unlimited.clone() };
        let (a, b) = (Plan::new(&config, &unlimited), Plan::new(&config, &longer));
        if let (Ok(a), Ok(b)) = (a, b) {
            for (short, long) in a.ranks.iter().zip(&b.ranks) {
                prop_assert!(long.bytes.total >= short.bytes.total && long.bytes.kv >= short.bytes.kv);
            }
            prop_assert!(b.predicted.tpot_s >= a.predicted.tpot_s);
        }
    }

    #[test]
    fn the_ranks_together_hold_the_model((config, r) in any_request()) {
        let unlimited = Request { gpu_memory: None, host_memory: None, ..r };
        let plan = Plan::new(&config, &unlimited).unwrap();
        let sum: u128 = plan.ranks.iter().map(|rank| u128::from(rank.bytes.weights)).sum();
        // Matrices in two bytes, vectors in four; whatever is replicated only adds.
        prop_assert!(sum >= 2 * config.parameters());
        if unlimited.tp_size == 1 {
            let pages = 2 * u128::from(DEVICE_PAGE);
            prop_assert!(sum <= config.parameters() * 2 + config.parameters() / 100 + pages);
        }
    }
}
