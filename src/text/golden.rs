//! Tests against what Python transformers answers: `tests/golden/text`, made by `make_text.py` there.
//!
//! The tests named `assets_*` need the real tokenizers (`tests/assets.sh DIR`, then `TANDEM_TEST_ASSETS=DIR`).

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use super::stream::byte_of;
use super::{ChatRequest, Tokenizer};

/// `tokenizer.json` of one token a byte (id = byte), and a few added ones.
pub(super) fn byte_tokenizer_json() -> Value {
    let mut vocab: Map<String, Value> = (0..0x200u32)
        .filter_map(char::from_u32)
        .filter_map(|c| Some((c.to_string(), byte_of(c)?.into())))
        .collect();
    vocab.insert("ab".into(), 256.into());
    vocab.insert("abc".into(), 257.into());
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "normalized": false,
               "single_word": false, "lstrip": false, "rstrip": false})
    };
    json!({
        "version": "1.0",
        "added_tokens": [
            added(258, "<|im_start|>", true),
            added(259, "<|im_end|>", true),
            added(260, "<think>", false),
            // Not in the byte alphabet: these stand for themselves.
            added(261, "<｜bar｜>", false),
            added(262, "<｜end｜>", true),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "ab c"]},
    })
}

/// A model folder with these files.
pub(super) fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    dir
}

/// The tokenizer of [`byte_tokenizer_json`], and these files beside it.
pub(super) fn load_with(files: &[(&str, &str)]) -> crate::Result<Tokenizer> {
    let json = byte_tokenizer_json().to_string();
    let dir = folder(&[files, &[("tokenizer.json", &json)]].concat());
    Tokenizer::load(dir.path(), usize::MAX)
}

pub(super) fn byte_tokenizer() -> Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| load_with(&[]).unwrap());
    TOKENIZER.clone()
}

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/text")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn asset(name: &str) -> PathBuf {
    let root = std::env::var_os("TANDEM_TEST_ASSETS")
        .expect("TANDEM_TEST_ASSETS must name the folder that tests/assets.sh filled");
    Path::new(&root).join(name)
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// All mismatches at once say more than the first one.
fn none_differ(what: &str, cases: usize, different: &[String]) {
    assert!(cases > 0, "no {what} in the golden file");
    let shown = different
        .iter()
        .take(20)
        .cloned()
        .collect::<Vec<_>>()
        .join("\n");
    assert!(
        different.is_empty(),
        "{} of {cases} {what} differ:\n{shown}",
        different.len()
    );
}

fn compare<T: PartialEq + std::fmt::Debug>(
    different: &mut Vec<String>,
    what: &str,
    ours: T,
    theirs: T,
) {
    if ours != theirs {
        different.push(format!(
            "{what}\n    ours   {ours:?}\n    theirs {theirs:?}"
        ));
    }
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = tokenizer.stream_decoder(skip_special);
    let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    text.push_str(&decoder.finish());
    text
}

fn check_texts(tokenizer: &Tokenizer, golden: &Value) {
    let texts = golden["texts"].as_array().unwrap();
    let mut different = Vec::new();
    for case in texts {
        let text = case["text"].as_str().unwrap();
        let theirs = ids(&case["ids"]);
        compare(
            &mut different,
            &format!("ids of {text:?}"),
            tokenizer.encode(text).unwrap(),
            theirs.clone(),
        );
        let decoded = case["decoded"].as_str().unwrap_or(text);
        let skipped = case["decoded_skip"].as_str().unwrap_or(text);
        for (skip, back) in [(false, decoded), (true, skipped)] {
            compare(
                &mut different,
                "decoded",
                &*tokenizer.decode(&theirs, skip).unwrap(),
                back,
            );
            compare(
                &mut different,
                "streamed",
                &*streamed(tokenizer, &theirs, skip),
                back,
            );
        }
    }
    none_differ("texts", texts.len(), &different);

    let lists = golden["ids"].as_array().unwrap();
    for case in lists {
        let theirs = ids(&case["ids"]);
        for (skip, key) in [(false, "decoded"), (true, "decoded_skip")] {
            let back = case[key].as_str().unwrap();
            compare(
                &mut different,
                "decoded",
                &*tokenizer.decode(&theirs, skip).unwrap(),
                back,
            );
            compare(
                &mut different,
                "streamed",
                &*streamed(tokenizer, &theirs, skip),
                back,
            );
        }
    }
    none_differ("lists of ids", lists.len(), &different);
}

fn check_chats(tokenizer: &Tokenizer, golden: &Value) {
    let chats = golden["chats"].as_array().unwrap();
    let mut different = Vec::new();
    for case in chats {
        let messages = golden["conversations"][case["conversation"].as_str().unwrap()]
            .as_array()
            .unwrap();
        let tools = golden["tools"][case["tools"].as_str().unwrap()].as_array();
        let extra = case["extra"].as_object().unwrap();
        let request = ChatRequest {
            messages,
            tools: tools.map(Vec::as_slice),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            extra: &extra
                .iter()
                .map(|(k, v)| (k.as_str(), v.clone()))
                .collect::<Vec<_>>(),
        };
        let ours = tokenizer.render_chat(&request);
        let what = format!(
            "{} with tools {}, {:?}",
            case["conversation"], case["tools"], request.extra
        );
        compare(
            &mut different,
            &what,
            ours.as_deref().ok(),
            case["text"].as_str(),
        );
        if let (Ok(text), Some(_)) = (&ours, case.get("ids")) {
            compare(
                &mut different,
                &what,
                tokenizer.encode_chat(text).unwrap(),
                ids(&case["ids"]),
            );
        }
    }
    none_differ("chats", chats.len(), &different);
}

fn check_model(folder: &str, file: &str) {
    let tokenizer = Tokenizer::load(&asset(folder), usize::MAX).unwrap();
    let golden = golden(file);
    assert_eq!(
        tokenizer.vocab_size() as u64,
        golden["vocab_size"].as_u64().unwrap()
    );
    assert_eq!(
        tokenizer.eos_token_id().map(u64::from),
        golden["eos_token_id"].as_u64()
    );
    assert_eq!(
        tokenizer.pad_token_id().map(u64::from),
        golden["pad_token_id"].as_u64()
    );
    check_texts(&tokenizer, &golden);
    check_chats(&tokenizer, &golden);
}

#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_qwen3_is_what_transformers_answers() {
    check_model("qwen3-tokenizer", "qwen3.json");
}

#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_qwen2_5_is_what_transformers_answers() {
    check_model("qwen2.5-tokenizer", "qwen2.5.json");
}

/// The limit that stops endless templates is far from any conversation that a model could read.
#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_a_very_long_conversation_is_rendered() {
    let tokenizer = Tokenizer::load(&asset("qwen3-tokenizer"), usize::MAX).unwrap();
    let turn = |role: &str| json!({"role": role, "content": "all work and no play ".repeat(50)});
    let messages = (0..4000)
        .map(|i| turn(["user", "assistant"][i % 2]))
        .collect::<Vec<_>>();
    let text = tokenizer
        .render_chat(&ChatRequest {
            messages: &messages,
            ..Default::default()
        })
        .unwrap();
    assert_eq!(text.matches("<|im_start|>").count(), 4000);
    assert_eq!(text.matches("all work").count(), 4000 * 50);
}

/// The demo model: another pre-tokenizer, and a template that is part of the config.
#[test]
#[ignore = "needs TANDEM_TEST_ASSETS"]
fn assets_smollm2_is_what_transformers_answers() {
    check_model("smollm2", "smollm2.json");
}

/// Small templates, one for each thing that chat templates use; no assets needed.
#[test]
fn templates_render_as_in_transformers() {
    check_templates("jinja.json");
}

/// Expressions of Python and Jinja2 that few templates use.
#[test]
fn expressions_are_what_python_makes_of_them() {
    check_templates("python.json");
}

fn check_templates(file: &str) {
    let golden = golden(file);
    let messages = golden["messages"].as_array().unwrap();
    let context = golden["context"].as_object().unwrap();
    let extra = context
        .iter()
        .map(|(k, v)| (k.as_str(), v.clone()))
        .collect::<Vec<_>>();
    let cases = golden["cases"].as_array().unwrap();
    let mut different = Vec::new();
    for case in cases {
        let template = case["template"].as_str().unwrap();
        let tokenizer = load_with(&[("chat_template.jinja", template)]).unwrap();
        let ours = tokenizer.render_chat(&ChatRequest {
            messages,
            extra: &extra,
            ..Default::default()
        });
        if ours.as_deref().ok() != case["text"].as_str() {
            different.push(format!(
                "{template:?}\n    ours   {ours:?}\n    theirs {:?}",
                case["text"]
            ));
        }
    }
    none_differ("templates", cases.len(), &different);
}
