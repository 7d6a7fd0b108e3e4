//! The sampler's distribution against transformers' own logits processors.

use crate::support::golden;
use serde_json::Value;
use tandem::engine::{Sampler, SamplingParams};

fn numbers(v: &Value) -> Vec<f32> {
    let list = v.as_array().unwrap();
    list.iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn probabilities_are_those_of_transformers() {
    let text = std::fs::read_to_string(golden("sampling.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 50);
    for (i, case) in cases.iter().enumerate() {
        let known = [
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
        ];
        let settings = case["settings"].as_object().unwrap();
        assert!(
            settings.keys().all(|k| known.contains(&k.as_str())),
            "{settings:?}"
        );
        let setting = |name: &str, default: f64| {
            settings.get(name).map_or(default, |v| v.as_f64().unwrap()) as f32
        };
        let params = SamplingParams {
            temperature: setting("temperature", 1.0),
            top_k: setting("top_k", 0.0) as usize,
            top_p: setting("top_p", 1.0),
            min_p: setting("min_p", 0.0),
            repetition_penalty: setting("repetition_penalty", 1.0),
            ..SamplingParams::greedy()
        };
        let history: Vec<u32> = numbers(&case["history"])
            .iter()
            .map(|&x| x as u32)
            .collect();
        let got = Sampler::default().probabilities(&numbers(&case["logits"]), &history, &params);
        for (token, (got, want)) in got.iter().zip(numbers(&case["probabilities"])).enumerate() {
            // Both in f32; a token kept or dropped wrongly differs by its whole probability.
            assert!(
                (got - want).abs() < 1e-5,
                "case {i} {settings:?}, token {token}: {got} for {want}"
            );
        }
    }
}
