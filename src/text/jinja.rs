//! The template engine as transformers sets up its own: Jinja2's syntax and white space, Python's values.

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;

use super::{percent, python};

/// Steps and data (64 bytes each) that one rendering may take: thousands of messages, but a template that
/// loops over loops ends within a second. Templates come with the model, from strangers.
const FUEL: u64 = 20_000_000;

/// The name of the one template in its environment; no ending of a file, hence no escaping of HTML.
pub(super) const TEMPLATE: &str = "chat template";

pub(super) fn environment(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_fuel(Some(FUEL));
    python::install(&mut environment);
    let source = percent::rewrite(&without_generation_tags(&unix_newlines(source)));
    environment.add_template_owned(TEMPLATE, source)?;
    Ok(environment)
}

/// Jinja reads a template's own line ends as `\n`.
fn unix_newlines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// `{% generation %}` marks the assistant's text for training; for rendering it is only a scope.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(len) = rest[open..].find("%}") else {
            break;
        };
        let tag = &rest[open..open + len];
        let name = tag[2..]
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        out.push_str(&rest[..open]);
        match name {
            "generation" | "endgeneration" => out.push_str(&tag.replace("generation", "with")),
            _ => out.push_str(tag),
        }
        rest = &rest[open + len..];
    }
    out + rest
}

/// What the template itself says (`raise_exception`), or what is wrong in which of its lines.
pub(super) fn describe(error: &minijinja::Error) -> String {
    let line = error
        .line()
        .map(|n| format!("line {n}: "))
        .unwrap_or_default();
    match error.detail() {
        _ if error.kind() == minijinja::ErrorKind::OutOfFuel => {
            "it does not come to an end (more than 20 million steps)".to_owned()
        }
        Some(detail) if error.kind() == minijinja::ErrorKind::InvalidOperation => {
            format!("{line}{detail}")
        }
        Some(detail) => format!("{line}{}: {detail}", error.kind()),
        None => format!("{line}{}", error.kind()),
    }
}
