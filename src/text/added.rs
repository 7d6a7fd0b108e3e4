//! Tokens that only the files beside `tokenizer.json` name: transformers adds those, too, and so does this.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::tokenizer::read_config;
use crate::{Error, Result};

/// Names under which a config gives single special tokens, and chat templates read them.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
const LISTED: &str = "added_tokens_decoder";
const EXTRA: &str = "extra_special_tokens";
/// What older versions call [`EXTRA`].
const ADDITIONAL: &str = "additional_special_tokens";

/// The special tokens of a model folder, as its configs write them.
#[derive(Debug, Default)]
pub(super) struct Specials {
    /// `added_tokens_decoder`, or `added_tokens.json`, by id.
    listed: Vec<(u32, AddedToken)>,
    /// Tokens with a name: the usual ones, then the model's own (`image_token`).
    named: Map<String, Value>,
    /// Tokens without a name.
    extra: Vec<Value>,
}

impl Specials {
    /// Gathers what `tokenizer_config.json` (already read) and the two older files of `dir` say.
    ///
    /// # Errors
    /// A file that is not a JSON object.
    pub(super) fn load(dir: &Path, config: &Map<String, Value>) -> Result<Self> {
        let mut specials = Specials::default();
        // The older files count only where the config does not list its tokens.
        let older = match config.get(LISTED) {
            Some(_) => Map::new(),
            None => read_config(&dir.join("special_tokens_map.json"))?,
        };
        for name in NAMED {
            if let Some(token) = older.get(name).or_else(|| config.get(name)) {
                specials.name(name, token);
            }
        }
        for file in [config, &older] {
            let own = |(name, token): &(&String, &Value)| {
                name.ends_with("_token") && !NAMED.contains(&name.as_str()) && is_token(token)
            };
            for (name, token) in file.iter().filter(own) {
                specials.name(name, token);
            }
            specials.take_extra(file);
        }
        match config.get(LISTED).and_then(Value::as_object) {
            Some(listed) => specials.list(
                listed
                    .iter()
                    .filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token)?))),
            ),
            None if config.contains_key(LISTED) => {}
            None => specials.take_added(&dir.join("added_tokens.json"))?,
        }
        Ok(specials)
    }

    /// The texts of the tokens with a name.
    pub(super) fn named(&self) -> impl Iterator<Item = (&str, &str)> {
        self.named
            .iter()
            .filter_map(|(name, token)| Some((name.as_str(), token_text(token)?)))
    }

    fn name(&mut self, name: &str, token: &Value) {
        self.named.insert(name.to_owned(), token.clone());
    }

    fn list(&mut self, tokens: impl Iterator<Item = (u32, AddedToken)>) {
        self.listed.extend(tokens);
        self.listed.sort_by_key(|(id, _)| *id);
    }

    /// The tokens under [`EXTRA`], a list or an object of names, or else under [`ADDITIONAL`].
    fn take_extra(&mut self, file: &Map<String, Value>) {
        let is_empty = |v: &Value| match v {
            Value::Array(list) => list.is_empty(),
            Value::Object(names) => names.is_empty(),
            _ => true,
        };
        let given = |key| file.get(key).filter(|v| !is_empty(v));
        let mut keys = [given(EXTRA), None];
        if !matches!(keys[0], Some(Value::Array(_))) && self.extra.is_empty() {
            keys[1] = given(ADDITIONAL);
        }
        for tokens in keys.into_iter().flatten() {
            match tokens {
                Value::Array(list) => self.extra.extend(list.iter().cloned()),
                Value::Object(names) => {
                    for (name, token) in names {
                        self.name(name, token);
                    }
                }
                _ => {}
            }
        }
    }

    /// `added_tokens.json` holds text and id, nothing else.
    fn take_added(&mut self, path: &Path) -> Result<()> {
        let specials: HashSet<String> = self
            .named()
            .map(|(_, text)| text)
            .chain(self.extra.iter().filter_map(token_text))
            .map(str::to_owned)
            .collect();
        let mut added = Vec::new();
        for (text, id) in read_config(path)? {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| {
                Error::file(path, format!("the id of \"{text}\" is not a whole number"))
            })?;
            let special = specials.contains(&text);
            added.push((id, AddedToken::from(text, special).normalized(!special)));
        }
        self.list(added.into_iter());
        Ok(())
    }

    /// The tokens that `tokenizer` lacks, or has with other properties, in the order in which transformers adds them.
    pub(super) fn missing(&self, tokenizer: &tokenizers::Tokenizer) -> Vec<AddedToken> {
        let known: HashMap<String, AddedToken> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| (token.content.clone(), token))
            .collect();
        let mut tokens: Vec<AddedToken> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        for (_, token) in &self.listed {
            // Equality of added tokens is that of their text alone; their other properties count here.
            let found = known.get(&token.content);
            if !found.is_some_and(|known| same_properties(known, token)) {
                places.insert(token.content.clone(), tokens.len());
                tokens.push(token.clone());
            }
        }
        let named = self.named.values().map(|token| (token, true));
        let extra = self.extra.iter().map(|token| (token, false));
        for (token, has_name) in named.chain(extra) {
            let Some(text) = token_text(token) else {
                continue;
            };
            if let Some(&place) = places.get(text) {
                tokens[place].special |= has_name;
                continue;
            }
            let missing = match known.get(text) {
                None => added_token(token).unwrap_or_default().special(true),
                // A token with a name is special, whatever tokenizer.json says.
                Some(known) if has_name && !known.special => known.clone().special(true),
                Some(_) => continue,
            };
            places.insert(text.to_owned(), tokens.len());
            tokens.push(missing);
        }
        tokens
    }
}

/// A token in a config is its text, or an object with the text as `content`.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Whether a value of the config stands for a token: keys such as `add_bos_token` do not.
fn is_token(value: &Value) -> bool {
    value.is_string() || value.get("content").is_some_and(Value::is_string)
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
    use super::super::golden::load_with;
    use serde_json::{Value, json};

    /// The ids of `text` with these files beside tokenizer.json, and what is left of it without special tokens.
    fn check(files: &[(&str, Value)], text: &str, ids: &[u32], left: &str) {
        let files: Vec<(String, String)> = files
            .iter()
            .map(|(name, json)| (format!("{name}.json"), json.to_string()))
            .collect();
        let files: Vec<(&str, &str)> = files
            .iter()
            .map(|(n, j)| (n.as_str(), j.as_str()))
            .collect();
        let tokenizer = load_with(&files).unwrap();
        assert_eq!(
            tokenizer.encode(text).unwrap(),
            ids,
            "{text} with {files:?}"
        );
        assert_eq!(
            tokenizer.decode(ids, true).unwrap(),
            left,
            "{text} with {files:?}"
        );
    }

    /// Ids and texts as transformers 5.24 gives them for the same files.
    #[test]
    fn tokens_are_found_wherever_transformers_finds_them() {
        let config = |json| ("tokenizer_config", json);
        let map = |json| ("special_tokens_map", json);
        let object = json!({"extra_special_tokens": {"late_token": "<late>"}, "additional_special_tokens": ["<x>"]});
        check(&[config(object)], "<late><x>", &[263, 264], "");
        let both =
            json!({"extra_special_tokens": ["<late>"], "additional_special_tokens": ["<x>"]});
        check(&[config(both)], "<late><x>", &[263, 60, 120, 62], "<x>");
        let own = json!({"image_token": "<img>", "eos_token": "<think>", "add_bos_token": true});
        check(&[config(own)], "<img><think>", &[263, 260], "");
        let older = json!({"eos_token": "<m>", "audio_token": "<|im_end|>", "additional_special_tokens": ["<a>"],
            "pad_token": {"content": "<e>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false}});
        let files = [config(json!({"eos_token": "<no>"})), map(older)];
        check(&files, "<m><e><a><|im_end|>", &[263, 264, 265, 259], "");
        check(
            &[map(json!({"eos_token": "<s>"}))],
            "<s>x",
            &[263, 120],
            "x",
        );
        let files = [
            config(json!({"eos_token": "<s>"})),
            ("added_tokens", json!({"<s>": 270, "<p>": 269})),
        ];
        check(&files, "<p><s>", &[263, 264], "<p>");
        let order = json!({"extra_special_tokens": ["<4>"], "z_token": "<3>", "pad_token": "<2>", "bos_token": "<1>"});
        check(&[config(order)], "<1><2><3><4>", &[263, 264, 265, 266], "");
        let files = [
            config(json!({"extra_special_tokens": ["<r>"]})),
            map(json!({"extra_special_tokens": ["<q>"]})),
        ];
        check(&files, "<q><r>", &[264, 263], "");
        let named = json!({"additional_special_tokens": {"q_token": "<q>"}});
        check(&[config(named)], "<q>", &[263], "");
    }

    #[test]
    fn the_older_files_do_not_count_where_the_config_lists_its_tokens() {
        let listed = json!({"added_tokens_decoder": {"263": {"content": "<l>", "special": true, "normalized": false}}});
        let files = [
            ("tokenizer_config", listed),
            ("special_tokens_map", json!({"eos_token": "<m>"})),
            ("added_tokens", json!({"<m>": 264})),
        ];
        check(&files, "<m><l>", &[60, 109, 62, 263], "<m>");
    }

    #[test]
    fn a_token_with_a_name_is_a_variable_of_the_template() {
        let tokenizer = load_with(&[
            (
                "tokenizer_config.json",
                r#"{"extra_special_tokens": {"late_token": "<late>"}}"#,
            ),
            ("chat_template.jinja", "{{ late_token }}"),
        ]);
        let messages = [json!({"role": "user", "content": "hi"})];
        let request = super::super::ChatRequest {
            messages: &messages,
            ..Default::default()
        };
        assert_eq!(tokenizer.unwrap().render_chat(&request).unwrap(), "<late>");
    }

    #[test]
    fn a_broken_file_is_named() {
        for (name, json) in [
            ("special_tokens_map.json", "["),
            ("added_tokens.json", r#"{"<a>": "b"}"#),
        ] {
            let line = load_with(&[(name, json)]).unwrap_err().to_string();
            assert!(line.contains(name), "{line}");
        }
    }
}
