//! The model's chat template: a conversation, as the messages of an API, to the text that the model was trained on.
//!
//! Templates are Jinja programs written for transformers' `apply_chat_template`; this does what that one does around
//! them, in the same order, so that the same messages give the same text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::renderer::{Renderer, Rendering};
use crate::{Error, Result, files};

/// Where a message's reasoning may stand; the first is what templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A conversation and what to make of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatRequest<'a> {
    /// Objects with `role` and `content`, and whatever else the template knows (`tool_calls`, `reasoning_content`, …).
    pub messages: &'a [Value],
    /// JSON schemas of the functions that the model may call. The order of their keys is kept.
    pub tools: Option<&'a [Value]>,
    /// End with the header of the answer to come.
    pub add_generation_prompt: bool,
    /// More variables for the template, e.g. `("enable_thinking", false.into())`.
    pub extra: &'a [(&'a str, Value)],
}

/// The chat templates of a model by name; most have one, `default`.
#[derive(Default)]
pub(super) struct ChatTemplates {
    dir: PathBuf,
    by_name: BTreeMap<String, ChatTemplate>,
    /// `bos_token` and its like, for the template.
    special_tokens: Map<String, Value>,
    renderer: Renderer,
}

struct ChatTemplate {
    /// The file that holds it.
    path: PathBuf,
    source: String,
}

impl ChatTemplates {
    /// Files of their own win over what `config` (read from `config_path`) holds, all of it together.
    pub(super) fn load(
        dir: &Path,
        config_path: &Path,
        config: &Map<String, Value>,
        special_tokens: &[(&str, &str)],
    ) -> Result<Self> {
        let mut sources = template_files(dir)?;
        if sources.is_empty() {
            let named = templates_of_config(config)
                .map_err(|what| Error::file(config_path, format!("chat_template: {what}")))?;
            sources.extend(named.map(|(name, text)| (name, (config_path.to_owned(), text))));
        }
        let by_name = sources
            .into_iter()
            .map(|(name, (path, source))| (name, ChatTemplate { path, source }));
        let special_tokens = special_tokens
            .iter()
            .map(|&(k, v)| (k.to_owned(), v.into()));
        Ok(Self {
            dir: dir.to_owned(),
            by_name: by_name.collect(),
            special_tokens: special_tokens.collect(),
            renderer: Renderer::default(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub(super) fn render(&self, request: &ChatRequest<'_>) -> Result<String> {
        let template = self.select(request.tools.is_some())?;
        if request.messages.is_empty() {
            return Err(Error::usage(
                "the conversation is empty; give at least one message",
            ));
        }
        let messages = request
            .messages
            .iter()
            .map(prepare_message)
            .collect::<Result<Vec<_>>>()?;
        let mut context = self.special_tokens.clone();
        context.extend(
            request
                .extra
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.clone())),
        );
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), json!(request.tools));
        context.insert("documents".into(), Value::Null);
        context.insert(
            "add_generation_prompt".into(),
            request.add_generation_prompt.into(),
        );

        let rendering = Rendering {
            source: template.source.clone(),
            variables: context
                .into_iter()
                .map(|(name, value)| (name, value.to_string()))
                .collect(),
        };
        self.renderer
            .render(&rendering)
            .map_err(|what| Error::file(&template.path, format!("chat template: {what}")))
    }

    /// With tools, a template called `tool_use` comes before `default`.
    fn select(&self, with_tools: bool) -> Result<&ChatTemplate> {
        if self.is_empty() {
            return Err(Error::file(
                &self.dir,
                "this model has no chat template (neither chat_template.jinja nor chat_template in \
                 tokenizer_config.json); give it a raw prompt, without --chat",
            ));
        }
        with_tools
            .then(|| self.by_name.get("tool_use"))
            .flatten()
            .or_else(|| self.by_name.get("default"))
            .ok_or_else(|| {
                let names = self.by_name.keys().map(String::as_str).collect::<Vec<_>>();
                let what = format!(
                    "no chat template is called default; there are: {}",
                    names.join(", ")
                );
                Error::file(&self.dir, what)
            })
    }
}

/// Name to (file, source) of `chat_template.jinja` and `additional_chat_templates/NAME.jinja`.
fn template_files(dir: &Path) -> Result<BTreeMap<String, (PathBuf, String)>> {
    let mut files = vec![("default".to_owned(), dir.join("chat_template.jinja"))];
    if let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) {
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|e| e == "jinja")
                && let Some(name) = path.file_stem().and_then(|s| s.to_str())
            {
                files.push((name.to_owned(), path));
            }
        }
    }
    let mut sources = BTreeMap::new();
    for (name, path) in files {
        if let Some(source) = files::read_text(&path)? {
            sources.insert(name, (path, source));
        }
    }
    Ok(sources)
}

/// `chat_template` is one template, or a list of `{"name": …, "template": …}`.
fn templates_of_config(
    config: &Map<String, Value>,
) -> Result<impl Iterator<Item = (String, String)>, &'static str> {
    let named = match config.get("chat_template") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(source)) => vec![("default".to_owned(), source.clone())],
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                let text = |key| Some(entry.get(key)?.as_str()?.to_owned());
                Some((text("name")?, text("template")?))
            })
            .collect::<Option<_>>()
            .ok_or("each entry of the list needs a name and a template, both text")?,
        Some(_) => return Err("neither text nor a list of named templates"),
    };
    Ok(named.into_iter())
}

/// Fields that are null are left out, and reasoning is found under each of its names.
fn prepare_message(message: &Value) -> Result<Value> {
    let Value::Object(message) = message else {
        return Err(Error::usage(format!(
            "a chat message must be a JSON object, not {message}"
        )));
    };
    let given = message.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING_FIELDS
        .iter()
        .find_map(|&field| message.get(field).filter(|v| !v.is_null()));
    let mut prepared = Map::new();
    if let Some(reasoning) = reasoning {
        prepared.insert("thinking".into(), reasoning.clone());
    }
    prepared.extend(given.map(|(k, v)| (k.clone(), v.clone())));
    if let Some(reasoning) = reasoning {
        prepared.insert(REASONING_FIELDS[0].into(), reasoning.clone());
    }
    Ok(prepared.into())
}

#[cfg(test)]
mod tests {
    use super::super::golden::load_with;
    use super::*;

    fn user(text: &str) -> Vec<Value> {
        vec![json!({"role": "user", "content": text})]
    }

    fn render(files: &[(&str, &str)]) -> Result<String> {
        let request = ChatRequest {
            messages: &user("hi"),
            ..Default::default()
        };
        load_with(files)?.render_chat(&request)
    }

    /// The one line a person sees.
    fn refusal(files: &[(&str, &str)]) -> String {
        let line = render(files).unwrap_err().to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn a_model_without_a_template_says_so_and_what_to_do() {
        let line = refusal(&[("tokenizer_config.json", "{}")]);
        assert!(line.contains("no chat template"), "{line}");
        assert!(line.contains("raw prompt"), "{line}");
    }

    #[test]
    fn a_template_that_does_not_compile_names_file_and_line_and_leaves_raw_prompts_alone() {
        let files = [("chat_template.jinja", "a\nb\n{% for m in %}")];
        let line = refusal(&files);
        assert!(
            line.contains("chat_template.jinja: chat template: line 3: syntax error"),
            "{line}"
        );
        let tokenizer = load_with(&files).unwrap();
        assert_eq!(tokenizer.encode("ab").unwrap(), [256]);
        assert!(tokenizer.has_chat_template());

        let line = refusal(&[("tokenizer_config.json", r#"{"chat_template": "{{ x"}"#)]);
        assert!(
            line.contains("tokenizer_config.json: chat template: line 1"),
            "{line}"
        );
    }

    #[test]
    fn what_the_template_raises_is_shown() {
        let template = "\n{{ raise_exception('Roles must\nalternate: ' + messages[0].role) }}";
        let line = refusal(&[("chat_template.jinja", template)]);
        assert!(
            line.ends_with("chat template: line 3: Roles must alternate: user"),
            "{line}"
        );
    }

    #[test]
    fn a_template_that_fails_names_the_line() {
        let line = refusal(&[("chat_template.jinja", "{{ messages[0].name.first }}")]);
        assert!(
            line.contains("chat template: line 1: undefined value"),
            "{line}"
        );
        let line = refusal(&[("chat_template.jinja", "{{ 'x' * 100000000000 }}")]);
        assert!(line.contains("chat template: "), "{line}");
    }

    #[test]
    fn a_template_without_end_is_stopped() {
        let twice =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let line = refusal(&[("chat_template.jinja", twice)]);
        assert!(line.contains("does not come to an end"), "{line}");
        let itself = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        let line = refusal(&[("chat_template.jinja", itself)]);
        assert!(line.contains("recursion"), "{line}");
    }

    #[test]
    fn a_template_file_that_is_not_text_is_named() {
        let dir = super::super::golden::folder(&[("tokenizer_config.json", "{}")]);
        std::fs::write(dir.path().join("chat_template.jinja"), b"\xff\xfe").unwrap();
        let line = template_files(dir.path()).unwrap_err().to_string();
        assert!(
            line.contains("chat_template.jinja: ") && line.contains("UTF-8"),
            "{line}"
        );
    }

    #[test]
    fn an_unusable_chat_template_entry_is_named() {
        for entry in ["7", r#"[{"name": "default"}]"#, r#"["text"]"#] {
            let config = format!(r#"{{"chat_template": {entry}}}"#);
            let line = refusal(&[("tokenizer_config.json", &config)]);
            assert!(
                line.contains("tokenizer_config.json: chat_template: "),
                "{line}"
            );
        }
    }

    #[test]
    fn conversations_that_are_none_are_refused() {
        let tokenizer = load_with(&[("chat_template.jinja", "x")]).unwrap();
        let render = |messages: &[Value]| {
            let request = ChatRequest {
                messages,
                ..Default::default()
            };
            tokenizer.render_chat(&request).unwrap_err()
        };
        assert!(render(&[]).to_string().contains("at least one message"));
        assert!(render(&[json!("hi")]).to_string().contains("JSON object"));
    }

    #[test]
    fn a_file_wins_over_the_config_and_tools_choose_tool_use() {
        let config = r#"{"chat_template": [{"name": "default", "template": "plain"},
                                           {"name": "tool_use", "template": "tools"}]}"#;
        let render = |files: &[(&str, &str)], tools: Option<&[Value]>| {
            let request = ChatRequest {
                messages: &user("hi"),
                tools,
                ..Default::default()
            };
            load_with(files).unwrap().render_chat(&request)
        };
        let named = [("tokenizer_config.json", config)];
        assert_eq!(render(&named, None).unwrap(), "plain");
        assert_eq!(render(&named, Some(&[])).unwrap(), "tools");
        let with_file = [named[0], ("chat_template.jinja", "file")];
        assert_eq!(render(&with_file, None).unwrap(), "file");
        assert_eq!(render(&with_file, Some(&[])).unwrap(), "file");
        let more = [
            with_file[1],
            ("additional_chat_templates/tool_use.jinja", "more"),
        ];
        assert_eq!(render(&more, None).unwrap(), "file");
        assert_eq!(render(&more, Some(&[])).unwrap(), "more");
        let line = render(&more[1..], None).unwrap_err().to_string();
        assert!(line.contains("there are: tool_use"), "{line}");
    }

    #[test]
    fn special_tokens_of_the_config_are_variables() {
        let config = r#"{"bos_token": null, "eos_token": {"content": "<|im_end|>"},
                         "chat_template": "{{ eos_token }}{{ bos_token is defined }}"}"#;
        assert_eq!(
            render(&[("tokenizer_config.json", config)]).unwrap(),
            "<|im_end|>False"
        );
    }
}
