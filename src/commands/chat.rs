//! `tandem chat`: a conversation on the terminal.

use super::generation::{Generation, Sampling, thinking};
use crate::cli::ChatArgs;
use crate::config::{GenerationConfig, ModelConfig};
use crate::engine::{Engine, FinishReason, Request};
use crate::output::{summary, write_stdout};
use crate::session::{self, Demand, Report};
use crate::text::{ChatRequest, Tokenizer};
use crate::{Error, Result, logging};
use serde_json::{Map, Value, json};
use std::io::{BufRead, IsTerminal};
use std::path::Path;
use std::time::Instant;

/// What `--context` is when it is not given: long enough for a talk, small enough for any machine.
const DEFAULT_CONTEXT: usize = 8192;

/// Runs the command on this rank.
///
/// # Errors
/// A model without a chat template, or anything that stops `generate`.
pub fn run(args: ChatArgs) -> Result<()> {
    let read = |dir: &Path, config: &ModelConfig| -> Result<(Demand, (Tokenizer, Sampling))> {
        let sampling = Sampling::new(&args.sampling, &GenerationConfig::from_dir(dir)?)?;
        let tokenizer = Tokenizer::load(dir, config.vocab_size)?;
        if !tokenizer.has_chat_template() {
            return Err(Error::file(
                dir,
                "the tokenizer has no chat template; use tandem generate with a raw prompt",
            ));
        }
        let context = args
            .context
            .unwrap_or(config.max_position_embeddings.min(DEFAULT_CONTEXT));
        let demand = Demand {
            context,
            sequences: 1,
            n_tokens_known: tokenizer.vocab_size(),
            keep_logits: false,
        };
        Ok((demand, (tokenizer, sampling)))
    };
    session::run(
        &args.model,
        read,
        |engine, (tokenizer, sampling), report| {
            Chat {
                args: &args,
                tokenizer,
                sampling,
                messages: Vec::new(),
                report,
            }
            .talk(engine)
        },
    )
}

struct Chat<'a> {
    args: &'a ChatArgs,
    tokenizer: Tokenizer,
    sampling: Sampling,
    messages: Vec<Value>,
    report: Report,
}

impl Chat<'_> {
    fn talk(&mut self, engine: &mut Engine<'_>) -> Result<()> {
        self.reset();
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            logging::say("Type a message; /reset starts anew, /exit or Ctrl-D ends.");
        }
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if interactive {
                logging::show("> ");
            }
            let Some(line) = lines.next() else {
                return Ok(());
            };
            let line = line.map_err(|e| Error::failed(format!("stdin: {e}")))?;
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/reset" => self.reset(),
                message => match self.prompt(engine.context(), message) {
                    Ok(prompt) => self.turn(engine, prompt)?,
                    // What cannot be asked must neither end the talk nor stay in it.
                    Err(e) => {
                        self.messages.pop();
                        logging::say(e);
                    }
                },
            }
        }
    }

    fn reset(&mut self) {
        self.messages.clear();
        if let Some(system) = &self.args.system {
            self.messages
                .push(json!({"role": "system", "content": system}));
        }
    }

    /// The conversation with one more message, in tokens.
    fn prompt(&mut self, context: usize, message: &str) -> Result<Vec<u32>> {
        self.messages
            .push(json!({"role": "user", "content": message}));
        let rendered = self.tokenizer.render_chat(&ChatRequest {
            messages: &self.messages,
            tools: None,
            add_generation_prompt: true,
            extra: &thinking(self.args.enable_thinking),
        })?;
        let prompt = self.tokenizer.encode_chat(&rendered)?;
        if prompt.is_empty() {
            return Err(Error::failed("the chat template makes no text of it"));
        }
        if prompt.len() >= context {
            return Err(Error::usage(format!(
                "the conversation's {} tokens fill the context of {context}: /reset, or start with a larger --context",
                prompt.len()
            )));
        }
        Ok(prompt)
    }

    /// The answer to a prompt, which the conversation keeps.
    fn turn(&mut self, engine: &mut Engine<'_>, prompt: Vec<u32>) -> Result<()> {
        let room = engine.context().saturating_sub(prompt.len());
        let longest = self.sampling.default_max_tokens(prompt.len());
        let start = Instant::now();
        let mut generation = Generation::new(
            Some(&self.tokenizer),
            &self.args.sampling.stop,
            prompt.clone(),
            Map::new(),
        )?;
        let id = engine.submit(Request {
            prompt,
            max_tokens: self.args.sampling.max_tokens.unwrap_or(longest).min(room),
            sampling: self.sampling.params.clone(),
            stop_tokens: self.sampling.stop_tokens.clone(),
        })?;
        let mut finish = None;
        while engine.has_work() && finish.is_none() {
            for event in engine.step()? {
                let (text, reason) = generation.take(&event, start);
                write_stdout(&text)?;
                finish = reason;
            }
        }
        engine.cancel(id);
        write_stdout("\n")?;
        self.messages
            .push(json!({"role": "assistant", "content": generation.text()}));
        // Who has typed a limit knows of it.
        if finish == Some(FinishReason::Length) && self.args.sampling.max_tokens.is_none() {
            logging::say(
                "the answer was cut at its longest: --max-tokens and --context allow more",
            );
        }
        let answer =
            generation.into_answer(finish.unwrap_or(FinishReason::Length), &self.report, false);
        tracing::info!("{}", summary(&answer.timings, answer.token_ids.len(), &[]));
        Ok(())
    }
}
