use super::*;
use crate::config::{SHAPES, named_shape};
use crate::layout::{Cut, RING_SLOT_BYTES, RING_SLOTS};

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

/// What `tandem plan` prints.
fn printed(config: &ModelConfig, r: &Request) -> String {
    let plan = Plan::for_run(config, r).unwrap();
    format!("{plan}\n{}", Options::new(&plan))
}

fn qwen25_72b_on_gpus_of_40_gib(tp_size: usize) -> (ModelConfig, Request) {
    let (config, mut r) = request("qwen2.5-72b", DeviceKind::Cuda, tp_size);
    (r.gpu_memory, r.host_memory) = (Some(40 * GIB), Some(256 * GIB));
    (config, r)
}

#[test]
fn qwen25_72b_on_two_gpus_of_40_gib() {
    let (config, r) = qwen25_72b_on_gpus_of_40_gib(2);
    insta::assert_snapshot!(printed(&config, &r));
}

#[test]
fn qwen25_72b_on_one_gpu_of_40_gib() {
    let (config, r) = qwen25_72b_on_gpus_of_40_gib(1);
    insta::assert_snapshot!(printed(&config, &r));
}

#[test]
fn qwen25_72b_on_one_gpu_with_too_little_host_memory() {
    let (config, mut r) = qwen25_72b_on_gpus_of_40_gib(1);
    r.host_memory = Some(64 * GIB);
    insta::assert_snapshot!(printed(&config, &r));
}

#[test]
fn options_as_json() {
    let (config, r) = qwen25_72b_on_gpus_of_40_gib(2);
    let options = Options::new(&Plan::for_run(&config, &r).unwrap());
    insta::assert_snapshot!(serde_json::to_string_pretty(&options).unwrap());
}

#[test]
fn qwen25_7b_on_one_cpu_rank() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cpu, 1);
    r.host_memory = Some(32 * GIB);
    insta::assert_snapshot!(printed(&config, &r));
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
    insta::assert_snapshot!(printed(&config, &r));
}

#[test]
fn many_ranks_print_compactly() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 64);
    r.ranks_per_node = 8;
    let table = Plan::new(&config, &r).unwrap().to_string();
    assert!(table.lines().count() < 28, "{table}");
    assert!(table.lines().all(|l| l.chars().count() <= 100), "{table}");
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
    // One H200 reads 14.14 GB of weights and 4096 tokens × 57344 bytes of KV a token at 4.4 TB/s; 28 layers of 19 µs
    // and a step of 20 µs come on top.
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    r.rates = H200;
    let p = Plan::new(&config, &r).unwrap().predicted;
    let read = (2.0 * (7_615_616_512.0 - 152_064.0 * 3584.0) + 4096.0 * 57_344.0) / 4.4e12;
    let fixed = 28.0 * 19e-6 + 20e-6;
    assert!(
        (p.tpot_s / (read + fixed) - 1.0).abs() < 1e-3,
        "{}",
        p.tpot_s
    );
    assert_eq!(p.tpot_bound, Bound::DeviceMemory);
    // A prompt of 1024 is 2 × 6.53 billion elements of the layers a token, at 700 TFLOP/s: 19.1 ms, and some attention;
    // in two steps.
    let ttft = p.ttft_s - 2.0 * fixed;
    assert!((0.0191..0.0200).contains(&ttft), "{ttft}");
    assert_eq!(p.ttft_bound, Bound::Compute);
    // Two ranks: half the bytes and 57 all-reduces of 5 µs.
    r.tp_size = 2;
    let two = Plan::new(&config, &r).unwrap().predicted;
    let expected = read / 2.0 + fixed + 57.0 * 5e-6;
    assert!((two.tpot_s - expected).abs() < 2e-5, "{}", two.tpot_s);
}

/// Decode times of resident models at context 1024, random weights, batch 1: GPU, its measured read rate in GB/s, shape,
/// ranks, milliseconds a token.
///
/// H200: `tandem bench scaling` of 2026-11-23. H100: the same command, and two ranks with the fused one-shot
/// all-reduce of about 5 µs.
const DECODE_MEASURED: &[(Rates, f64, &str, usize, f64)] = &[
    (H100_80GB, 3050.0, "qwen2.5-7b", 1, 5.28),
    (H100_80GB, 3050.0, "qwen2.5-7b", 2, 3.16),
    (H200, 4450.0, "qwen2.5-7b", 1, 3.88),
    (H200, 4450.0, "qwen2.5-32b", 1, 16.1),
    (H200, 4450.0, "qwen2.5-0.5b", 1, 0.65),
];

#[test]
fn resident_decode_is_predicted_within_15_percent_of_what_was_measured() {
    for &(rates, read_gbs, name, tp_size, measured_ms) in DECODE_MEASURED {
        // The read rates themselves were measured to within 3%.
        for part in [0.97, 1.0, 1.03] {
            let (config, mut r) = request(name, DeviceKind::Cuda, tp_size);
            (r.rates, r.context) = (rates, 1024 + 64);
            r.rates.gpu.as_mut().unwrap().read_gbs = Rate::measured(part * read_gbs);
            let predicted_ms = 1e3 * Plan::new(&config, &r).unwrap().predicted.tpot_s;
            let off = predicted_ms / measured_ms - 1.0;
            assert!(
                off.abs() < 0.15,
                "{name} on {tp_size} at {part} × {read_gbs} GB/s: {predicted_ms:.2} ms, not {measured_ms}"
            );
        }
    }
}

/// Median milliseconds a token where the weights do not fit a budget of so many GiB a rank, on 1 or 2 H100s, beside what a
/// rank's link and cores together brought in a measurement just before, in GB/s (`tandem generate -v`).
const OFFLOADED_MEASURED: &[(&str, usize, u64, f64, f64)] = &[
    ("qwen2.5-7b", 1, 5, 157.4, 78.7),
    ("qwen2.5-7b", 1, 5, 140.9, 81.3),
    ("qwen2.5-7b", 1, 5, 127.4, 78.9),
    ("qwen2.5-7b", 2, 5, 78.7, 51.3),
    ("qwen2.5-7b", 2, 5, 92.2, 44.3),
    ("qwen2.5-7b", 2, 5, 86.5, 47.7),
    ("qwen2.5-32b", 2, 10, 89.8, 298.1),
    ("qwen2.5-72b", 1, 36, 119.0, 890.1),
];

#[test]
fn offloaded_decode_is_predicted_within_15_percent_of_what_was_measured() {
    for &(name, tp_size, gib, together_gbs, measured_ms) in OFFLOADED_MEASURED {
        let (config, mut r) = request(name, DeviceKind::Cuda, tp_size);
        (r.rates, r.context, r.ranks_per_node) = (H100_80GB, 1024 + 64, tp_size);
        r.gpu_memory = Some(gib * GIB);
        r.rates.together_gbs = Some(Rate::measured(together_gbs * tp_size as f64));
        let predicted_ms = 1e3 * Plan::new(&config, &r).unwrap().predicted.tpot_s;
        let off = predicted_ms / measured_ms - 1.0;
        assert!(
            off.abs() < 0.15,
            "{name} on {tp_size}, {together_gbs} GB/s: {predicted_ms:.1} ms, not {measured_ms}"
        );
    }
}

#[test]
fn the_partners_of_an_offloaded_step_work_at_once() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    (r.rates, r.gpu_memory) = (H200, Some(5 * GIB));
    let plan = Plan::new(&config, &r).unwrap();
    let embed = 152_064.0 * 3584.0 * 2.0;
    let pinned = plan.ranks[0].tiers.weights_pinned as f64 - embed;
    let near = |x: f64, y: f64| assert!((x / y - 1.0).abs() < 1e-3, "{x} {y}");
    // Link and cores share what is pinned; 113 products are handed over.
    near(plan.predicted.tpot_s, pinned / 185e9 + 113.0 * 60e-6);
    assert_eq!(plan.predicted.tpot_bound, Bound::HostMemory);
    // A prompt streams it all in each of its steps.
    let steps = 1024usize.div_ceil(plan.max_step_tokens) as f64;
    near(plan.predicted.ttft_s, steps * pinned / 55e9);
    assert_eq!(plan.predicted.ttft_bound, Bound::Link);
    // Two ranks: half as much each, both links, half the cores each.
    r.tp_size = 2;
    r.ranks_per_node = 2;
    r.gpu_memory = Some(3 * GIB);
    let two = Plan::new(&config, &r).unwrap();
    let most = |p: &Plan| {
        let pinned = p.ranks.iter().map(|rank| rank.tiers.weights_pinned);
        pinned.max().unwrap() as f64 - embed / 2.0
    };
    near(two.predicted.tpot_s, most(&two) / 120e9 + 113.0 * 60e-6);
    // Eight links would ask more of the memory than it gives: 260 GB/s in all.
    r.tp_size = 8;
    r.ranks_per_node = 8;
    r.gpu_memory = Some(2 * GIB);
    let eight = Plan::new(&config, &r).unwrap();
    let pinned = eight.ranks.iter().map(|rank| rank.tiers.weights_pinned);
    let most = pinned.max().unwrap() as f64 - embed / 8.0;
    near(eight.predicted.tpot_s, most / 32.5e9 + 113.0 * 60e-6);
    // What host memory cannot hold passes the files' 2 GB/s, and nothing else matters.
    let (_, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    (r.rates, r.gpu_memory, r.host_memory) = (H200, Some(5 * GIB), Some(8 * GIB));
    let short = Plan::new(&config, &r).unwrap();
    let file = short.ranks[0].tiers.file as f64;
    near(short.predicted.tpot_s, file / 2e9 + 113.0 * 60e-6);
    assert_eq!(short.predicted.tpot_bound, Bound::File);
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
    let streaming = (RING_SLOTS * RING_SLOT_BYTES) as u64 + few.bytes.weights / 256;
    let least = few.tiers.device - few.tiers.weights_on_device + streaming;
    assert!(least < many.tiers.device - many.tiers.weights_on_device);
    r.gpu_memory = Some(least + 4 * DEVICE_PAGE);
    assert_eq!(tokens(&r), 256);
    r.gpu_memory = Some(least - DEVICE_PAGE);
    assert!(refusal(&config, &r).contains("can never leave the GPU"));
}

#[test]
fn a_run_takes_long_steps_only_where_it_must_offload() {
    let (config, mut r) = request("qwen2.5-7b", DeviceKind::Cuda, 1);
    (r.rates, r.context) = (H200, 16384);
    assert_eq!(Plan::for_run(&config, &r).unwrap().max_step_tokens, 2048);
    r.gpu_memory = Some(8 * GIB);
    let offloaded = Plan::for_run(&config, &r).unwrap();
    assert!(!offloaded.fits() && offloaded.max_step_tokens > 2048);
    let (config, r) = request("qwen2.5-7b", DeviceKind::Cpu, 1);
    assert_eq!(
        Plan::for_run(&config, &r).unwrap(),
        Plan::new(&config, &r).unwrap()
    );
}

#[test]
fn options_name_each_way_once_and_mark_the_one_asked_for() {
    for (gpu_memory, tp_size, expected) in [
        // 72B: 4 GPUs of 40 GiB hold it, as twice two do.
        (Some(40 * GIB), 2, vec![2, 4, 2]),
        (Some(40 * GIB), 1, vec![1, 2, 4, 1]),
        (Some(80 * GIB), 2, vec![2, 4, 2]),
        (Some(20 * GIB), 4, vec![4, 8, 4]),
        (Some(20 * GIB), 9, vec![8, 9, 18, 9]),
        // Nothing is known of the GPUs: one of them will do.
        (None, 4, vec![1, 4, 8, 4]),
    ] {
        let (config, mut r) = request("qwen2.5-72b", DeviceKind::Cuda, tp_size);
        (r.gpu_memory, r.host_memory) = (gpu_memory, Some(100 * GIB));
        let options = Options::new(&Plan::for_run(&config, &r).unwrap()).0;
        let ranks: Vec<usize> = options.iter().map(|c| c.ranks).collect();
        assert_eq!(ranks, expected, "{options:?}");
        let asked: Vec<&Choice> = options.iter().filter(|c| c.requested).collect();
        assert!(asked.len() == 1 && asked[0].ranks == tp_size && asked[0].device == r.device);
        let on_cores = options.last().unwrap();
        assert_eq!((on_cores.device, on_cores.fits), (DeviceKind::Cpu, Fit::No));
        assert!(on_cores.why.contains("has 100.00 GiB of host memory"));
        assert!(options.iter().any(|c| c.fits == Fit::Yes));
        assert!(
            options
                .iter()
                .all(|c| c.predicted.is_some() == (c.fits != Fit::No))
        );
    }
}

#[test]
fn an_option_that_is_refused_says_what_is_short() {
    // Two ranks need more beside the weights than one, and 1.75 GiB are too little for that.
    let (config, mut r) = request("qwen2.5-32b", DeviceKind::Cuda, 1);
    (r.gpu_memory, r.context) = (Some(GIB / 4 * 7), 2048);
    let options = Options::new(&Plan::for_run(&config, &r).unwrap()).0;
    assert_eq!((options[1].ranks, options[1].fits), (2, Fit::No));
    assert_eq!(
        options[1].why,
        "what can never leave a GPU is over 1.75 GiB"
    );
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

/// What a plan costs does not grow with the context: chunks of a very long prompt are counted in groups, which changes next to
/// nothing of the prediction.
#[test]
fn a_prompt_of_very_many_chunks_is_predicted_as_if_each_were_looked_at() {
    let c = named_shape("qwen2.5-7b").unwrap();
    let seconds = |context: usize, max_step_tokens: usize| {
        let c = ModelConfig {
            max_position_embeddings: 1 << 34,
            ..c.clone()
        };
        let request = Request {
            context,
            max_step_tokens,
            ..Request::new("long", &c, DeviceKind::Cpu, 2)
        };
        Plan::new(&c, &request).unwrap().predicted.request_s
    };
    // 4096 chunks in groups of 8 beside the sum of all, which is linear in what lies before each.
    let (some, more) = (seconds(512 * 64, 64), seconds(8 * 512 * 64, 64));
    assert!(more > 8.0 * some && more < 80.0 * some, "{some} {more}");
    let (a, b) = (seconds(511 * 64 + 10, 64), seconds(514 * 64 + 10, 64));
    assert!(b > a && b < 1.02 * a, "{a} {b}");
    // Thirty million chunks.
    assert!(seconds(1 << 34, 512) > 0.0);
}
