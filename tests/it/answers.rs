//! What is finished reaches the output, whatever ends the run; and what stderr cannot take changes nothing.

use crate::support::{golden, signal, tandem};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A model with room for answers of minutes, that ends the answer to "ab" after its first token.
fn endless() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("models/qwen2-tied")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let config = dir.path().join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = json!(262_144);
    fs::write(config, value.to_string()).unwrap();
    let ends = json!({"eos_token_id": [208], "do_sample": false});
    fs::write(dir.path().join("generation_config.json"), ends.to_string()).unwrap();
    dir
}

fn lines(dir: &Path, prompts: &[&str]) -> PathBuf {
    let file = dir.join("lines.jsonl");
    let line = |(n, prompt): (usize, &&str)| json!({"prompt": prompt, "n": n}).to_string();
    let lines: Vec<_> = prompts.iter().enumerate().map(line).collect();
    fs::write(&file, lines.join("\n") + "\n").unwrap();
    file
}

fn batch(model: &Path, prompts: &Path, ranks: &str, more: &[&str]) -> Command {
    let mut run = tandem();
    run.args(["generate", "--device", "cpu", "--ranks", ranks, "--model"]);
    run.arg(model).arg("--prompts").arg(prompts).args(more);
    run
}

/// A run whose first answer never ends, with the lines of its `n` others, which are out.
fn with_n_done(model: &Path, ranks: &str, n: usize) -> (Child, BufReader<impl Read>, Vec<Value>) {
    let prompts = (0..=n).map(|i| if i == 0 { "x y z" } else { "ab" });
    let file = lines(model, &prompts.collect::<Vec<_>>());
    let mut child = batch(model, &file, ranks, &["--max-tokens", "200000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let line = |out: &mut BufReader<_>| {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    };
    let done = (0..n).map(|_| line(&mut out)).collect();
    (child, out, done)
}

#[test]
fn answers_leave_as_they_are_finished() {
    let model = endless();
    for (ranks, n) in [("1", 40), ("2", 6)] {
        let (child, mut out, done) = with_n_done(model.path(), ranks, n);
        let mut found: Vec<u64> = done.iter().map(|a| a["index"].as_u64().unwrap()).collect();
        assert!(done.iter().all(|a| a["index"] == a["n"]));
        found.sort_unstable();
        assert_eq!(found, (1..=n as u64).collect::<Vec<_>>());
        signal(child.id(), libc::SIGTERM);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
        let status = child.wait_with_output().unwrap().status;
        assert_eq!(status.signal(), Some(libc::SIGTERM));
    }
}

#[test]
fn a_file_is_in_the_order_of_the_prompts_at_the_end() {
    let model = endless();
    let prompts = lines(model.path(), &["x y z", "ab", "ab", "one two", "ab"]);
    let place = model.path().join("out.jsonl");
    for append in [false, true] {
        fs::write(&place, if append { "before\n" } else { "" }).unwrap();
        let out = File::options().append(append).write(true).open(&place);
        let mut run = batch(model.path(), &prompts, "1", &["--max-tokens", "30"]);
        assert!(run.stdout(out.unwrap()).status().unwrap().success());
        let text = fs::read_to_string(&place).unwrap();
        let text = text.strip_prefix("before\n").unwrap_or(&text);
        let order = text.lines().map(|l| {
            let answer: Value = serde_json::from_str(l).unwrap();
            answer["index"].as_u64().unwrap()
        });
        assert_eq!(order.collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}

#[test]
fn a_lines_own_index_stays() {
    let model = endless();
    let file = model.path().join("own.jsonl");
    fs::write(&file, "{\"prompt\": \"ab\", \"index\": \"a\"}\n").unwrap();
    let out = batch(model.path(), &file, "1", &[]).output().unwrap();
    let answer: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(answer["index"], "a");
}

#[test]
fn stderr_that_cannot_be_written_decides_nothing() {
    let model = endless();
    let prompts = lines(model.path(), &["ab"; 12]);
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let gone = || std::io::pipe().unwrap().1;
    for ranks in ["1", "2"] {
        // Two log lines and a summary each.
        let mut run = batch(model.path(), &prompts, ranks, &["-v"]);
        for out in [
            run.stderr(full()).output().unwrap(),
            run.stderr(gone()).output().unwrap(),
        ] {
            assert!(out.status.success(), "{:?}", out.status);
            let n = out.stdout.iter().filter(|&&b| b == b'\n').count();
            assert_eq!(n, 12);
        }
        let mut run = batch(Path::new("/nowhere"), &prompts, ranks, &[]);
        assert_eq!(run.stderr(full()).status().unwrap().code(), Some(1));
    }
    let mut run = tandem();
    let status = run.arg("--no-such").stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn an_answer_that_is_cut_says_so() {
    let model = endless();
    let generate = |more: &[&str]| {
        let mut run = tandem();
        run.args(["generate", "--device", "cpu", "--model"]);
        let out = run.arg(model.path()).args(more).output().unwrap();
        assert!(out.status.success());
        String::from_utf8(out.stderr).unwrap()
    };
    let cut = generate(&["--prompt", "x y z", "--max-tokens", "3"]);
    assert!(cut.contains("cut at --max-tokens 3\n"), "{cut}");
    assert!(generate(&["--prompt", "x y z"]).contains("cut at 1024 tokens"));
    assert!(!generate(&["--prompt", "ab", "--max-tokens", "3"]).contains("cut"));
    let prompts = lines(model.path(), &["x y z", "ab", "x"]);
    let prompts = prompts.to_str().unwrap();
    let some = generate(&["--prompts", prompts, "--max-tokens", "3"]);
    assert!(some.contains("2 of 3 answers were cut"), "{some}");
}

#[test]
fn what_is_wrong_with_a_line_names_it() {
    let (dir, model) = (tempfile::tempdir().unwrap(), golden("models/qwen2-tied"));
    let file = dir.path().join("bad.jsonl");
    let long = json!({"prompt": "w ".repeat(2000)}).to_string();
    for (line, code, needle) in [
        (long.as_str(), 1, "the model takes 512"),
        ("{\"prompt\": \"ab\",}", 1, "not valid JSON"),
        ("[1]", 1, "is a JSON list"),
        ("{\"prompt\": \"\"}", 1, "the prompt is empty"),
        ("{\"text\": \"a\"}", 1, "needs one of"),
    ] {
        fs::write(&file, format!("{{\"prompt\": \"ab\"}}\n\n{line}\n")).unwrap();
        let out = batch(&model, &file, "1", &[]).output().unwrap();
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{error}");
        assert!(
            error.contains("bad.jsonl: line 3: ") && error.contains(needle),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    // What a line says of sampling is not applied, and not passed over.
    fs::write(&file, "\u{feff}{\"prompt\": \"ab\", \"temperature\": 2}\n").unwrap();
    let out = batch(&model, &file, "1", &[]).output().unwrap();
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(
        out.status.success() && error.contains("\"temperature\" is copied"),
        "{error}"
    );
}
