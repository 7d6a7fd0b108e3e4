//! `tandem generate`: one prompt streamed as text, or one or many as JSON.

use super::generation::{DEFAULT_MAX_TOKENS, Generation, Sampling, thinking};
use crate::cli::GenerateArgs;
use crate::config::{GenerationConfig, ModelConfig};
use crate::engine::{Engine, FinishReason, Request, SeqId};
use crate::output::{Answer, summary, write_json, write_logits, write_stdout};
use crate::session::{self, Demand, Report};
use crate::text::{ChatRequest, Tokenizer};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::time::Instant;

/// A prompt on its way to the engine.
struct Job {
    prompt: Vec<u32>,
    /// Keys of a batch line that come back with its answer.
    extra: Map<String, Value>,
}

/// Everything that rank 0 knows before the model is loaded.
struct Work {
    tokenizer: Option<Tokenizer>,
    sampling: Sampling,
    jobs: Vec<Job>,
    max_tokens: usize,
    /// Width of a row of logits.
    vocab_size: usize,
}

/// Runs the command on this rank.
///
/// # Errors
/// Wrong input, a model that cannot be loaded, a lost rank, output that cannot be written.
pub fn run(args: GenerateArgs) -> Result<()> {
    let read = |dir: &Path, config: &ModelConfig| prepare(&args, dir, config);
    session::run(&args.model, read, |engine, work, report| {
        answer(&args, engine, work, report)
    })
}

fn prepare(args: &GenerateArgs, dir: &Path, config: &ModelConfig) -> Result<(Demand, Work)> {
    let sampling = Sampling::new(&args.sampling, &GenerationConfig::from_dir(dir)?)?;
    let (tokenizer, jobs) = match args.prompt_tokens {
        Some(0) => return Err(Error::usage("--prompt-tokens 0: at least 1")),
        Some(_) if args.batch == 0 => return Err(Error::usage("--batch 0: at least 1")),
        Some(n) => {
            let job = |i| Job {
                prompt: made_up(n, i, config.vocab_size),
                extra: Map::new(),
            };
            (None, (0..args.batch).map(job).collect())
        }
        None => {
            let tokenizer = tokenizer(dir, config.vocab_size)?;
            let jobs = jobs(args, &tokenizer, config.vocab_size)?;
            (tokenizer.ok(), jobs)
        }
    };
    let sequences = if args.one_by_one { 1 } else { jobs.len() };
    if args.logits.is_some() && sequences > 1 {
        return Err(Error::usage(format!(
            "--logits: keeps those of one prompt at a time, not of {sequences}: add --one-by-one"
        )));
    }
    let longest = jobs.iter().map(|j| j.prompt.len()).max().unwrap_or(0);
    let room = config.max_position_embeddings.saturating_sub(longest);
    if room == 0 {
        let limit = config.max_position_embeddings;
        return Err(Error::failed(format!(
            "the prompt has {longest} tokens; the model takes {limit} with the answer: shorten it"
        )));
    }
    let max_tokens = args
        .sampling
        .max_tokens
        .unwrap_or(DEFAULT_MAX_TOKENS.min(room));
    if max_tokens > room {
        return Err(Error::usage(format!(
            "--max-tokens {max_tokens}: after a prompt of {longest} tokens the model has room for {room}"
        )));
    }
    let n_tokens_known = tokenizer
        .as_ref()
        .map_or(config.vocab_size, Tokenizer::vocab_size);
    let demand = Demand {
        context: longest + max_tokens,
        sequences,
        n_tokens_known,
        keep_logits: args.logits.is_some(),
    };
    Ok((
        demand,
        Work {
            tokenizer,
            sampling,
            jobs,
            max_tokens,
            vocab_size: config.vocab_size,
        },
    ))
}

/// The tokenizer, or why there is none: prompts that are token ids can do without.
fn tokenizer(dir: &Path, vocab_size: usize) -> Result<Result<Tokenizer>> {
    match Tokenizer::load(dir, vocab_size) {
        Err(e) if dir.join("tokenizer.json").exists() => Err(e),
        Err(_) if !dir.exists() => Ok(Err(Error::file(
            dir,
            "a named shape has no tokenizer: give --prompt-tokens N instead of a prompt",
        ))),
        found => Ok(found),
    }
}

/// Token ids without a meaning, spread over the vocabulary; no two prompts of a batch are alike.
fn made_up(n: usize, index: usize, vocab_size: usize) -> Vec<u32> {
    let token = |i: usize| ((i * 7919 + index * 31) % vocab_size) as u32;
    (0..n).map(token).collect()
}

/// Reads and tokenizes what is to be answered.
fn jobs(args: &GenerateArgs, tokenizer: &Result<Tokenizer>, vocab_size: usize) -> Result<Vec<Job>> {
    if let Some(path) = &args.prompts {
        let text = read_text(path)?;
        let lines = text
            .lines()
            .zip(1..)
            .filter(|(line, _)| !line.trim().is_empty());
        let jobs = lines.map(|(line, n)| {
            batch_line(args, tokenizer, vocab_size, line)
                .map_err(|e| Error::file(path, format!("line {n}: {e}")))
        });
        let jobs = jobs.collect::<Result<Vec<_>>>()?;
        return if jobs.is_empty() {
            Err(Error::file(path, "no prompts in it"))
        } else {
            Ok(jobs)
        };
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
    Ok(vec![Job {
        prompt,
        extra: Map::new(),
    }])
}

fn batch_line(
    args: &GenerateArgs,
    tokenizer: &Result<Tokenizer>,
    vocab_size: usize,
    line: &str,
) -> Result<Job> {
    let tokenizer = || tokenizer.as_ref().map_err(Error::clone);
    let mut extra = match serde_json::from_str(line) {
        Ok(Value::Object(map)) => map,
        Ok(Value::String(text)) => Map::from_iter([("prompt".to_string(), Value::String(text))]),
        _ => Map::from_iter([("prompt".to_string(), Value::String(line.to_string()))]),
    };
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
        None => Ok(Job { prompt, extra }),
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
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::failed(format!(
            "not valid UTF-8: the byte at offset {at} begins no character"
        ))
    })
}

/// Runs all jobs; a single one is streamed as text unless JSON is wanted.
fn answer(args: &GenerateArgs, engine: &mut Engine<'_>, work: Work, report: Report) -> Result<()> {
    let as_json = args.json || args.prompts.is_some() || args.batch > 1;
    let start = Instant::now();
    let mut running: HashMap<SeqId, (usize, Generation)> = HashMap::new();
    let mut done: Vec<Option<Answer>> = Vec::new();
    for (index, job) in work.jobs.into_iter().enumerate() {
        let generation = Generation::new(
            work.tokenizer.as_ref(),
            &args.sampling.stop,
            job.prompt.clone(),
            job.extra,
        )?;
        let id = engine.submit(Request {
            prompt: job.prompt,
            max_tokens: work.max_tokens,
            sampling: work.sampling.params.clone(),
            stop_tokens: work.sampling.stop_tokens.clone(),
        })?;
        running.insert(id, (index, generation));
        done.push(None);
    }
    let mut written = 0;
    while engine.has_work() {
        for event in engine.step()? {
            let id = event.id;
            let Some((index, generation)) = running.get_mut(&id) else {
                continue;
            };
            let (text, finish) = generation.take(&event, start);
            if !as_json {
                write_stdout(&text)?;
            }
            if finish == Some(FinishReason::Stop) && event.finish.is_none() {
                engine.cancel(id);
            }
            if let Some(reason) = finish {
                let index = *index;
                if let Some((_, generation)) = running.remove(&id) {
                    done[index] = Some(generation.into_answer(reason, &report, args.logprobs));
                }
            }
        }
        if as_json {
            // Answers leave in the order of their prompts, each as soon as all before it are out.
            while let Some(answer) = done.get_mut(written).and_then(Option::take) {
                write_json(&answer)?;
                report_line(&answer);
                written += 1;
            }
        }
    }
    if !as_json && let Some(answer) = done.into_iter().flatten().next() {
        if !answer.text.ends_with('\n') {
            write_stdout("\n")?;
        }
        report_line(&answer);
    }
    match &args.logits {
        Some(path) => write_logits(path, engine.kept_logits(), work.vocab_size),
        None => Ok(()),
    }
}

fn report_line(answer: &Answer) {
    eprintln!(
        "{}",
        summary(&answer.timings, answer.token_ids.len(), &answer.ranks)
    );
}
