//! Model folders from strangers: what their templates and tokenizers do ends in an answer or in one line, in time.

use crate::support::{golden, tandem};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// The tiny model with a chat template of its own.
fn with_template(source: &str) -> TempDir {
    let dir = model();
    fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    dir
}

fn model() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("models/qwen2-tied")).unwrap() {
        let path = entry.unwrap().path();
        symlink(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// The tiny model with a changed JSON file.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = model();
    let path = dir.path().join(name);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    fs::remove_file(&path).unwrap();
    fs::write(path, json.to_string()).unwrap();
    dir
}

/// Two greedy tokens, in 3 GiB of address space.
fn generate(dir: &Path, args: &[&str]) -> Command {
    let program = tandem();
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -v 3145728; exec \"$0\" \"$@\""])
        .arg(program.get_program());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited
        .args(["generate", "--device", "cpu", "--temperature", "0"])
        .args(["--max-tokens", "2", "--model"])
        .arg(dir)
        .args(args)
        .stdin(Stdio::null());
    limited
}

fn answer(dir: &Path, args: &[&str]) -> Value {
    let out = generate(dir, args).arg("--json").output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The one line of a refusal.
fn refusal(out: &Output) -> String {
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

/// What this template comes to: nothing, or the line.
fn rendered(source: &str) -> Option<String> {
    let dir = with_template(source);
    let out = generate(dir.path(), &["--chat", "--prompt", "ab"])
        .output()
        .unwrap();
    (!out.status.success()).then(|| {
        let line = refusal(&out);
        assert!(line.contains("chat_template.jinja: "), "{line}");
        line
    })
}

#[test]
fn templates_that_exhaust_the_stack_end_in_a_line() {
    let ring = "{% set ns = namespace() %}{% set ns.a = ns %}";
    for source in [
        format!("{ring}{{{{ ns }}}}"),
        format!("{ring}{{% set m = namespace(a=ns) %}}{{{{ ns == m.a }}}}{{{{ ns ~ '' }}}}"),
        format!("{{{{ {}1 }}}}", "-".repeat(20_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(100_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(100_000)),
        format!(
            "{{% if 0 %}}{}{{% endif %}}",
            "{% elif 0 %}".repeat(100_000)
        ),
    ] {
        // How deep is too deep is the engine's to say: some of them are answered.
        rendered(&source);
    }
    let ring = rendered(&format!("{ring}{{{{ ns ~ '' }}}}")).expect("a refusal");
    assert!(ring.contains("64 MiB of stack"), "{ring}");
}

#[test]
fn templates_that_exhaust_memory_end_in_a_line() {
    let doubled = "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}\
                   {% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}";
    rendered(doubled);
    for source in [
        "{{ '{:>2000000000}'.format('x') }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{{ 'x'.zfill(10 ** 12) }}",
    ] {
        rendered(source).expect("a refusal");
    }
}

#[test]
fn numbers_at_their_ends_do_no_harm() {
    for source in [
        "{{ [1,2][::-9223372036854775808] }}{{ 'ab'[::-9223372036854775808] }}",
        "{{ -170141183460469231731687303715884105728 % -1 }}",
        "{{ [1].index(1, -9223372036854775808, 9223372036854775807) }}",
    ] {
        rendered(source);
    }
}

/// One process renders a whole batch, and one that has died is replaced.
#[test]
fn lines_of_a_batch_are_rendered_one_after_the_other() {
    let dir = with_template("{{ messages[0].content }}");
    let prompts = dir.path().join("prompts.jsonl");
    let lines: String = (0..200)
        .map(|i| format!("{{\"prompt\":\"a{}\"}}\n", i % 10))
        .collect();
    fs::write(&prompts, lines).unwrap();
    let out = generate(
        dir.path(),
        &["--chat", "--prompts", prompts.to_str().unwrap()],
    )
    .output()
    .unwrap();
    let answers = String::from_utf8(out.stdout).unwrap();
    assert_eq!(answers.lines().count(), 200);
    for (i, line) in answers.lines().enumerate() {
        let answer: Value = serde_json::from_str(line).unwrap();
        assert_eq!(answer["prompt_token_ids"], json!([97, 48 + i % 10]));
    }
}

/// What cannot be asked leaves the conversation as it was.
#[test]
fn chat_goes_on_after_lines_that_it_refuses() {
    let template = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}\
                    {% if m.content == 'ring' %}{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{% endif %}\
                    {{ m.content }}{% endfor %}";
    let dir = with_template(template);
    let talk = |lines: &str| {
        let mut run = tandem();
        run.args([
            "chat",
            "--device",
            "cpu",
            "--temperature",
            "0",
            "--max-tokens",
            "3",
            "--model",
        ])
        .arg(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
        let mut child = run.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(lines.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    };
    let plain = talk("hi\nyou\n");
    let long = "w".repeat(9_000_000);
    let refused = talk(&format!("{long}\nhi\nbad\nring\n{long}\nyou\n"));
    assert_eq!(refused.status.code(), Some(0));
    assert_eq!(refused.stdout, plain.stdout);
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 4, "{stderr}");
    for word in ["9000000 bytes", "no bad words", "deep"] {
        assert!(stderr.contains(word), "{stderr}");
    }
}

#[test]
fn rules_of_a_tokenizer_that_multiply_or_never_end_are_refused() {
    let ten = json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxxxxxxxx"});
    let many = json!({"type": "Sequence", "normalizers": vec![ten; 8]});
    let dir = changed("tokenizer.json", |j| j["normalizer"] = many);
    let out = generate(dir.path(), &["--prompt", "xxxx"])
        .output()
        .unwrap();
    assert!(refusal(&out).contains("normalizer"));

    // Each search gives up before the engine's own limit; the text has many.
    let slow = json!({"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": false});
    let dir = changed("tokenizer.json", |j| j["pre_tokenizer"] = slow);
    let text = ("a".repeat(26) + "b").repeat(3000);
    let out = generate(dir.path(), &["--prompt", &text]).output().unwrap();
    assert!(refusal(&out).contains("cannot tokenize the prompt"));
}

#[test]
fn a_token_without_a_row_is_named_however_the_text_came_in() {
    let token = json!({"id": 300, "content": "<zz>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false});
    let dir = changed("tokenizer.json", |j| {
        j["added_tokens"].as_array_mut().unwrap().push(token)
    });
    let lines = dir.path().join("lines.jsonl");
    fs::write(
        &lines,
        "{\"prompt\":\"ab\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"<zz>\"}]}\n",
    )
    .unwrap();
    let messages = dir.path().join("m.json");
    fs::write(&messages, r#"[{"role": "user", "content": "a<zz>"}]"#).unwrap();
    for args in [
        &["--prompt", "a<zz>b"][..],
        &["--chat", "--prompt", "a<zz>b"],
        &["--prompts", lines.to_str().unwrap()],
        &["--messages", messages.to_str().unwrap()],
    ] {
        let line = refusal(&generate(dir.path(), args).output().unwrap());
        for word in ["token 300", "<zz>", "300 rows"] {
            assert!(line.contains(word), "{line}");
        }
    }
    assert_eq!(
        answer(dir.path(), &["--prompt", "ab"])["token_ids"],
        json!([208, 24])
    );
}

/// The model's first token made a special one: its text is not shown, and ends the answer as a stop string.
#[test]
fn a_stop_string_may_be_a_special_token() {
    let plain = model();
    let token = answer(plain.path(), &["--prompt", "ab"])["token_ids"][1]
        .as_u64()
        .unwrap();
    let mut text = String::new();
    let dir = changed("tokenizer.json", |j| {
        let vocab = j["model"]["vocab"].as_object().unwrap();
        let (name, _) = vocab
            .iter()
            .find(|(_, id)| id.as_u64() == Some(token))
            .unwrap();
        text = name.clone();
        let token = json!({"id": token, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true});
        j["added_tokens"].as_array_mut().unwrap().push(token);
    });
    let args = ["--prompt", "ab", "--max-tokens", "4", "--ignore-eos"];
    let all = answer(dir.path(), &args[..2]);
    assert_eq!(all["finish_reason"], "length");
    let stopped = generate(
        dir.path(),
        &[&args[..2], &["--stop", &text, "--json"]].concat(),
    )
    .output()
    .unwrap();
    let stopped: Value = serde_json::from_slice(&stopped.stdout).unwrap();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["token_ids"].as_array().unwrap().len(), 2);
    // The first token is half a character, which nothing completes any more.
    assert_eq!(stopped["text"], "");
}
