//! The real model against transformers in float32. The checkpoint is made by `launch/demo.sh --model-only`; the tests
//! run where `TANDEM_TEST_ASSETS` names the folder that holds it as `smollm2`.

use crate::support::{assets, golden, tandem};
use serde_json::{Value, json};

/// Both sides compute in f32; over 30 layers the order of sums moves a log-probability by about 1e-5.
const TOLERANCE: f64 = 1e-3;

fn prompts() -> Vec<(String, Value)> {
    let text = std::fs::read_to_string(golden("smollm2/golden.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let prompts = file["prompts"].as_object().unwrap();
    prompts
        .iter()
        .map(|(name, p)| (name.clone(), p.clone()))
        .collect()
}

fn check(name: &str, got: &Value, want: &Value) {
    assert_eq!(got["prompt_token_ids"], want["prompt_token_ids"], "{name}");
    let (ids, want_ids) = (&got["token_ids"], &want["token_ids"]);
    assert_eq!(ids, want_ids, "{name}: {}", got["text"]);
    let logprobs = |v: &Value| -> Vec<f64> {
        v["logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    for (i, (a, b)) in logprobs(got).iter().zip(logprobs(want)).enumerate() {
        assert!((a - b).abs() < TOLERANCE, "{name}, token {i}: {a} for {b}");
    }
}

fn request(prompt: &Value) -> Value {
    let key = if prompt.is_string() {
        "prompt"
    } else {
        "messages"
    };
    json!({key: prompt})
}

#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_smollm2_one_prompt_at_a_time() {
    let model = assets("smollm2");
    let dir = tempfile::tempdir().unwrap();
    for (name, want) in prompts() {
        let file = dir.path().join("prompt");
        let mut run = tandem();
        match &want["prompt"] {
            Value::String(text) => {
                std::fs::write(&file, text).unwrap();
                run.arg("generate").arg("--prompt-file").arg(&file);
            }
            messages => {
                std::fs::write(&file, messages.to_string()).unwrap();
                run.arg("generate").arg("--messages").arg(&file);
            }
        }
        let run = run
            .args([
                "--json",
                "--logprobs",
                "--temperature",
                "0",
                "--max-tokens",
                "64",
                "--model",
            ])
            .arg(&model);
        check(
            &name,
            &serde_json::from_slice(&run.output().unwrap().stdout).unwrap(),
            &want,
        );
    }
}

#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_smollm2_as_a_batch_on_every_world_size() {
    let model = assets("smollm2");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    let lines: Vec<_> = prompts()
        .iter()
        .map(|(_, p)| request(&p["prompt"]).to_string())
        .collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    for ranks in ["1", "2", "3", "4"] {
        let mut run = tandem();
        run.args([
            "generate",
            "--logprobs",
            "--temperature",
            "0",
            "--max-tokens",
            "64",
            "--ranks",
            ranks,
        ]);
        let out = run
            .arg("--model")
            .arg(&model)
            .arg("--prompts")
            .arg(&file)
            .output()
            .unwrap();
        let answers = String::from_utf8(out.stdout).unwrap();
        assert_eq!(
            answers.lines().count(),
            lines.len(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        for (answer, (name, want)) in answers.lines().zip(prompts()) {
            let answer: Value = serde_json::from_str(answer).unwrap();
            assert_eq!(answer["ranks"].as_array().unwrap().len().to_string(), ranks);
            check(&format!("{name} on {ranks} ranks"), &answer, &want);
        }
    }
}
