//! `tokenizer.json` and `tokenizer_config.json` as one value that encodes, decodes and renders chats.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, DecoderWrapper};

use super::chat::{ChatRequest, ChatTemplates};
use super::guard::guarded;
use super::stream::StreamDecoder;
use crate::{Error, Result, files};

/// Names under which `tokenizer_config.json` gives single special tokens, and chat templates read them.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Longest text that is tokenized. A million tokens are about 4.5 MB of text; and Qwen's regular expression gives up
/// on ten million spaces in a row.
const MAX_PROMPT_BYTES: usize = 8 << 20;

/// A byte-level BPE tokenizer with its special tokens and chat templates. Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    templates: Arc<ChatTemplates>,
    vocab_size: usize,
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
    /// Needs `tokenizer.json`; reads `tokenizer_config.json`, `chat_template.jinja` and
    /// `additional_chat_templates/*.jinja` where they exist.
    ///
    /// # Errors
    /// Names the file that is missing, is not valid JSON, or holds a tokenizer that is not byte-level BPE.
    /// A chat template that does not compile is reported by [`Self::render_chat`]: raw prompts do not need it.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = files::read(&path, files::LARGE)?.ok_or_else(|| {
            Error::file(
                &path,
                "missing; --model wants a Hugging Face model folder with its tokenizer.json",
            )
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let config = read_config(&config_path)?;
        let inner = guarded(|| build(&bytes, &config))
            .unwrap_or_else(Err)
            .map_err(|e| Error::file(&path, format!("not a usable tokenizer.json: {e}")))?;
        drop(bytes);

        let special = NAMED_TOKENS
            .iter()
            .filter_map(|&name| Some((name, token_text(config.get(name)?)?)))
            .collect::<Vec<_>>();
        let id_of = |wanted: &str| {
            let (_, text) = special.iter().find(|(name, _)| *name == wanted)?;
            inner.token_to_id(text)
        };
        Ok(Self {
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
    /// A text of more than 8 MiB; whatever the tokenizer's own rules cannot digest.
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

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_PROMPT_BYTES {
            let what = format!(
                "the prompt has {} bytes; at most {MAX_PROMPT_BYTES} can be tokenized, more than any model reads",
                text.len()
            );
            return Err(Error::usage(what));
        }
        guarded(|| self.inner.encode_fast(text, add_special_tokens))
            .unwrap_or_else(|panic| Err(panic.into()))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| Error::failed(format!("cannot tokenize the prompt: {e}")))
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
fn build(json: &[u8], config: &Map<String, Value>) -> Result<tokenizers::Tokenizer, String> {
    let text = |e: tokenizers::Error| e.to_string();
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(text)?;
    if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return Err("its decoder is not ByteLevel, so it is not the byte-level BPE of Qwen".into());
    }
    // A prompt is never cut or filled up behind its author's back; transformers drops both settings too.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(text)?;
    let missing = tokens_of_config(config, &tokenizer);
    tokenizer.add_tokens(missing).map_err(text)?;
    // Some contradictions show only in use.
    tokenizer.encode_fast("a", true).map_err(text)?;
    Ok(tokenizer)
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let Some(bytes) = files::read(path, files::SMALL)? else {
        return Ok(Map::new());
    };
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))
}

/// A token in a config is its text, or an object with the text as `content`.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Tokens that only `tokenizer_config.json` has, or has with other properties: transformers adds those too.
fn tokens_of_config(
    config: &Map<String, Value>,
    tokenizer: &tokenizers::Tokenizer,
) -> Vec<AddedToken> {
    let known = tokenizer.get_added_tokens_decoder();
    let mut listed = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse::<u32>().ok()?, added_token(token)?)))
        .collect::<Vec<_>>();
    listed.sort_by_key(|(id, _)| *id);
    // Equality of added tokens is that of their text alone; their other properties count here.
    listed.retain(|(_, token)| !known.values().any(|k| same_properties(k, token)));

    let is_known = |text: &str| known.values().any(|k| k.content == text);
    let extra = ["additional_special_tokens", "extra_special_tokens"]
        .iter()
        .filter_map(|&key| config.get(key)?.as_array())
        .flatten();
    let mut tokens = listed.into_iter().map(|(_, t)| t).collect::<Vec<_>>();
    for token in NAMED_TOKENS
        .iter()
        .filter_map(|&name| config.get(name))
        .chain(extra)
    {
        if let Some(text) = token_text(token)
            && !is_known(text)
            && !tokens.iter().any(|t| t.content == text)
        {
            tokens.push(added_token(token).unwrap_or_default().special(true));
        }
    }
    tokens
}

fn same_properties(a: &AddedToken, b: &AddedToken) -> bool {
    a.content == b.content
        && (a.special, a.normalized, a.single_word, a.lstrip, a.rstrip)
            == (b.special, b.normalized, b.single_word, b.lstrip, b.rstrip)
}

fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name| token.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(token.is_string());
    Some(
        AddedToken::from(token_text(token)?, special)
            .normalized(flag("normalized").unwrap_or(!special))
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::golden::{byte_tokenizer, byte_tokenizer_json, folder, load_with};
    use super::*;
    use serde_json::json;

    /// The one line a person sees when this is the tokenizer.json.
    fn refusal(json: &str) -> String {
        let dir = folder(&[("tokenizer.json", json)]);
        let line = Tokenizer::load(dir.path()).unwrap_err().to_string();
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
        let line = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(line.contains("tokenizer.json: missing"), "{line}");
        let line = Tokenizer::load(Path::new("/no/such"))
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
        let tokenizer = Tokenizer::load(folder(&[("tokenizer.json", &json)]).path()).unwrap();
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
        let tokenizer = Tokenizer::load(folder(&[("tokenizer.json", &json)]).path()).unwrap();
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
        let tokenizer = Tokenizer::load(folder(&[("tokenizer.json", &json)]).path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 1000);
        assert_eq!(byte_tokenizer().vocab_size(), 263);
    }
}
