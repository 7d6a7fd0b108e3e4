//! What is to be answered: a text, a conversation, or the lines of a file, as token ids.

use super::generation::thinking;
use crate::cli::GenerateArgs;
use crate::text::{ChatRequest, Tokenizer};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::io::{IsTerminal, Read};
use std::path::Path;

/// A prompt on its way to the engine.
pub struct Job {
    /// Its token ids; not empty.
    pub prompt: Vec<u32>,
    /// Keys of a batch line that come back with its answer.
    pub extra: Map<String, Value>,
    /// Its line in the file of `--prompts`, from 1.
    pub line: Option<usize>,
}

impl Job {
    /// A prompt of its own.
    pub fn alone(prompt: Vec<u32>) -> Job {
        Job {
            prompt,
            extra: Map::new(),
            line: None,
        }
    }
}

/// Reads and tokenizes what is to be answered; no error of a line goes without its file and number.
///
/// # Errors
/// Files that cannot be read, lines that are no prompts, texts that the tokenizer or its template refuse.
pub fn jobs(
    args: &GenerateArgs,
    tokenizer: &Result<Tokenizer>,
    vocab_size: usize,
) -> Result<Vec<Job>> {
    if let Some(path) = &args.prompts {
        return batch(args, tokenizer, vocab_size, path);
    }
    let tokenizer = tokenizer.as_ref().map_err(Error::clone)?;
    let prompt = if let Some(path) = &args.messages {
        let messages = json_list(path, "messages")?;
        chat_tokens(args, tokenizer, messages)?
    } else {
        let text = match (&args.prompt, &args.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => read_text(path)?,
            (None, None) => read_stdin()?,
        };
        prompt_tokens(args, tokenizer, &text)?
    };
    Ok(vec![Job::alone(prompt)])
}

fn batch(
    args: &GenerateArgs,
    tokenizer: &Result<Tokenizer>,
    vocab_size: usize,
    path: &Path,
) -> Result<Vec<Job>> {
    let text = read_text(path)?;
    let lines = || text.lines().zip(1..).filter(|(l, _)| !l.trim().is_empty());
    let (mut jobs, mut unused) = (Vec::new(), BTreeSet::new());
    for (line, n) in lines() {
        let job = request(line)
            .and_then(|request| batch_line(args, tokenizer, vocab_size, request))
            .map_err(|e| Error::file(path, format!("line {n}: {e}")))?;
        unused.extend(job.extra.keys().filter_map(|key| a_flags_name(key)));
        jobs.push(Job {
            line: Some(n),
            ..job
        });
    }
    for key in unused {
        tracing::warn!(
            "{}: \"{key}\" is copied to the answers, not applied: the flags hold for all lines",
            path.display()
        );
    }
    match jobs.is_empty() {
        true => Err(Error::file(path, "no prompts in it")),
        false => Ok(jobs),
    }
}

/// A line of a batch as an object; a text is a prompt by itself. What is plainly meant as JSON is never taken for a text.
fn request(line: &str) -> Result<Map<String, Value>> {
    let text = |text: String| Map::from_iter([("prompt".to_string(), Value::String(text))]);
    match serde_json::from_str(line) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(Value::String(prompt)) => Ok(text(prompt)),
        Ok(Value::Array(_)) => Err(Error::failed(
            "is a JSON list; needs an object with \"prompt\", \"messages\" or \"prompt_token_ids\", or a string",
        )),
        Err(e) if looks_like_json(line) => {
            // The number of the line within the line would only confuse.
            let what = e.to_string().replace(" at line 1 column ", " at column ");
            Err(Error::failed(format!(
                "not valid JSON: {what}; a text that looks like this is given as a JSON string"
            )))
        }
        _ => Ok(text(line.to_string())),
    }
}

/// Whether a line begins as only JSON does: `{`, `["`, or a string in quotes from end to end.
fn looks_like_json(line: &str) -> bool {
    let line = line.trim();
    let quoted = |text: &str| text.len() > 1 && text.starts_with('"') && text.ends_with('"');
    match line.strip_prefix('[') {
        Some(list) => list.trim().is_empty() || list.trim_start().starts_with(['"', '{', '[']),
        None => line.starts_with('{') || quoted(line.trim_end_matches(',').trim_end()),
    }
}

/// The names of flags that some expect to work in a line.
fn a_flags_name(key: &str) -> Option<&'static str> {
    const NAMES: [&str; 11] = [
        "max_tokens",
        "max_new_tokens",
        "max_completion_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "tools",
    ];
    NAMES.into_iter().find(|name| *name == key)
}

fn batch_line(
    args: &GenerateArgs,
    tokenizer: &Result<Tokenizer>,
    vocab_size: usize,
    mut extra: Map<String, Value>,
) -> Result<Job> {
    let tokenizer = || tokenizer.as_ref().map_err(Error::clone);
    let given = ["messages", "prompt", "prompt_token_ids"].map(|key| extra.remove(key));
    let prompt = match given {
        [Some(Value::Array(messages)), None, None] => chat_tokens(args, tokenizer()?, messages)?,
        [None, Some(Value::String(text)), None] => prompt_tokens(args, tokenizer()?, &text)?,
        [None, None, Some(Value::Array(ids))] => checked_ids(&ids, vocab_size)?,
        _ => {
            return Err(Error::failed(
                "needs one of \"prompt\" (a string), \"messages\" (a list) and \"prompt_token_ids\" (a list)",
            ));
        }
    };
    const OURS: [&str; 9] = [
        "text",
        "token_ids",
        "prompt_token_ids",
        "logprobs",
        "finish_reason",
        "timings",
        "predicted",
        "host_gbs",
        "ranks",
    ];
    match OURS.iter().find(|key| extra.contains_key(**key)) {
        Some(key) => Err(Error::failed(format!(
            "key \"{key}\" is the answer's own; rename it"
        ))),
        None => Ok(Job {
            extra,
            ..Job::alone(prompt)
        }),
    }
}

/// A prompt that somebody else has tokenized.
fn checked_ids(ids: &[Value], vocab_size: usize) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().filter(|&id| id < vocab_size as u64);
        id.map(|id| id as u32).ok_or_else(|| {
            Error::failed(format!(
                "\"prompt_token_ids\" has {value}: ids are whole numbers below the vocabulary's {vocab_size}"
            ))
        })
    };
    match ids {
        [] => Err(Error::failed(
            "\"prompt_token_ids\" is empty: give at least one token",
        )),
        ids => ids.iter().map(id).collect(),
    }
}

fn prompt_tokens(args: &GenerateArgs, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let chat = args.chat
        || args.system.is_some()
        || args.tools.is_some()
        || args.enable_thinking.is_some();
    let tokens = if chat {
        chat_tokens(
            args,
            tokenizer,
            vec![serde_json::json!({"role": "user", "content": text})],
        )?
    } else {
        tokenizer.encode(text)?
    };
    if text.is_empty() || tokens.is_empty() {
        return Err(Error::failed(
            "the prompt is empty: give at least one token",
        ));
    }
    Ok(tokens)
}

fn chat_tokens(
    args: &GenerateArgs,
    tokenizer: &Tokenizer,
    mut messages: Vec<Value>,
) -> Result<Vec<u32>> {
    if let Some(system) = &args.system {
        messages.insert(0, serde_json::json!({"role": "system", "content": system}));
    }
    let tools = args
        .tools
        .as_deref()
        .map(|path| json_list(path, "tools"))
        .transpose()?;
    let request = ChatRequest {
        messages: &messages,
        tools: tools.as_deref(),
        add_generation_prompt: true,
        extra: &thinking(args.enable_thinking),
    };
    tokenizer.encode_chat(&tokenizer.render_chat(&request)?)
}

fn json_list(path: &Path, what: &str) -> Result<Vec<Value>> {
    match serde_json::from_str(&read_text(path)?) {
        Ok(Value::Array(list)) => Ok(list),
        Ok(_) => Err(Error::file(path, format!("not a JSON list of {what}"))),
        Err(e) => Err(Error::file(path, format!("not valid JSON: {e}"))),
    }
}

fn read_text(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return read_stdin();
    }
    let bytes =
        std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    utf8(bytes).map_err(|e| Error::file(path, e))
}

fn read_stdin() -> Result<String> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Error::usage(
            "no prompt: give --prompt TEXT, --prompt-file FILE, or text on stdin",
        ));
    }
    let mut bytes = Vec::new();
    stdin
        .read_to_end(&mut bytes)
        .map_err(|e| Error::failed(format!("stdin: {e}")))?;
    utf8(bytes).map_err(|e| Error::failed(format!("stdin: {e}")))
}

fn utf8(bytes: Vec<u8>) -> Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::failed(format!(
            "not valid UTF-8: the byte at offset {at} begins no character"
        ))
    })?;
    // A byte order mark says how a file is encoded; it is no text.
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_meant_as_json_is_never_a_text() {
        let prompt = |line: &str| {
            let request = request(line).map_err(|e| e.to_string())?;
            Ok::<_, String>(request["prompt"].as_str().unwrap_or("").to_string())
        };
        assert_eq!(prompt(r#"{"prompt": "ab"}"#).unwrap(), "ab");
        assert_eq!(prompt(r#""ab""#).unwrap(), "ab");
        for line in [
            r#"{"prompt": "ab",}"#,
            r#"{"prompt": "ab"},"#,
            "{'prompt': 'ab'}",
            r#"{"prompt": "ab"} {"prompt": "cd"}"#,
            r#"{"prompt": "ab""#,
            r#"  {prompt: "ab"}"#,
            r#"{"prompt": NaN}"#,
            r#"["ab", "cd"]"#,
            r#"["ab","#,
            r#"[{"prompt": "ab"},"#,
            r#""ab","#,
            "\"a\\x\"",
            "{",
            "[",
        ] {
            let e = prompt(line).unwrap_err();
            assert!(e.contains("JSON"), "{line}: {e}");
        }
        for line in [
            "ab",
            "12",
            "null",
            "\"ab",
            "\"Yes,\" she said, \"no.",
            "[INST] ab",
            "[1] ab",
            "// ab",
        ] {
            assert_eq!(prompt(line).unwrap(), line);
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        assert_eq!(utf8("\u{feff}ab".into()).unwrap(), "ab");
    }
}
