//! Bad input and lost ranks: one clear line, the right exit code, on all ranks, in time.

use crate::support::{golden, tandem};
use serde_json::{Value, json};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Every failure must have ended all ranks by then.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs to the end and checks the time, the exit code, and that stderr is one line that says `needle`.
fn fails(run: &mut Command, code: i32, needle: &str) {
    let start = Instant::now();
    let out = run.output().unwrap();
    assert!(start.elapsed() < LIMIT, "{needle}: {:?}", start.elapsed());
    check(&out, code, needle);
}

fn check(out: &Output, code: i32, needle: &str) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains(needle), "wanted \"{needle}\" in: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line: {stderr}");
    assert_eq!(out.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A copy of a tiny model that may be broken.
fn model(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("models").join(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn generate(dir: &Path, ranks: &str, more: &[&str]) -> Command {
    let mut run = tandem();
    run.args([
        "generate",
        "--temperature",
        "0",
        "--max-tokens",
        "4",
        "--ranks",
        ranks,
        "--model",
    ])
    .arg(dir)
    .args(more);
    run
}

/// Breaks a model, then expects the same line on one rank and on three.
fn broken(name: &str, needle: &str, damage: impl Fn(&Path)) {
    let dir = model(name);
    damage(dir.path());
    for ranks in ["1", "3"] {
        fails(
            &mut generate(dir.path(), ranks, &["--prompt", "Hello there"]),
            1,
            needle,
        );
    }
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

/// Rewrites the header of `model.safetensors`; the data stays.
fn edit_header(dir: &Path, edit: impl Fn(&mut Value)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(&bytes[8 + length..]);
    fs::write(path, out).unwrap();
}

#[test]
fn damaged_checkpoints_are_named() {
    let weights = "model.safetensors";
    broken("qwen2-tied", "no such model folder", |dir| {
        fs::remove_dir_all(dir).unwrap()
    });
    broken("qwen2-tied", "config.json", |dir| {
        fs::remove_file(dir.join("config.json")).unwrap()
    });
    broken("qwen2-tied", "safetensors", |dir| {
        fs::remove_file(dir.join(weights)).unwrap()
    });
    broken("qwen2-tied", "tokenizer.json", |dir| {
        fs::remove_file(dir.join("tokenizer.json")).unwrap()
    });
    broken("qwen2-tied", "tokenizer.json", |dir| {
        fs::write(dir.join("tokenizer.json"), "{").unwrap()
    });
    broken("qwen2-tied", weights, |dir| {
        let file = fs::File::options()
            .write(true)
            .open(dir.join(weights))
            .unwrap();
        file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    });
    broken("qwen2-tied", weights, |dir| {
        fs::write(dir.join(weights), [255; 64]).unwrap()
    });
    broken("qwen2-tied", "model.norm.weight", |dir| {
        edit_header(dir, |h| {
            let tensors = h.as_object_mut().unwrap();
            let norm = tensors.remove("model.norm.weight").unwrap();
            tensors.insert("model.norm".into(), norm);
        });
    });
    broken("qwen2-tied", "model.norm.weight", |dir| {
        edit_header(dir, |h| h["model.norm.weight"]["dtype"] = json!("I8"))
    });
    broken("qwen2-tied", "model.norm.weight", |dir| {
        edit_header(dir, |h| h["model.norm.weight"]["shape"] = json!([16, 2]))
    });
    broken("qwen2-tied", weights, |dir| {
        edit_header(dir, |h| {
            h["model.norm.weight"]["data_offsets"] = json!([0, 64])
        });
    });
    broken("qwen3-sharded", "is missing", |dir| {
        let shard = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let shard = shard.filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
        let mut shards: Vec<_> = shard
            .filter(|p| p.to_str().unwrap().contains("-of-"))
            .collect();
        shards.sort();
        fs::remove_file(&shards[0]).unwrap();
    });
}

#[test]
fn configs_that_cannot_be_are_refused() {
    broken("qwen2-tied", "hidden_size is 0", |dir| {
        edit_config(dir, "hidden_size", json!(0))
    });
    broken("qwen2-tied", "model_type \"mamba\"", |dir| {
        edit_config(dir, "model_type", json!("mamba"))
    });
    broken("qwen2-tied", "num_experts", |dir| {
        edit_config(dir, "num_experts", json!(8))
    });
    // Contradicts the checkpoint, not itself.
    broken("qwen2-tied", "mlp.gate_proj.weight", |dir| {
        edit_config(dir, "intermediate_size", json!(128))
    });
    broken("qwen2-tied", "layers.2", |dir| {
        edit_config(dir, "num_hidden_layers", json!(3))
    });
    broken("qwen2-tied", "layers.1", |dir| {
        edit_config(dir, "num_hidden_layers", json!(1))
    });
    broken("qwen2-tied", "config.json: not valid JSON", |dir| {
        fs::write(dir.join("config.json"), "{\"a\":").unwrap()
    });
}

#[test]
fn prompts_that_cannot_be_answered_are_refused() {
    let dir = model("qwen2-tied");
    let long = "word ".repeat(3000);
    for ranks in ["1", "2"] {
        let run = |more: &[&str]| generate(dir.path(), ranks, more);
        fails(&mut run(&["--prompt", ""]), 1, "the prompt is empty");
        fails(&mut run(&["--prompt", &long]), 1, "512");
        fails(
            &mut run(&["--prompt", "x", "--max-tokens", "100000"]),
            2,
            "--max-tokens",
        );
        let bad = dir.path().join("bad.txt");
        fs::write(&bad, b"good \xff bad").unwrap();
        fails(
            &mut run(&["--prompt-file", bad.to_str().unwrap()]),
            1,
            "not valid UTF-8: the byte at offset 5",
        );
        fails(
            &mut run(&["--prompt-file", "nowhere.txt"]),
            1,
            "nowhere.txt: cannot be read",
        );
        fs::write(&bad, "[1, 2").unwrap();
        fails(
            &mut run(&["--messages", bad.to_str().unwrap()]),
            1,
            "not valid JSON",
        );
        fails(&mut run(&["--prompt", "x", "--stop", ""]), 2, "stop string");
        fails(&mut run(&["--prompt", "x", "--top-p", "7"]), 2, "--top-p 7");
        fails(
            &mut run(&["--prompt", "x", "--host-memory", "10 apples"]),
            2,
            "10 apples",
        );
        fails(
            &mut run(&["--prompt", "x", "--host-memory", "1KiB"]),
            1,
            "KiB",
        );
        fails(
            &mut run(&["--prompt", "x", "--device", "cuda"]),
            1,
            "--device cpu runs without",
        );
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let dir = model("qwen2-tied");
    fails(
        &mut generate(dir.path(), "1", &["--no-such-flag"]),
        2,
        "--no-such-flag",
    );
    fails(
        &mut generate(dir.path(), "0", &["--prompt", "x"]),
        2,
        "--ranks 0",
    );
    fails(&mut generate(dir.path(), "x", &["--prompt", "x"]), 2, "'x'");
    fails(
        &mut generate(dir.path(), "1", &["--prompt", "x", "--prompt-file", "y"]),
        2,
        "cannot be used with",
    );
    let on_cpu = ["--device", "cpu", "--prompt", "x"];
    for (flag, value, needle) in [
        ("--gpu-memory", "4GiB", "--gpu-memory"),
        ("--gpu-memory", "much", "much"),
        ("--host-share", "1.5", "--host-share"),
    ] {
        let mut run = generate(dir.path(), "2", &on_cpu);
        fails(run.args([flag, value]), 2, needle);
    }
    fails(&mut tandem(), 2, "--help");
    fails(tandem().arg("generate"), 2, "--model");
    fails(
        tandem().args(["plan", "--model", "qwen9-1t"]),
        1,
        "qwen2.5-72b",
    );
    fails(
        tandem().args(["plan", "--model", "qwen2.5-7b", "--ranks", "0"]),
        2,
        "--ranks 0",
    );
    use std::os::unix::ffi::OsStrExt;
    let bytes = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    fails(
        generate(dir.path(), "1", &[]).arg("--prompt").arg(bytes),
        2,
        "UTF-8",
    );
}

#[test]
fn output_that_cannot_be_written_ends_the_run() {
    let dir = model("qwen2-tied");
    for ranks in ["1", "2"] {
        for more in [&["--prompt", "Hello"][..], &["--prompt", "Hello", "--json"]] {
            let full = fs::File::options().write(true).open("/dev/full").unwrap();
            fails(
                generate(dir.path(), ranks, more).stdout(full),
                1,
                "stdout: No space left",
            );
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            fails(
                generate(dir.path(), ranks, more).stdout(writer),
                1,
                "stdout: closed",
            );
        }
    }
}

fn rank(dir: &Path, rank: &str, size: &str, address: &str, more: &[&str]) -> Command {
    let mut run = tandem();
    run.args([
        "generate",
        "--temperature",
        "0",
        "--prompt",
        "Hello",
        "--model",
    ])
    .arg(dir);
    run.args([
        "--rank",
        rank,
        "--world-size",
        size,
        "--rendezvous",
        address,
    ])
    .args(more);
    run.stdout(Stdio::piped()).stderr(Stdio::piped());
    run
}

/// A port that was free a moment ago.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string()
}

#[test]
fn a_rank_that_never_comes_is_named_on_every_rank_that_did() {
    let dir = model("qwen2-tied");
    let address = free_address();
    let start = Instant::now();
    let more = ["--rendezvous-timeout", "3"];
    let zero = rank(dir.path(), "0", "3", &address, &more).spawn().unwrap();
    let two = rank(dir.path(), "2", "3", &address, &more).spawn().unwrap();
    let (zero, two) = (
        zero.wait_with_output().unwrap(),
        two.wait_with_output().unwrap(),
    );
    check(&zero, 1, "rank 1 never arrived");
    assert_eq!(two.status.code(), Some(1));
    assert!(start.elapsed() < LIMIT);
    // Without rank 0 each rank speaks for itself.
    let alone = rank(
        dir.path(),
        "1",
        "2",
        &free_address(),
        &["--rendezvous-timeout", "2"],
    )
    .output()
    .unwrap();
    check(&alone, 1, "rank 0 never arrived");
}

#[test]
fn a_port_in_use_and_disagreeing_ranks_are_clear() {
    let dir = model("qwen2-tied");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    fails(
        &mut rank(
            dir.path(),
            "0",
            "2",
            &address,
            &["--rendezvous-timeout", "3"],
        ),
        1,
        "in use",
    );
    // Two models under one command line.
    let another = model("qwen2-untied");
    let address = free_address();
    let zero = rank(dir.path(), "0", "2", &address, &[]).spawn().unwrap();
    let one = rank(another.path(), "1", "2", &address, &[])
        .spawn()
        .unwrap();
    check(&zero.wait_with_output().unwrap(), 1, "another model");
    assert_eq!(one.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn a_rank_killed_in_mid_generation_ends_all() {
    let dir = model("qwen2-tied");
    for victim in [1, 2] {
        let address = free_address();
        // Random weights never end by themselves: there is time to kill.
        let more = ["--max-tokens", "400", "--ignore-eos"];
        let start = |r: usize| {
            rank(dir.path(), &r.to_string(), "3", &address, &more)
                .spawn()
                .unwrap()
        };
        let mut ranks: Vec<_> = (0..3).map(start).collect();
        // Rank 0's first output says that generation is under way.
        let mut first = [0];
        let mut stdout = ranks[0].stdout.take().unwrap();
        std::io::Read::read_exact(&mut stdout, &mut first).unwrap();
        ranks[victim].kill().unwrap();
        let killed = Instant::now();
        for (r, child) in ranks.into_iter().enumerate() {
            let out = child.wait_with_output().unwrap();
            assert!(
                killed.elapsed() < LIMIT,
                "rank {r} took {:?}",
                killed.elapsed()
            );
            match r {
                0 => check(&out, 1, &format!("rank {victim}")),
                r if r == victim => assert_eq!(out.status.code(), None),
                _ => assert_eq!((out.status.code(), out.stderr.len()), (Some(1), 0)),
            }
        }
    }
}

#[test]
fn a_child_of_a_local_run_that_is_killed_ends_it() {
    let dir = model("qwen2-tied");
    let mut run = tandem();
    run.args([
        "generate",
        "--temperature",
        "0",
        "--prompt",
        "Hello",
        "--ignore-eos",
        "--ranks",
        "3",
    ]);
    run.args(["--max-tokens", "400", "--model"])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = run.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0]).unwrap();
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let victim = children
        .split_whitespace()
        .next()
        .and_then(|pid| pid.parse().ok())
        .expect("a local run has children");
    // SAFETY: plain integers; the process is a child of the one that this test has started.
    assert_eq!(unsafe { libc::kill(victim, libc::SIGKILL) }, 0);
    let killed = Instant::now();
    let out = child.wait_with_output().unwrap();
    assert!(killed.elapsed() < LIMIT);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.lines().count() == 1 && stderr.contains("rank"),
        "{stderr}"
    );
}
