//! Text in, token ids out, and back: the tokenizer, the chat template, the streamed answer, the stop strings.
//!
//! A request passes through in this order: [`Tokenizer::render_chat`] → [`Tokenizer::encode_chat`]
//! (or [`Tokenizer::encode`] for a raw prompt) → the model → [`StreamDecoder`] → [`StopMatcher`] → the terminal.
//! The reference for all of it is Python transformers; `tests/golden/text` holds what that one answers.

mod added;
mod bounds;
mod chat;
mod filters;
mod guard;
mod jinja;
mod methods;
mod percent;
mod python;
mod renderer;
mod stop;
mod stream;
mod tokenizer;

#[cfg(test)]
mod golden;

pub use chat::ChatRequest;
pub use renderer::serve_if_asked;
pub use stop::{StopMatcher, StopStep};
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
