//! `tandem generate`: one prompt streamed as text, or one or many as JSON.

use super::generation::{Generation, Sampling};
use super::prompts::{Job, jobs};
use crate::cli::GenerateArgs;
use crate::config::{GenerationConfig, ModelConfig};
use crate::engine::{Engine, Event, FinishReason, Request, SeqId};
use crate::logging::say;
use crate::output::{Answer, Lines, summary, write_json, write_logits, write_stdout};
use crate::session::{self, Demand, Report};
use crate::text::Tokenizer;
use crate::{Error, Result};
use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

/// Everything that rank 0 knows before the model is loaded.
struct Work {
    tokenizer: Option<Tokenizer>,
    sampling: Sampling,
    jobs: Vec<Job>,
    /// Longest answer of each job, in tokens.
    max_tokens: Vec<usize>,
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
            check_made_up(n, args.batch, config)?;
            let job = |i| Job::alone(made_up(n, i, config.vocab_size));
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
    let max_tokens = jobs
        .iter()
        .map(|job| longest_answer(args, &sampling, config.max_position_embeddings, job))
        .collect::<Result<Vec<_>>>()?;
    let lengths = jobs.iter().zip(&max_tokens);
    let context = lengths.map(|(job, n)| job.prompt.len() + n).max();
    let n_tokens_known = tokenizer
        .as_ref()
        .map_or(config.vocab_size, Tokenizer::vocab_size);
    let demand = Demand {
        context: context.unwrap_or(0),
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

/// The longest answer to a prompt: what was typed, or as far as the context allows.
fn longest_answer(
    args: &GenerateArgs,
    sampling: &Sampling,
    context: usize,
    job: &Job,
) -> Result<usize> {
    let n = job.prompt.len();
    let room = context.saturating_sub(n);
    let error = match args.sampling.max_tokens {
        _ if room == 0 => Error::failed(format!(
            "the prompt has {n} tokens; the model takes {context} with the answer: shorten it"
        )),
        Some(typed) if typed > room => Error::usage(format!(
            "--max-tokens {typed}: after a prompt of {n} tokens the model has room for {room}"
        )),
        typed => return Ok(typed.unwrap_or(sampling.default_max_tokens(n).min(room))),
    };
    Err(match (&args.prompts, job.line) {
        (Some(path), Some(line)) => error.within(format!("{}: line {line}", path.display())),
        _ => error,
    })
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

/// Made-up prompts must fit the model and the memory before there are any.
fn check_made_up(n: usize, batch: usize, config: &ModelConfig) -> Result<()> {
    let longest = config.max_position_embeddings;
    if n >= longest {
        return Err(Error::failed(format!(
            "the prompt has {n} tokens; the model takes {longest} with the answer: shorten it"
        )));
    }
    const MOST: usize = 1 << 27;
    match n.checked_mul(batch) {
        Some(total) if total <= MOST => Ok(()),
        _ => Err(Error::usage(format!(
            "--batch {batch}: prompts of {n} tokens make more than {MOST} tokens in all"
        ))),
    }
}

/// Token ids without a meaning, spread over the vocabulary; no two prompts of a batch are alike.
fn made_up(n: usize, index: usize, vocab_size: usize) -> Vec<u32> {
    let token = |i: usize| ((i * 7919 + index * 31) % vocab_size) as u32;
    (0..n).map(token).collect()
}

/// Runs all jobs; a single one is streamed as text unless JSON is wanted.
fn answer(args: &GenerateArgs, engine: &mut Engine<'_>, work: Work, report: Report) -> Result<()> {
    let as_batch = args.prompts.is_some() || args.batch > 1;
    let as_text = !args.json && !as_batch;
    let start = Instant::now();
    let mut running: HashMap<SeqId, (usize, Generation)> = HashMap::new();
    for (index, (job, max_tokens)) in work.jobs.into_iter().zip(work.max_tokens).enumerate() {
        let generation = Generation::new(
            work.tokenizer.as_ref(),
            &args.sampling.stop,
            job.prompt.clone(),
            job.extra,
        )?;
        let id = engine.submit(Request {
            prompt: job.prompt,
            max_tokens,
            sampling: work.sampling.of_prompt(index),
            stop_tokens: work.sampling.stop_tokens.clone(),
        })?;
        running.insert(id, (index, generation));
    }
    let mut out = Out {
        lines: as_batch.then(Lines::new),
        as_text,
        n_done: 0,
        n_cut: 0,
    };
    while engine.has_work() {
        for event in engine.step()? {
            let id = event.id;
            let Some((_, generation)) = running.get_mut(&id) else {
                continue;
            };
            let Some(reason) = take(engine, generation, &event, start, as_text)? else {
                continue;
            };
            if let Some((index, generation)) = running.remove(&id) {
                let answer = generation.into_answer(reason, &report, args.logprobs);
                out.done(args, index, answer)?;
            }
        }
    }
    out.finish()?;
    match &args.logits {
        Some(path) => write_logits(path, engine.kept_logits(), work.vocab_size),
        None => Ok(()),
    }
}

/// Takes in a token and shows its text where that is wanted; why the answer ends, if it does.
fn take(
    engine: &mut Engine<'_>,
    generation: &mut Generation,
    event: &Event,
    start: Instant,
    as_text: bool,
) -> Result<Option<FinishReason>> {
    let (text, finish) = generation.take(event, start);
    if as_text {
        write_stdout(&text)?;
    }
    if finish == Some(FinishReason::Stop) && event.finish.is_none() {
        engine.cancel(event.id);
    }
    Ok(finish)
}

/// Where finished answers go.
struct Out {
    /// Of a batch.
    lines: Option<Lines>,
    /// The text of the one answer is out already.
    as_text: bool,
    n_done: usize,
    /// Answers that ended at their longest.
    n_cut: usize,
}

impl Out {
    fn done(&mut self, args: &GenerateArgs, index: usize, mut answer: Answer) -> Result<()> {
        let was_cut = answer.finish_reason == FinishReason::Length;
        self.n_done += 1;
        self.n_cut += usize::from(was_cut);
        if let Some(lines) = &mut self.lines {
            // A line's own key of that name tells it from the others as well.
            if !answer.extra.contains_key("index") {
                answer.index = Some(index);
            }
            lines.write(index, &answer)?;
        } else if !self.as_text {
            write_json(&answer)?;
        } else if !answer.text.ends_with('\n') {
            write_stdout("\n")?;
        }
        if was_cut && self.as_text {
            say(cut(args, &answer));
        }
        say(summary(
            &answer.timings,
            answer.token_ids.len(),
            &answer.ranks,
        ));
        Ok(())
    }

    /// The end of a run in which every answer is out.
    fn finish(self) -> Result<()> {
        match self.lines {
            Some(lines) => {
                if self.n_cut > 0 {
                    let (cut, done) = (self.n_cut, self.n_done);
                    say(format_args!(
                        "{cut} of {done} answers were cut at their longest (\"finish_reason\": \"length\")"
                    ));
                }
                lines.finish()
            }
            None => Ok(()),
        }
    }
}

/// That an answer ends in the middle, and what limit it met.
fn cut(args: &GenerateArgs, answer: &Answer) -> String {
    let n = answer.token_ids.len();
    match args.sampling.max_tokens {
        Some(_) => format!("the answer was cut at --max-tokens {n}"),
        None => {
            format!("the answer was cut at {n} tokens: --max-tokens allows more, up to the context")
        }
    }
}
