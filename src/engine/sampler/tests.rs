use super::*;
use proptest::prelude::*;

fn params(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        ..SamplingParams::greedy()
    }
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let mut s = Sampler::default();
    assert_eq!(
        s.sample(&[0.5, 2.0, 2.0, -1.0], &[], &SamplingParams::greedy(), 0),
        1
    );
    let penalised = SamplingParams {
        repetition_penalty: 2.0,
        ..SamplingParams::greedy()
    };
    assert_eq!(s.sample(&[0.5, 2.0, 1.5, -1.0], &[1, 1], &penalised, 0), 2);
}

#[test]
fn what_is_no_number_or_impossible_is_not_drawn() {
    assert_eq!([exp(f32::NEG_INFINITY), exp(-200.0)], [0.0, 0.0]);
    assert!(exp(f32::NAN).is_nan() && log_sum_exp(&[1.0, f32::NAN]).is_nan());
    let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    let mut s = Sampler::default();
    for position in 0..100 {
        assert_eq!(s.sample(&logits, &[], &params(1.0), position), 1);
    }
}

#[test]
fn the_smallest_temperatures_take_the_most_likely_token() {
    let logits = [0.5, 2.0, 1.999, -1e30, 3e38, f32::NEG_INFINITY];
    for temperature in [f32::from_bits(1), 1e-40, f32::MIN_POSITIVE, 1e-30, 1e-6] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (2, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 0.0, 1.0),
            (6, 0.5, 0.1),
        ] {
            for n in [3, 5, 6] {
                let p = SamplingParams {
                    top_k,
                    top_p,
                    min_p,
                    ..params(temperature)
                };
                let logits = &logits[..n];
                let got = Sampler::default().sample(logits, &[], &p, 1);
                assert_eq!(got, argmax(logits), "{p:?}");
            }
        }
    }
    // Nothing finite to draw from: what the host then finds is shown as the fault that it is.
    let infinite = [0.0, f32::INFINITY, 1.0];
    assert_eq!(
        Sampler::default().sample(&infinite, &[], &params(1.0), 1),
        1
    );
}

#[test]
fn banned_tokens_are_neither_taken_nor_drawn() {
    let bans = Bans {
        always: vec![1, 99],
        ..Bans::default()
    };
    let greedy = SamplingParams {
        bans: bans.clone(),
        ..SamplingParams::greedy()
    };
    assert_eq!(
        Sampler::default().sample(&[0.0, 2.0, 1.0], &[], &greedy, 0),
        2
    );
    assert_eq!(greedy.draw(0), None);
    let drawn = SamplingParams {
        bans,
        ..params(1.0)
    };
    let p = Sampler::default().probabilities(&[0.0, 2.0, 0.0], &[], &drawn);
    assert_eq!(p, [0.5, 0.0, 0.5]);
}

#[test]
fn streams_draw_by_themselves() {
    let of = |stream| {
        let draws = (0..1000).map(move |position| uniform(7, stream, position));
        draws.collect::<Vec<f64>>()
    };
    let (a, b) = (of(0), of(1));
    let mean = |x: f64| x / 1000.0;
    let product = mean(a.iter().zip(&b).map(|(a, b)| (a - 0.5) * (b - 0.5)).sum());
    // Five standard deviations of the mean of products of independent draws.
    assert!(product.abs() < 5.0 / 12.0 / 1000f64.sqrt(), "{product}");
    assert!(of(1) == b && of(2) != b);
}

#[test]
fn draws_depend_on_seed_and_position_only_and_follow_the_distribution() {
    let logits = [1.0, 0.0, -1.0];
    let p = SamplingParams {
        seed: 7,
        ..params(1.0)
    };
    let draw = |position| Sampler::default().sample(&logits, &[], &p, position);
    let n = 20_000;
    let mut counts = [0usize; 3];
    (0..n).for_each(|i| counts[draw(i) as usize] += 1);
    let want = Sampler::default().probabilities(&logits, &[], &p);
    for (count, want) in counts.iter().zip(want) {
        // Five standard deviations of a binomial share.
        let sd = (want * (1.0 - want) / n as f32).sqrt();
        assert!(
            (*count as f32 / n as f32 - want).abs() < 5.0 * sd,
            "{counts:?}"
        );
    }
    assert_eq!(draw(3), draw(3));
}

proptest! {
    #[test]
    fn filters_leave_a_distribution_with_the_most_likely_token(
        logits in prop::collection::vec(-20f32..20.0, 1..200),
        (t, k, p, m) in (0.05f32..3.0, 0usize..50, 0.0f32..=1.0, 0.0f32..=1.0),
    ) {
        let params = SamplingParams { top_k: k, top_p: p, min_p: m, ..params(t) };
        let probabilities = Sampler::default().probabilities(&logits, &[], &params);
        let sum: f32 = probabilities.iter().sum();
        prop_assert!((sum - 1.0).abs() < 1e-4);
        prop_assert!(probabilities[argmax(&logits) as usize] > 0.0);
    }

    /// Beside sorting everything and looking at every token.
    #[test]
    fn filters_keep_what_a_full_sort_keeps(
        logits in prop::collection::vec(-6f32..6.0, 1..5000),
        (t, k, p, m) in (0.3f32..3.0, prop_oneof![Just(0usize), 1usize..2000], 0.01f32..=1.2, prop_oneof![Just(0f32), 0.0f32..=0.5]),
    ) {
        let params = SamplingParams { top_k: k, top_p: p, min_p: m, ..params(t) };
        let got = Sampler::default().probabilities(&logits, &[], &params);
        let mut all: Vec<(f64, usize)> = logits.iter().map(|&l| f64::from(l / t)).zip(0..).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let kth = all[if k == 0 { all.len() } else { k.min(all.len()) } - 1].0;
        all.retain(|x| x.0 >= kth);
        let sum: f64 = all.iter().map(|x| x.0.exp()).sum();
        all.iter_mut().for_each(|x| x.0 = x.0.exp() / sum);
        let (mut before, largest) = (0.0, all[0].0);
        for (i, &(q, token)) in all.iter().enumerate() {
            let near = |a: f64, b: f64| (a - b).abs() < 1e-5 * b;
            let at_the_edge = near(before, f64::from(p)) || near(q, f64::from(m) * largest);
            let kept = i == 0 || (p >= 1.0 || before < f64::from(p)) && q >= f64::from(m) * largest;
            prop_assert!(at_the_edge || (got[token] > 0.0) == kept, "{i} of {}: {}", all.len(), got[token]);
            before += q;
        }
    }

    #[test]
    fn exponentials_are_those_of_double_precision(x in -87f32..=0.0) {
        let want = f64::from(x).exp();
        prop_assert!((f64::from(exp(x)) / want - 1.0).abs() < 4e-7, "{} {want}", exp(x));
    }

    #[test]
    fn sums_and_maxima_are_those_of_double_precision(x in prop::collection::vec(-30f32..30.0, 1..5000)) {
        let want = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        prop_assert!((log_sum_exp(&x) - want).abs() < 1e-6);
        let first = (0..x.len()).rev().fold(0, |best, i| if x[i] >= x[best] { i } else { best });
        prop_assert_eq!(argmax(&x) as usize, first);
    }

    #[test]
    fn uniform_is_inside_the_unit_interval(seed: u64, stream: u64, position: u64) {
        let u = uniform(seed, stream, position) as f32;
        prop_assert!((0.0..1.0).contains(&u));
    }
}
