//! What a user types, and what comes out, on the tiny golden models.

use crate::support::{Golden, golden, relative_error, tandem};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PROMPT: &str = "The harbour was quiet at dawn; 3 boats left it.";

fn model() -> PathBuf {
    golden("models/qwen2-tied")
}

fn generate(args: &[&str]) -> Command {
    let mut run = tandem();
    run.arg("generate").arg("--model").arg(model()).args(args);
    run
}

fn stdout(mut run: Command) -> String {
    let out = run.output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn json(run: Command) -> Value {
    serde_json::from_str(&stdout(run)).unwrap()
}

fn ids(answer: &Value) -> Vec<u32> {
    answer["token_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

#[test]
fn json_holds_what_transformers_generates_on_any_number_of_ranks() {
    let file = Golden::read(&model().join("golden.safetensors"));
    for ranks in ["1", "2", "3", "4"] {
        let answer = json(generate(&[
            "--prompt",
            PROMPT,
            "--json",
            "--logprobs",
            "--temperature",
            "0",
            "--max-tokens",
            "32",
            "--ranks",
            ranks,
        ]));
        assert_eq!(ids(&answer), file.ids("short.greedy"), "{ranks} ranks");
        let logprobs = answer["logprobs"].as_array().unwrap();
        for (got, want) in logprobs.iter().zip(file.f32("short.logprobs")) {
            // f32 on both sides; see the tolerance of the logits.
            assert!((got.as_f64().unwrap() as f32 - want).abs() < 1e-3);
        }
        assert_eq!(answer["finish_reason"], "length");
        assert_eq!(answer["ranks"].as_array().unwrap().len().to_string(), ranks);
        for rank in answer["ranks"].as_array().unwrap() {
            assert!(rank["bytes"]["weights"].as_u64().unwrap() > 0);
            assert!(rank["device"].as_str().unwrap().starts_with("cpu"));
        }
        for key in ["load_s", "ttft_s", "tpot_s"] {
            assert!(answer["timings"][key].as_f64().unwrap() > 0.0, "{key}");
        }
    }
}

#[test]
fn a_repetition_penalty_of_the_model_is_the_default() {
    let dir = golden("models/qwen2-penalty");
    let file = Golden::read(&dir.join("golden.safetensors"));
    let mut run = tandem();
    run.args([
        "generate",
        "--json",
        "--max-tokens",
        "32",
        "--temperature",
        "0",
        "--prompt",
        PROMPT,
        "--model",
    ])
    .arg(&dir);
    assert_eq!(ids(&json(run)), file.ids("short.greedy"));
}

#[test]
fn text_on_stdout_is_the_text_of_the_json_wherever_the_prompt_comes_from() {
    let want = json(generate(&[
        "--prompt",
        PROMPT,
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "20",
    ]));
    let want = want["text"].as_str().unwrap().to_string();
    let common = ["--temperature", "0", "--max-tokens", "20"];
    let text = |run| stdout(run).trim_end_matches('\n').to_string();
    let want_trimmed = want.trim_end_matches('\n');

    let mut run = generate(&common);
    run.args(["--prompt", PROMPT]);
    assert_eq!(text(run), want_trimmed);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, PROMPT).unwrap();
    let mut run = generate(&common);
    run.arg("--prompt-file").arg(&file);
    assert_eq!(text(run), want_trimmed);

    let mut child = generate(&common)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(PROMPT.as_bytes())
        .unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(out.stdout)
            .unwrap()
            .trim_end_matches('\n'),
        want_trimmed
    );
}

#[test]
fn a_seed_repeats_itself_and_another_one_does_not() {
    let run = |seed: &str, ranks: &str| {
        let args = [
            "--prompt",
            PROMPT,
            "--json",
            "--temperature",
            "1.5",
            "--max-tokens",
            "24",
        ];
        let mut run = generate(&args);
        run.args(["--seed", seed, "--ranks", ranks]);
        ids(&json(run))
    };
    assert_eq!(run("7", "1"), run("7", "1"));
    assert_eq!(run("7", "2"), run("7", "2"));
    assert_ne!(run("7", "1"), run("8", "1"));
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let whole = json(generate(&[
        "--prompt",
        PROMPT,
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "32",
    ]));
    let text = whole["text"].as_str().unwrap();
    let stop: String = text
        .chars()
        .skip(text.chars().count() / 2)
        .take(3)
        .collect();
    let args = [
        "--prompt",
        PROMPT,
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        "32",
        "--stop",
        &stop,
    ];
    let cut = json(generate(&args));
    assert_eq!(
        cut["text"].as_str().unwrap(),
        &text[..text.find(&stop).unwrap()]
    );
    assert_eq!(cut["finish_reason"], "stop");
    assert!(ids(&cut).len() < ids(&whole).len());
}

#[test]
fn a_batch_answers_line_by_line_in_the_order_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    let prompts = [
        PROMPT,
        "One",
        "A lighthouse that counted ships and sang in the fog",
    ];
    let lines = format!(
        "{{\"prompt\": {PROMPT:?}, \"id\": 17}}\n\n\"One\"\n{}\n",
        prompts[2]
    );
    std::fs::write(&file, lines).unwrap();
    let mut run = generate(&["--temperature", "0", "--max-tokens", "12", "--ranks", "2"]);
    run.arg("--prompts").arg(&file);
    let text = stdout(run);
    let answers: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["id"], 17);
    for (answer, prompt) in answers.iter().zip(prompts) {
        let alone = json(generate(&[
            "--prompt",
            prompt,
            "--json",
            "--temperature",
            "0",
            "--max-tokens",
            "12",
        ]));
        assert_eq!(ids(answer), ids(&alone), "{prompt}");
    }
}

/// A copy of the model without its tokenizer's files.
fn without_tokenizer(dir: &Path) -> PathBuf {
    let bare = dir.join("bare");
    std::fs::create_dir(&bare).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model().join(file), bare.join(file)).unwrap();
    }
    bare
}

#[test]
fn token_ids_need_no_tokenizer_and_their_logits_are_kept_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let bare = without_tokenizer(dir.path());
    let golden = Golden::read(&model().join("golden.safetensors"));
    let (file, kept) = (dir.path().join("ids.jsonl"), dir.path().join("kept"));
    let line = serde_json::json!({"prompt_token_ids": golden.ids("short.ids"), "n": 1});
    std::fs::write(&file, line.to_string()).unwrap();
    for ranks in ["1", "2"] {
        let mut run = tandem();
        run.args(["generate", "--temperature", "0", "--max-tokens", "32"]);
        run.args(["--logprobs", "--ranks", ranks, "--model"])
            .arg(&bare);
        run.arg("--prompts").arg(&file).arg("--logits").arg(&kept);
        let answer = json(run);
        assert_eq!(ids(&answer), golden.ids("short.greedy"));
        assert_eq!((&answer["n"], &answer["text"]), (&1.into(), &"".into()));

        let rows = Golden::read(&kept).f32("logits");
        let (vocab, logprobs) = (rows.len() / 32, answer["logprobs"].as_array().unwrap());
        for ((row, id), logprob) in rows.chunks(vocab).zip(ids(&answer)).zip(logprobs) {
            let sum: f64 = row.iter().map(|&l| (l as f64).exp()).sum();
            let want = row[id as usize] as f64 - sum.ln();
            assert!((want - logprob.as_f64().unwrap()).abs() < 1e-4);
        }
        let first = golden.f32("short.logits");
        let first = &first[first.len() - vocab..];
        assert!(relative_error(&rows[..vocab], first) < 1e-4);
    }
}

#[test]
fn one_by_one_every_answer_is_what_it_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let short = Golden::read(&model().join("golden.safetensors")).ids("short.ids");
    let answers = |prompts: &[&[u32]]| {
        let (file, kept) = (dir.path().join("ids.jsonl"), dir.path().join("kept"));
        let line = |ids: &&[u32]| serde_json::json!({ "prompt_token_ids": ids }).to_string();
        let lines: Vec<_> = prompts.iter().map(line).collect();
        std::fs::write(&file, lines.join("\n")).unwrap();
        let mut run = generate(&["--one-by-one", "--ignore-eos", "--max-tokens", "8"]);
        run.args(["--temperature", "0", "--prompts"]).arg(&file);
        let out = run.arg("--logits").arg(&kept).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        let text = String::from_utf8(out.stdout).unwrap();
        let answers: Vec<_> = text
            .lines()
            .map(|l| ids(&serde_json::from_str(l).unwrap()))
            .collect();
        (answers, Golden::read(&kept).f32("logits"))
    };
    let (both, rows) = answers(&[&short, &short[..1]]);
    let (first, first_rows) = answers(&[&short]);
    let (second, second_rows) = answers(&[&short[..1]]);
    assert_eq!(both, [first, second].concat());
    assert_eq!(rows, [first_rows, second_rows].concat());
}

#[test]
fn token_ids_that_cannot_be_are_refused_with_the_line() {
    let dir = tempfile::tempdir().unwrap();
    let bare = without_tokenizer(dir.path());
    let file = dir.path().join("ids.jsonl");
    for (line, want) in [
        (
            r#"{"prompt_token_ids": []}"#,
            "line 1: \"prompt_token_ids\" is empty",
        ),
        (
            r#"{"prompt_token_ids": [1, -1]}"#,
            "has -1: ids are whole numbers",
        ),
        (r#"{"prompt_token_ids": [1, 4294967297]}"#, "has 4294967297"),
        (
            r#"{"prompt_token_ids": [1], "prompt": "a"}"#,
            "needs one of",
        ),
        (r#"{"prompt": "a"}"#, "tokenizer.json: missing"),
    ] {
        std::fs::write(&file, line).unwrap();
        let mut run = tandem();
        run.arg("generate").arg("--model").arg(&bare);
        let out = run.arg("--prompts").arg(&file).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{line}");
        let error = String::from_utf8(out.stderr).unwrap();
        assert!(error.contains(want), "{line}: {error}");
    }
    std::fs::write(&file, "one\ntwo\n").unwrap();
    let mut run = generate(&["--logits", "x", "--prompts"]);
    let out = run.arg(&file).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn chat_takes_turns_and_leaves_at_the_end_of_its_input() {
    let mut run = tandem();
    run.args([
        "chat",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--context",
        "400",
        "--model",
    ])
    .arg(model());
    let mut child = run
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"Good morning\n\nAnd again\n/reset\nGood morning\n/exit\n")
        .unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(String::from_utf8(out.stdout).unwrap().lines().count() >= 3);
}

#[test]
fn random_weights_need_a_shape_and_no_files() {
    let mut run = tandem();
    run.args([
        "generate",
        "--model",
        "smollm2-135m",
        "--weights",
        "random",
        "--prompt",
        "hi",
    ]);
    let out = run.output().unwrap();
    // A shape has no tokenizer: the error says what to do, and nothing panics.
    assert_eq!(out.status.code(), Some(1));
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(error.contains("--prompt-tokens"), "{error}");

    let args = [
        "--weights",
        "random",
        "--prompt-tokens",
        "5",
        "--max-tokens",
        "3",
        "--json",
        "--model",
    ];
    let mut run = tandem();
    run.arg("generate").args(args).arg("smollm2-135m");
    let one = ids(&json(run));
    let mut run = tandem();
    run.arg("generate")
        .args(args)
        .args(["smollm2-135m", "--ranks", "2"]);
    assert_eq!(one, ids(&json(run)), "the same values for every world size");
}

#[test]
fn plan_prints_a_table_and_json_for_shapes_and_folders() {
    let plan = |args: &[&str]| {
        let mut run = tandem();
        run.arg("plan").args(args);
        stdout(run)
    };
    let table = plan(&[
        "--model",
        "qwen2.5-72b",
        "--ranks",
        "2",
        "--gpu-memory",
        "40GiB",
        "--host-memory",
        "256GiB",
    ]);
    assert!(
        table.contains("72.71 billion") && table.contains("40.00") && table.contains("* 2 GPUs"),
        "{table}"
    );
    let value: Value =
        serde_json::from_str(&plan(&["--model", "qwen2.5-7b", "--ranks", "3", "--json"])).unwrap();
    assert_eq!(value["ranks"].as_array().unwrap().len(), 3);
    let asked = |o: &&Value| o["requested"] == true && o["ranks"] == 3 && o["fits"] == "yes";
    let options = value["options"].as_array().unwrap();
    assert_eq!(options.iter().filter(asked).count(), 1, "{options:?}");
    let folder = golden("models/qwen3-sharded");
    assert!(plan(&["--model", folder.to_str().unwrap()]).contains("rank"));
}

#[test]
fn a_plan_by_measured_rates_comes_once_whatever_the_number_of_ranks() {
    let mut run = tandem();
    run.args(["plan", "--measure", "--device", "cpu", "--ranks", "2"]);
    run.args(["--model", "smollm2-135m", "--json"]);
    let value: Value = serde_json::from_str(&stdout(run)).unwrap();
    let rates = &value["request"]["rates"];
    for rate in ["host_read_gbs", "host_gemm_tflops", "all_reduce_us"] {
        assert!(
            rates[rate]["measured"] == true && rates[rate]["value"].as_f64().unwrap() > 0.0,
            "{rate}: {rates}"
        );
    }
    assert!(value["predicted"]["tpot_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn doctor_and_completions_work_on_any_machine() {
    let run = |args: &[&str]| {
        let mut run = tandem();
        run.args(args);
        stdout(run)
    };
    assert!(run(&["doctor"]).contains("CPU"));
    assert!(
        serde_json::from_str::<Value>(&run(&["doctor", "--json"]))
            .unwrap()
            .is_object()
    );
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&["completions", shell]).contains("tandem"), "{shell}");
    }
    assert!(run(&["--version"]).starts_with("tandem "));
    for command in ["generate", "chat", "plan", "doctor"] {
        assert!(run(&[command, "--help"]).contains("Usage"));
    }
}
