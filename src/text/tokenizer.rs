//! `tokenizer.json` and `tokenizer_config.json` as one value that encodes, decodes and renders chats.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokenizers::DecoderWrapper;

use super::added::Specials;
use super::bounds::{Growth, check_token};
use super::chat::{ChatRequest, ChatTemplates};
use super::guard::{guarded, in_time};
use super::stream::StreamDecoder;
use crate::{Error, Result, files};

/// Longest text that is tokenized. A million tokens are about 4.5 MB of text; and Qwen's regular expression gives up
/// on ten million spaces in a row.
const MAX_PROMPT_BYTES: usize = 8 << 20;

/// Time for a text: real rules take a tenth of a second for a megabyte, a hostile regular expression for ever.
const TIME: Duration = Duration::from_secs(5);
const TIME_PER_MIB: Duration = Duration::from_secs(8);

/// A byte-level BPE tokenizer with its special tokens and chat templates. Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    templates: Arc<ChatTemplates>,
    growth: Growth,
    vocab_size: usize,
    n_rows: usize,
    eos_token_id: Option<u32>,
    pad_token_id: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("eos_token_id", &self.eos_token_id)
            .field("pad_token_id", &self.pad_token_id)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads the tokenizer of the model folder `dir`.
    ///
    /// Needs `tokenizer.json`; reads `tokenizer_config.json`, `chat_template.jinja`,
    /// `additional_chat_templates/*.jinja`, `special_tokens_map.json` and `added_tokens.json` where they exist.
    /// The model's embedding has `n_rows` rows: a text with a token beyond them is refused.
    ///
    /// # Errors
    /// Names the file that is missing, is not valid JSON, or holds a tokenizer that is not byte-level BPE.
    /// A chat template that does not compile is reported by [`Self::render_chat`]: raw prompts do not need it.
    pub fn load(dir: &Path, n_rows: usize) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = files::read(&path, files::LARGE)?.ok_or_else(|| {
            Error::file(
                &path,
                "missing; --model wants a Hugging Face model folder with its tokenizer.json",
            )
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let config = read_config(&config_path)?;
        let specials = Specials::load(dir, &config)?;
        let (inner, growth) = guarded(|| build(&bytes, &specials))
            .unwrap_or_else(Err)
            .map_err(|e| Error::file(&path, format!("not a usable tokenizer.json: {e}")))?;
        drop(bytes);

        let special = specials.named().collect::<Vec<_>>();
        let id_of = |wanted: &str| {
            let (_, text) = special.iter().find(|(name, _)| *name == wanted)?;
            inner.token_to_id(text)
        };
        Ok(Self {
            growth,
            n_rows,
            vocab_size: inner
                .get_vocab(true)
                .into_values()
                .max()
                .map_or(0, |id| id as usize + 1),
            eos_token_id: id_of("eos_token"),
            pad_token_id: id_of("pad_token"),
            templates: Arc::new(ChatTemplates::load(dir, &config_path, &config, &special)?),
            inner: Arc::new(inner),
        })
    }

    /// The ids of a raw prompt, with whatever the tokenizer puts around a text (a BOS token, for those that have one).
    ///
    /// # Errors
    /// A text of more than 8 MiB, or one that the tokenizer's rules would make too long; a token without a row in the
    /// embedding; whatever the tokenizer's own rules cannot digest.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// The ids of a chat that [`Self::render_chat`] made: the template wrote every special token already.
    ///
    /// # Errors
    /// As for [`Self::encode`].
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>> {
        self.ids(rendered, false)
    }

    /// Every text becomes ids here.
    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_PROMPT_BYTES {
            let what = format!(
                "the prompt has {} bytes; at most {MAX_PROMPT_BYTES} can be tokenized, more than any model reads",
                text.len()
            );
            return Err(Error::usage(what));
        }
        let failed = |e| Error::failed(format!("cannot tokenize the prompt: tokenizer.json: {e}"));
        self.growth.check(text.len()).map_err(failed)?;
        let patience = TIME + TIME_PER_MIB.mul_f64(text.len() as f64 / (1 << 20) as f64);
        let (inner, text) = (Arc::clone(&self.inner), text.to_owned());
        let encode = move || {
            let encoding = inner.encode_fast(text, add_special_tokens);
            encoding
                .map(|e| e.get_ids().to_vec())
                .map_err(|e| e.to_string())
        };
        let ids = in_time(patience, encode)
            .and_then(|ids| ids)
            .map_err(failed)?;
        match ids.iter().find(|&&id| id as usize >= self.n_rows) {
            None => Ok(ids),
            Some(&id) => Err(Error::failed(format!(
                "token {id} of the prompt, \"{}\", has no row in the model's embedding of {} rows: the tokenizer is \
                 not this model's, or the embedding was not enlarged when tokens were added",
                self.token(id).unwrap_or_default(),
                self.n_rows
            ))),
        }
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing.
    ///
    /// # Errors
    /// Only those of the tokenizer's own decoder; the byte-level one has none.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| Error::failed(format!("cannot decode the answer: {e}")))
    }

    /// The same text, token by token; special tokens are left out if `skip_special`.
    pub fn stream_decoder(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder::new(self.clone(), skip_special)
    }

    /// The highest id that has a token, plus one. Models pad their logits beyond it: those rows must not be sampled.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of exactly this token, e.g. `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary writes it (byte-level tokens in GPT-2's alphabet).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `token` is a special one, which decoding may skip.
    pub fn is_special(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }

    /// The id of the config's `eos_token`. `generation_config.json` may name more; it wins.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// The id of the config's `pad_token`.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad_token_id
    }

    /// Whether the model comes with a chat template.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// Renders a conversation with the model's chat template, as transformers' `apply_chat_template` does.
    ///
    /// # Errors
    /// A model without a template, a template that does not compile, fails or raises, an empty conversation.
    pub fn render_chat(&self, request: &ChatRequest<'_>) -> Result<String> {
        self.templates.render(request)
    }
}

/// The tokenizer of `tokenizer.json` as this program uses it; errors are the reason alone.
fn build(json: &[u8], specials: &Specials) -> Result<(tokenizers::Tokenizer, Growth), String> {
    let text = |e: tokenizers::Error| e.to_string();
    let growth = Growth::of(json)?;
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(text)?;
    if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return Err("its decoder is not ByteLevel, so it is not the byte-level BPE of Qwen".into());
    }
    // A prompt is never cut or filled up behind its author's back; transformers drops both settings too.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(text)?;
    let missing = specials.missing(&tokenizer);
    for token in &missing {
        check_token(&token.content)?;
    }
    growth.check(missing.iter().map(|t| t.content.len()).sum())?;
    tokenizer.add_tokens(missing).map_err(text)?;
    for token in tokenizer.get_vocab(false).keys() {
        check_token(token)?;
    }
    // Some contradictions show only in use.
    tokenizer.encode_fast("a", true).map_err(text)?;
    Ok((tokenizer, growth))
}

/// The object that a JSON file holds; a file that is missing is an empty one.
pub(super) fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let Some(bytes) = files::read(path, files::SMALL)? else {
        return Ok(Map::new());
    };
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))
}

#[cfg(test)]
mod tests {
    use super::super::golden::{byte_tokenizer, byte_tokenizer_json, folder, load_with};
    use super::*;
    use serde_json::json;

    /// The one line a person sees when this is the tokenizer.json.
    fn refusal(json: &str) -> String {
        let dir = folder(&[("tokenizer.json", json)]);
        let line = Tokenizer::load(dir.path(), usize::MAX)
            .unwrap_err()
            .to_string();
        assert!(
            line.contains("tokenizer.json: ") && !line.contains('\n'),
            "{line}"
        );
        line
    }

    fn changed(change: impl FnOnce(&mut Value)) -> String {
        let mut json = byte_tokenizer_json();
        change(&mut json);
        json.to_string()
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = folder(&[]);
        let line = Tokenizer::load(dir.path(), usize::MAX)
            .unwrap_err()
            .to_string();
        assert!(line.contains("tokenizer.json: missing"), "{line}");
        let line = Tokenizer::load(Path::new("/no/such"), usize::MAX)
            .unwrap_err()
            .to_string();
        assert!(line.contains("/no/such/tokenizer.json"), "{line}");
    }

    #[test]
    fn a_broken_tokenizer_is_one_line() {
        for json in [
            "",
            "{",
            "[]",
            "{}",
            "null",
            "\u{0}",
            r#"{"version": "1.0"}"#,
        ] {
            assert!(refusal(json).contains("not a usable"), "{json:?}");
        }
        let whole = byte_tokenizer_json().to_string();
        refusal(&whole[..whole.len() / 2]);
    }

    #[test]
    fn a_tokenizer_that_contradicts_itself_is_an_error_not_a_panic() {
        let template = json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
        refusal(&changed(|j| j["post_processor"] = template));
        refusal(&changed(|j| j["model"]["merges"] = json!(["a zzz"])));
        refusal(&changed(|j| {
            j["model"]["vocab"]["<think>"] = json!(u32::MAX)
        }));
        refusal(&changed(|j| j["model"]["vocab"]["ab"] = json!(-1)));
        refusal(&changed(|j| {
            j["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(("},
            "behavior": "Isolated", "invert": false})
        }));
    }

    #[test]
    fn a_decoder_that_is_not_byte_level_is_refused() {
        for decoder in [Value::Null, json!({"type": "Fuse"})] {
            let line = refusal(&changed(|j| j["decoder"] = decoder));
            assert!(line.contains("not ByteLevel"), "{line}");
        }
    }

    #[test]
    fn a_pattern_that_gives_up_on_a_text_is_an_error_not_a_panic() {
        let json = changed(|j| {
            j["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(a|aa)+$"},
                "behavior": "Isolated", "invert": false});
        });
        let tokenizer =
            Tokenizer::load(folder(&[("tokenizer.json", &json)]).path(), usize::MAX).unwrap();
        let line = tokenizer
            .encode(&("a".repeat(1000) + "b"))
            .unwrap_err()
            .to_string();
        assert!(line.contains("cannot tokenize the prompt"), "{line}");
        assert_eq!(
            tokenizer.encode("xy").unwrap(),
            [u32::from(b'x'), u32::from(b'y')]
        );
    }

    #[test]
    fn a_prompt_longer_than_any_model_reads_is_refused_with_the_numbers() {
        let long = " ".repeat(MAX_PROMPT_BYTES + 1);
        let line = byte_tokenizer().encode(&long).unwrap_err().to_string();
        assert!(
            line.contains("8388609 bytes") && line.contains("8388608"),
            "{line}"
        );
    }

    #[test]
    fn a_broken_config_is_named() {
        for config in ["{", "[]", "7"] {
            let line = load_with(&[("tokenizer_config.json", config)])
                .unwrap_err()
                .to_string();
            assert!(
                line.contains("tokenizer_config.json: not a JSON object"),
                "{line}"
            );
        }
    }

    #[test]
    fn prompts_are_neither_cut_nor_padded() {
        let json = changed(|j| {
            j["truncation"] = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
            j["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
        });
        let tokenizer =
            Tokenizer::load(folder(&[("tokenizer.json", &json)]).path(), usize::MAX).unwrap();
        assert_eq!(tokenizer.encode("xyz").unwrap().len(), 3);
    }

    /// Ids as transformers 5.23 gives them for the same two files.
    #[test]
    fn tokens_that_only_the_config_has_are_added_behind_the_others() {
        let config = json!({
            "eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}, "unk_token": null,
            "additional_special_tokens": ["<|im_start|>", "<extra>"],
            "added_tokens_decoder": {
                "260": {"content": "<think>", "special": true, "normalized": false},
                "300": {"content": "<late>", "special": false, "normalized": false},
            },
        });
        let tokenizer = load_with(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        assert_eq!(
            tokenizer.encode("<late><pad><extra>").unwrap(),
            [263, 264, 265]
        );
        assert_eq!(
            (tokenizer.eos_token_id(), tokenizer.pad_token_id()),
            (Some(259), Some(264))
        );
        assert_eq!(tokenizer.vocab_size(), 266);
        let ids = tokenizer.encode("<think>a<|im_end|><late>").unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<late>");
        assert_eq!(tokenizer.token_id("<|im_start|>"), Some(258));
        assert_eq!(tokenizer.token_id("<nope>"), None);
    }

    #[test]
    fn ids_may_have_gaps_and_the_vocabulary_ends_after_the_highest() {
        let json = changed(|j| j["model"]["vocab"]["zz"] = json!(999));
        let tokenizer =
            Tokenizer::load(folder(&[("tokenizer.json", &json)]).path(), usize::MAX).unwrap();
        assert_eq!(tokenizer.vocab_size(), 1000);
        assert_eq!(byte_tokenizer().vocab_size(), 263);
    }
}
