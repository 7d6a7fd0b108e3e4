//! Model folders as they are found: what is missing beside the weights, says more than is known, or is no file at all.

use crate::support::{golden, tandem};
use serde_json::{Value, json};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use tempfile::TempDir;

/// Greedy after "ab", by transformers 5.24.
const PLAIN: [u32; 6] = [208, 24, 182, 199, 208, 206];

/// A copy of the golden model `qwen2-tied`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("models/qwen2-tied")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "golden.safetensors" {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    dir
}

/// Sets keys of a JSON file.
fn set(dir: &Path, file: &str, keys: Value) {
    let path = dir.join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, new) in keys.as_object().unwrap() {
        value[key] = new.clone();
    }
    fs::write(path, value.to_string()).unwrap();
}

fn run(dir: &Path, args: &[&str]) -> Output {
    let mut run = tandem();
    run.args(["generate", "--device", "cpu", "--json", "--model"])
        .arg(dir)
        .args(args);
    run.output().unwrap()
}

fn answers(out: &Output) -> Vec<(Vec<u32>, String)> {
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    let one = |line: &str| {
        let answer: Value = serde_json::from_str(line).unwrap();
        let ids = answer["token_ids"].as_array().unwrap().iter();
        let ids = ids.map(|id| id.as_u64().unwrap() as u32).collect();
        (ids, answer["finish_reason"].as_str().unwrap().to_owned())
    };
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .map(one)
        .collect()
}

fn greedy(dir: &Path) -> (Vec<u32>, String, String) {
    let out = run(
        dir,
        &["--prompt", "ab", "--temperature", "0", "--max-tokens", "6"],
    );
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    let (ids, finish) = answers(&out).remove(0);
    (ids, finish, err)
}

#[test]
fn an_adapter_beside_the_model_is_not_passed_over() {
    let dir = folder();
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let out = run(dir.path(), &["--prompt", "ab"]);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        err.contains("adapter_config.json: an adapter (LoRA)") && err.lines().count() == 1,
        "{err}"
    );
}

#[test]
fn without_a_generation_config_an_answer_ends_where_the_model_says() {
    let dir = folder();
    fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    set(dir.path(), "config.json", json!({"eos_token_id": [24, 5]}));
    let (ids, finish, _) = greedy(dir.path());
    assert_eq!((&ids[..], finish.as_str()), (&PLAIN[..2], "stop"));
}

#[test]
fn keys_of_the_generation_config_are_applied_or_named() {
    for (keys, want, named) in [
        (
            json!({"suppress_tokens": [208]}),
            [199, 24, 260, 260, 206, 277],
            false,
        ),
        (
            json!({"no_repeat_ngram_size": 1}),
            [208, 24, 182, 199, 82, 206],
            false,
        ),
        (
            json!({"no_repeat_ngram_size": 0, "num_beams": 1, "guidance_scale": null}),
            PLAIN,
            false,
        ),
        (json!({"num_beams": 4}), PLAIN, true),
    ] {
        let dir = folder();
        set(
            dir.path(),
            "generation_config.json",
            json!({"do_sample": false}),
        );
        set(dir.path(), "generation_config.json", keys.clone());
        let (ids, _, err) = greedy(dir.path());
        assert_eq!(ids, want, "{keys}");
        assert_eq!(err.contains("not applied: \"num_beams\""), named, "{err}");
    }
    let dir = folder();
    set(
        dir.path(),
        "generation_config.json",
        json!({"max_new_tokens": 3, "do_sample": false}),
    );
    let out = run(dir.path(), &["--prompt", "ab"]);
    assert_eq!(answers(&out)[0].0, PLAIN[..3]);
}

#[test]
fn unknown_keys_run_with_a_line_and_known_ones_without() {
    let dir = folder();
    set(
        dir.path(),
        "config.json",
        json!({"model_name": "x/y", "wandb_run": "z"}),
    );
    let (ids, _, err) = greedy(dir.path());
    assert_eq!(ids, PLAIN);
    let lines: Vec<_> = err.lines().filter(|l| l.contains("left aside")).collect();
    assert!(
        lines.len() == 1 && lines[0].ends_with(": wandb_run"),
        "{err}"
    );
}

/// Flips a bit in the data of tensors whose name contains `part`.
fn change_data(dir: &Path, part: &str) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let n = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    for (name, tensor) in header.as_object().unwrap() {
        if name.contains(part) {
            let at = |i: usize| 8 + n + tensor["data_offsets"][i].as_u64().unwrap() as usize;
            bytes[at(0)..at(1)].iter_mut().for_each(|b| *b ^= 1);
        }
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn ranks_with_other_numbers_in_the_same_files_are_refused() {
    let dirs = [folder(), folder()];
    change_data(dirs[1].path(), "layers.1.mlp.up_proj");
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let rank = |r: usize| -> Child {
        let mut run = tandem();
        run.args([
            "generate",
            "--device",
            "cpu",
            "--prompt",
            "ab",
            "--max-tokens",
            "2",
            "--world-size",
            "2",
        ])
        .args([
            "--rank",
            &r.to_string(),
            "--rendezvous",
            &port.to_string(),
            "--model",
        ])
        .arg(dirs[r].path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
        run.spawn().unwrap()
    };
    let ranks = [rank(0), rank(1)];
    let [first, second] = ranks.map(|r| r.wait_with_output().unwrap());
    let err = String::from_utf8_lossy(&first.stderr);
    assert!(
        err.contains("rank 1") && err.contains("other weights"),
        "{err}"
    );
    assert_eq!(
        (first.status.code(), second.status.code()),
        (Some(1), Some(1))
    );
}

#[test]
fn a_tied_model_with_a_head_of_its_own_answers_as_one_that_is_not_tied() {
    let dir = folder();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let embedding = file.tensor("model.embed_tokens.weight").unwrap();
    // Rows in another order.
    let mut rows: Vec<&[u8]> = embedding.data().chunks(64).collect();
    rows.rotate_left(7);
    let head = rows.concat();
    let view = |data| {
        safetensors::tensor::TensorView::new(embedding.dtype(), embedding.shape().to_vec(), data)
            .unwrap()
    };
    let with_head = |data| {
        let all = file
            .tensors()
            .into_iter()
            .chain([("lm_head.weight".to_owned(), view(data))]);
        safetensors::serialize(all, None).unwrap()
    };
    fs::write(&path, with_head(embedding.data())).unwrap();
    let (ids, _, err) = greedy(dir.path());
    assert!(ids == PLAIN && !err.contains("lm_head"), "{ids:?} {err}");
    fs::write(&path, with_head(&head)).unwrap();
    let (own, _, err) = greedy(dir.path());
    assert!(
        own != PLAIN && err.contains("lm_head.weight is not the same"),
        "{err}"
    );
    set(
        dir.path(),
        "config.json",
        json!({"tie_word_embeddings": false}),
    );
    let (untied, _, err) = greedy(dir.path());
    assert!(untied == own && !err.contains("lm_head"), "{err}");
    // Several ranks decide alike, and one of them says it.
    set(
        dir.path(),
        "config.json",
        json!({"tie_word_embeddings": true}),
    );
    let out = run(
        dir.path(),
        &[
            "--prompt",
            "ab",
            "--temperature",
            "0",
            "--max-tokens",
            "6",
            "--ranks",
            "2",
        ],
    );
    assert_eq!(answers(&out)[0].0, own);
    assert_eq!(
        String::from_utf8_lossy(&out.stderr)
            .matches("lm_head")
            .count(),
        1
    );
}

#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ] {
        for make in [fifo, zeros, |path: &Path| fs::create_dir(path)] {
            let dir = folder();
            let path = dir.path().join(name);
            if path.exists() {
                fs::remove_file(&path).unwrap();
            }
            make(&path).unwrap();
            let out = run(dir.path(), &["--prompt", "ab"]);
            let err = String::from_utf8_lossy(&out.stderr);
            assert!(
                err.contains(&format!("{name}: not a regular file")),
                "{err}"
            );
            assert_eq!(
                (out.status.code(), err.lines().count()),
                (Some(1), 1),
                "{err}"
            );
        }
    }
}

fn fifo(path: &Path) -> std::io::Result<()> {
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    Ok(rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0)?)
}

fn zeros(path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink("/dev/zero", path)
}

#[test]
fn sequences_of_a_batch_draw_by_themselves_and_repeat_themselves() {
    let dir = folder();
    let file = dir.path().join("same.jsonl");
    fs::write(&file, "{\"prompt\":\"ab\"}\n".repeat(4)).unwrap();
    let draws = |more: &[&str]| -> Vec<Vec<u32>> {
        let file = file.to_str().unwrap();
        let args = [
            "--prompts",
            file,
            "--temperature",
            "2",
            "--max-tokens",
            "12",
            "--ignore-eos",
        ];
        let out = run(dir.path(), &[&args, more].concat());
        answers(&out).into_iter().map(|a| a.0).collect()
    };
    for more in [&["--top-k", "0"][..], &["--top-k", "20"]] {
        let first = draws(more);
        let mut apart = first.clone();
        apart.sort();
        apart.dedup();
        assert_eq!(apart.len(), 4, "{first:?}");
        assert_eq!(draws(more), first);
        assert_eq!(draws(&[more, &["--one-by-one"]].concat()), first);
        assert_eq!(draws(&[more, &["--ranks", "2"]].concat()), first);
        assert_ne!(draws(&[more, &["--seed", "1"]].concat()), first);
    }
}

#[test]
fn the_smallest_temperature_is_greedy() {
    for temperature in ["1e-40", "1e-45", "1e-38", "2e-38", "1e-30"] {
        let out = run(
            &golden("models/qwen2-tied"),
            &[
                "--prompt",
                "ab",
                "--max-tokens",
                "6",
                "--temperature",
                temperature,
            ],
        );
        assert_eq!(answers(&out)[0].0, PLAIN, "{temperature}");
    }
}

#[test]
fn numbers_beyond_reason_are_one_line() {
    for args in [
        &["--prompt-tokens", "18446744073709551615"][..],
        &["--prompt-tokens", "100000000000"],
        &["--prompt-tokens", "8", "--batch", "18446744073709551615"],
        &["--prompt-tokens", "8", "--batch", "100000000"],
        &["--prompt", "ab", "--max-tokens", "18446744073709551615"],
    ] {
        let out = run(&golden("models/qwen2-tied"), args);
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(matches!(out.status.code(), Some(1 | 2)), "{args:?}: {err}");
        assert!(
            err.lines().count() == 1 && err.starts_with("tandem: "),
            "{args:?}: {err}"
        );
    }
}
