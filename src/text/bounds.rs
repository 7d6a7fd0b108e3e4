//! What a `tokenizer.json` may make of a text: its rules come from strangers, and some of them multiply.
//!
//! The rules are read from the file itself, before anything is built of it: building applies them already.

use serde::Deserialize;
use serde_json::Value;

/// Longest text that the rules may make of a text.
const MAX_BYTES: f64 = (32 << 20) as f64;
/// Most tokens that may be put around a text, and longest token. Real ones: 2, and a few hundred bytes.
const MAX_AROUND: usize = 1024;
const MAX_TOKEN_BYTES: usize = 64 << 10;

/// The largest factor by which a text grows on its way to the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Growth(f64);

#[derive(Deserialize)]
struct Rules {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f64>,
}

#[derive(Deserialize)]
struct Added {
    content: String,
}

impl Growth {
    /// The growth that the rules of this `tokenizer.json` allow.
    ///
    /// Errors are the reason alone.
    pub(super) fn of(json: &[u8]) -> Result<Self, String> {
        // Another kind of JSON than an object is the tokenizers crate's to refuse.
        let rules: Rules = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        // For training; a prompt would be other tokens each time.
        if let Some(share) = rules.model.and_then(|m| m.dropout).filter(|&p| p > 0.0) {
            return Err(format!(
                "its model leaves out merges by chance (dropout {share}): set it to null"
            ));
        }
        let growth = Growth(growth(&rules.normalizer)? * growth(&rules.pre_tokenizer)?);
        for token in &rules.added_tokens {
            check_token(&token.content)?;
        }
        // Added tokens are normalized, too, all of them when the file is read.
        growth.check(rules.added_tokens.iter().map(|t| t.content.len()).sum())?;
        let around = around(&rules.post_processor);
        if around.tokens > MAX_AROUND || around.texts > 1 {
            return Err(format!(
                "its post_processor puts {} tokens around a text and takes the text {} times; at most {MAX_AROUND} and once",
                around.tokens, around.texts
            ));
        }
        Ok(growth)
    }

    /// Refuses a text of so many bytes if the rules could make too much of it.
    pub(super) fn check(self, bytes: usize) -> Result<(), String> {
        if bytes as f64 * self.0 > MAX_BYTES {
            return Err(format!(
                "the rules of its normalizer and pre_tokenizer can make {:.0} times as much of a text of {bytes} bytes; \
                 at most {MAX_BYTES} bytes",
                self.0
            ));
        }
        Ok(())
    }
}

/// Refuses a token that no vocabulary needs: each time it is answered, its whole text is shown.
pub(super) fn check_token(token: &str) -> Result<(), String> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(format!(
            "a token of {} bytes; at most {MAX_TOKEN_BYTES}",
            token.len()
        ));
    }
    Ok(())
}

/// How many bytes one byte becomes at most by a rule of the file's author.
///
/// Unicode's own rules (normal forms, small letters) count as 1: they grow once and by little.
fn growth(rule: &Value) -> Result<f64, String> {
    let text = |key: &str| rule.get(key).and_then(Value::as_str).unwrap_or_default();
    let length = |key: &str| text(key).len() as f64;
    let all = |key: &str| -> Result<f64, String> {
        let rules = rule.get(key).and_then(Value::as_array);
        rules.into_iter().flatten().map(growth).product()
    };
    if rule.is_null() {
        return Ok(1.0);
    }
    match text("type") {
        "Sequence" => Ok(all("normalizers")? * all("pretokenizers")?),
        "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "Strip" | "StripAccents" | "Nmt"
        | "BertNormalizer" | "BertPreTokenizer" | "CharDelimiterSplit" | "Digits"
        | "FixedLength" | "Punctuation" | "Split" | "UnicodeScripts" | "Whitespace"
        | "WhitespaceSplit" => Ok(1.0),
        "ByteLevel" => Ok(2.0),
        "Metaspace" => Ok(4.0),
        // A text may be cut by added tokens after every character.
        "Prepend" => Ok(1.0 + length("prepend")),
        "Precompiled" => Ok(1.0 + length("precompiled_charsmap")),
        "Replace" => {
            let pattern = rule.get("pattern").and_then(|p| p.get("String"));
            Ok(match pattern.and_then(Value::as_str).map_or(0, str::len) {
                // A regular expression may match a single byte, and between two.
                0 => 1.0 + length("content"),
                n => (length("content") / n as f64).max(1.0),
            })
        }
        other => Err(format!("a rule of an unknown type \"{other}\"")),
    }
}

/// What a post-processor puts together.
struct Around {
    tokens: usize,
    texts: usize,
}

fn around(rule: &Value) -> Around {
    let list = |key: &str| rule.get(key).and_then(Value::as_array);
    let mut sum = Around {
        tokens: 0,
        texts: 1,
    };
    for inner in list("processors").into_iter().flatten().map(around) {
        sum.tokens = sum.tokens.saturating_add(inner.tokens);
        sum.texts = sum.texts.saturating_mul(inner.texts);
    }
    if let Some(pieces) = list("single") {
        let n_ids = |piece: &Value| {
            let name = piece.get("SpecialToken")?.get("id")?.as_str()?;
            let ids = rule.get("special_tokens")?.get(name)?.get("ids")?;
            Some(ids.as_array()?.len())
        };
        let is_text = |piece: &&Value| piece.get("Sequence").is_some();
        sum.tokens = pieces.iter().filter_map(n_ids).sum();
        sum.texts = pieces.iter().filter(is_text).count();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(normalizer: Value, pre_tokenizer: Value) -> Result<Growth, String> {
        let json = json!({"normalizer": normalizer, "pre_tokenizer": pre_tokenizer});
        Growth::of(json.to_string().as_bytes())
    }

    fn replace(pattern: Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn rules_of_real_tokenizers_hardly_grow() {
        let split = json!({"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false});
        let qwen = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
        assert_eq!(of(json!({"type": "NFC"}), qwen), Ok(Growth(2.0)));
        assert_eq!(of(Value::Null, Value::Null), Ok(Growth(1.0)));
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁")]});
        assert_eq!(of(llama, Value::Null), Ok(Growth(12.0)));
    }

    #[test]
    fn merges_are_not_left_out_by_chance() {
        for (model, refused) in [
            (json!({"type": "BPE", "dropout": 0.1}), true),
            (json!({"type": "BPE", "dropout": 0.0}), false),
            (
                json!({"type": "BPE", "dropout": null, "vocab": {"a": 0}}),
                false,
            ),
        ] {
            let json = json!({ "model": model }).to_string();
            let got = Growth::of(json.as_bytes());
            assert_eq!(got.is_err_and(|e| e.contains("dropout")), refused, "{json}");
        }
    }

    #[test]
    fn rules_that_multiply_are_multiplied() {
        let ten = replace(json!({"Regex": "."}), "xxxxxxxxxx");
        let many = json!({"type": "Sequence", "normalizers": vec![ten; 8]});
        let growth = of(many.clone(), Value::Null).unwrap();
        assert_eq!(growth, Growth(11f64.powi(8)));
        assert!(growth.check(4).unwrap_err().contains("214358881 times"));
        let doubled =
            json!({"type": "Sequence", "pretokenizers": vec![json!({"type": "ByteLevel"}); 40]});
        assert!(of(Value::Null, doubled).unwrap().check(1).is_err());
        assert!(of(json!({"type": "Grow"}), Value::Null).is_err());
        // Such a file is not even built: building normalizes its tokens.
        let json = json!({"normalizer": many, "added_tokens": [{"content": "<late>"}]});
        assert!(Growth::of(json.to_string().as_bytes()).is_err());
    }

    #[test]
    fn a_post_processor_adds_a_few_tokens_to_the_text_once() {
        let with = |single: Vec<Value>, n_ids: usize| {
            let ids = vec![0; n_ids];
            let template = json!({"type": "TemplateProcessing", "single": single,
                "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": []}}});
            let json = json!({"post_processor": {"type": "Sequence", "processors": [template]}});
            Growth::of(json.to_string().as_bytes())
        };
        let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        assert!(with(vec![bos.clone(), text.clone()], 1).is_ok());
        assert!(with(vec![bos.clone(); 100], 100).is_err());
        assert!(with(vec![text.clone(), text], 1).is_err());
        let long = json!({"added_tokens": [{"content": "x".repeat(MAX_TOKEN_BYTES + 1)}]});
        assert!(Growth::of(long.to_string().as_bytes()).is_err());
    }
}
