//! What holds for every published shape, world size, budget and machine.

use super::*;
use crate::config::{SHAPES, named_shape};
use crate::layout::{CUT_ROWS, Cut};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// One of the eight rates so many times as fast.
fn faster(mut rates: Rates, which: usize, times: f64) -> Rates {
    let gpu = rates.gpu.as_mut().unwrap();
    let (rate, times) = match which {
        0 => (&mut gpu.read_gbs, times),
        1 => (&mut gpu.gemm_tflops, times),
        2 => (&mut gpu.link_gbs, times),
        3 => (&mut rates.host_read_gbs, times),
        4 => (&mut rates.host_gemm_tflops, times),
        5 => (&mut rates.file_read_gbs, times),
        6 => (&mut rates.all_reduce_gbs, times),
        _ => (&mut rates.all_reduce_us, 1.0 / times),
    };
    rate.value *= times;
    rates
}

/// Bytes from a few to many.
fn more_bytes() -> impl Strategy<Value = u64> {
    (0u32..37, 0u64..1 << 37).prop_map(|(bits, bytes)| bytes & ((2 << bits) - 1))
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
        machine in prop::sample::select(vec![A100_40GB, H100_80GB, H200]),
        pace in prop::array::uniform8(-6.0f64..6.0),
    ) -> (ModelConfig, Request) {
        let config = named_shape(name).unwrap();
        let gpu_memory = gpu_memory.filter(|_| device == DeviceKind::Cuda);
        let base = Request::new(name, &config, device, tp_size);
        // Machines as they are, and some that nobody built: files faster than links, memory slower than both.
        let rates = pace.iter().enumerate().fold(machine, |rates, (which, p)| {
            if pace[0] > 0.0 { faster(rates, which, p.exp2()) } else { rates }
        });
        let r = Request { ranks_per_node, max_seqs, context, max_step_tokens, gpu_memory, host_memory, files, rates, ..base };
        (config, r)
    }
}

prop_compose! {
    /// GPUs with a part of what they need, and hosts with a part of all that there is.
    fn any_offload()((config, r) in any_request(), gpu in 0.05f64..1.0, host in 0.02f64..1.2) -> (ModelConfig, Request) {
        let r = Request { device: DeviceKind::Cuda, gpu_memory: None, host_memory: None, files: true, ..r };
        let ranks = Plan::new(&config, &r).unwrap().ranks;
        let node = &ranks[..r.ranks_per_node.min(r.tp_size)];
        let part = |bytes: u64, of: f64| Some((bytes as f64 * of) as u64);
        let gpu_memory = part(node.iter().map(|rank| rank.tiers.device).max().unwrap(), gpu);
        let host_memory = part(node.iter().map(|rank| rank.bytes.total).sum(), host);
        (config, Request { gpu_memory, host_memory, ..r })
    }
}

fn any() -> impl Strategy<Value = (ModelConfig, Request)> {
    prop_oneof![any_request(), any_offload()]
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

/// With `better` the request takes no longer; nor, where steps cannot shrink, does the first token or any other.
fn never_slower(
    config: &ModelConfig,
    r: &Request,
    better: &Request,
) -> std::result::Result<(), TestCaseError> {
    // A part in 10⁹ for the order of floating-point sums.
    let within = |new: f64, old: f64| new <= old * (1.0 + 1e-9);
    let Ok(old) = Plan::new(config, r) else {
        return Ok(());
    };
    let new = Plan::new(config, better).unwrap();
    let (a, b) = (old.predicted, new.predicted);
    prop_assert!(
        within(b.request_s, a.request_s),
        "{} > {}",
        b.request_s,
        a.request_s
    );
    let fixed = |r: &Request| Request {
        max_step_tokens: r.max_step_tokens.min(2 * LEAST_STEP_TOKENS - 1),
        ..r.clone()
    };
    if r.max_seqs < LEAST_STEP_TOKENS
        && let Ok(old) = Plan::new(config, &fixed(r))
    {
        let new = Plan::new(config, &fixed(better)).unwrap();
        prop_assert_eq!(old.max_step_tokens, new.max_step_tokens);
        let (a, b) = (old.predicted, new.predicted);
        prop_assert!(within(b.ttft_s, a.ttft_s), "{} > {}", b.ttft_s, a.ttft_s);
        prop_assert!(within(b.tpot_s, a.tpot_s), "{} > {}", b.tpot_s, a.tpot_s);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn budgets_hold_and_every_byte_has_one_place((config, r) in any()) {
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
        (config, r) in any(), gpu in more_bytes(), host in more_bytes(),
    ) {
        let more = Request {
            gpu_memory: r.gpu_memory.map(|bytes| bytes + gpu),
            host_memory: r.host_memory.map(|bytes| bytes + host),
            ..r.clone()
        };
        never_slower(&config, &r, &more)?;
    }

    #[test]
    fn faster_rates_are_never_slower((config, r) in any(), which in 0usize..8, times in 1.0f64..8.0) {
        let rates = faster(r.rates, which, times);
        never_slower(&config, &r, &Request { rates, ..r.clone() })?;
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
