//! Python's `%`: a remainder of numbers, or the formatting of a text.
//!
//! The engine's own operator knows numbers only and cannot be taught. So a template's `a % b` becomes
//! `(a)|NAME(b)` before it is compiled, `a` and `b` being as much of the expression as Jinja2's grammar gives them.

use std::ops::Range;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{Error, Value};

use super::python::{invalid, repr, text_of};

/// The filter that stands for `%`; no template can mean it.
pub(super) const NAME: &str = "_percent_";

/// A piece of an expression.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// A name, a number, a text, or all of a bracket.
    Operand,
    /// A name that is part of the grammar.
    Keyword,
    Open,
    Close,
    Operator,
}

#[derive(Debug, Clone)]
struct Token {
    kind: Kind,
    at: Range<usize>,
}

/// Words between which an operand of `%` cannot reach.
const KEYWORDS: [&str; 14] = [
    "and", "call", "do", "elif", "else", "filter", "for", "if", "in", "not", "or", "print", "set",
    "with",
];

/// The template with its `%` and its useless `+` signs replaced.
pub(super) fn rewrite(source: &str) -> String {
    let mut edits: Vec<(Range<usize>, &str)> = Vec::new();
    let call = format!(")|{NAME}(");
    for tokens in expressions(source) {
        let text = |i: usize| &source[tokens[i].at.clone()];
        for i in 0..tokens.len() {
            if tokens[i].kind != Kind::Operator {
                continue;
            }
            let at = tokens[i].at.clone();
            match text(i) {
                "+" if !is_binary(&tokens, i) => edits.push((at, " ")),
                "%" => {
                    let Some(end) = right_end(source, &tokens, i + 1) else {
                        continue;
                    };
                    let start = left_start(source, &tokens, i);
                    edits.push((start..start, "("));
                    edits.push((at, &call));
                    edits.push((end..end, ")"));
                }
                _ => {}
            }
        }
    }
    // Stable: what is put at one place stays in the order in which it was found.
    edits.sort_by_key(|(at, _)| at.start);
    let mut out = String::with_capacity(source.len() + 32 * edits.len());
    let mut from = 0;
    for (at, new) in edits {
        out.push_str(&source[from..at.start]);
        out.push_str(new);
        from = at.end;
    }
    out + &source[from..]
}

/// Whether the operator at `i` has something on its left.
fn is_binary(tokens: &[Token], i: usize) -> bool {
    i > 0 && matches!(tokens[i - 1].kind, Kind::Operand | Kind::Close)
}

/// Where the left side of the `%` at `i` begins: a chain of factors.
fn left_start(source: &str, tokens: &[Token], i: usize) -> usize {
    let mut depth = 0;
    let mut start = i;
    while start > 0 {
        let token = &tokens[start - 1];
        match token.kind {
            Kind::Close => depth += 1,
            Kind::Open if depth == 0 => break,
            Kind::Open => depth -= 1,
            Kind::Keyword if depth == 0 => break,
            Kind::Operator if depth == 0 => match &source[token.at.clone()] {
                "*" | "/" | "//" | "%" | "**" | "." | "|" => {}
                "+" | "-" if !is_binary(tokens, start - 1) => {}
                _ => break,
            },
            _ => {}
        }
        start -= 1;
    }
    tokens[start].at.start
}

/// Where the one factor ends that begins at token `i`; none if there is none.
fn right_end(source: &str, tokens: &[Token], mut i: usize) -> Option<usize> {
    let is = |i: usize, word: &str| tokens.get(i).is_some_and(|t| &source[t.at.clone()] == word);
    let kind = |i: usize| tokens.get(i).map(|t| t.kind);
    loop {
        while is(i, "-") || is(i, "+") {
            i += 1;
        }
        i = operand(tokens, i)?;
        loop {
            // A call, an index, an attribute, a filter, a second text.
            if kind(i) == Some(Kind::Open) && !is(i, "{") {
                i = operand(tokens, i)?;
            } else if is(i, ".") || is(i, "|") {
                i = operand(tokens, i + 1)?;
            } else if is(i, "is") {
                i += if is(i + 1, "not") { 2 } else { 1 };
                i = operand(tokens, i).or_else(|| (kind(i)? == Kind::Keyword).then_some(i + 1))?;
                if kind(i) == Some(Kind::Operand) && !is(i, "is") {
                    i = operand(tokens, i)?;
                }
            } else if kind(i) == Some(Kind::Operand) {
                i += 1;
            } else {
                break;
            }
        }
        if !is(i, "**") {
            return Some(tokens[i - 1].at.end);
        }
        i += 1;
    }
}

/// The token after a name, a number, a text or a bracket.
fn operand(tokens: &[Token], i: usize) -> Option<usize> {
    match tokens.get(i)?.kind {
        Kind::Operand => Some(i + 1),
        Kind::Open => {
            let mut depth = 0usize;
            for (at, token) in tokens.iter().enumerate().skip(i) {
                match token.kind {
                    Kind::Open => depth += 1,
                    Kind::Close => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            None
        }
        _ => None,
    }
}

/// The tokens of every `{{ … }}` and `{% … %}`, without comments and raw blocks.
fn expressions(source: &str) -> Vec<Vec<Token>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(open) = source[at..].find('{') {
        at += open;
        let rest = &source[at..];
        if rest.starts_with("{#") {
            at += rest.find("#}").map_or(rest.len(), |end| end + 2);
        } else if rest.starts_with("{{") || rest.starts_with("{%") {
            let (tokens, end) = tokens(source, at + 2);
            let first = tokens.iter().find(|t| t.kind != Kind::Operator);
            at = end;
            if rest.starts_with("{%") && first.is_some_and(|t| &source[t.at.clone()] == "raw") {
                at = after_raw(source, end);
            }
            found.push(tokens);
        } else {
            at += 1;
        }
    }
    found
}

/// The end of the tag that ends a raw block.
fn after_raw(source: &str, mut at: usize) -> usize {
    while let Some(open) = source[at..].find("{%") {
        at += open + 2;
        let tag = source[at..].trim_start_matches(['-', '+']).trim_start();
        if tag.starts_with("endraw") {
            return at;
        }
    }
    source.len()
}

/// The tokens from `at` to the end of the block, and the place behind it.
fn tokens(source: &str, mut at: usize) -> (Vec<Token>, usize) {
    let mut tokens = Vec::new();
    let mut depth = 0usize;
    while let Some(c) = source[at..].chars().next() {
        let rest = &source[at..];
        if depth == 0 && (rest.starts_with("}}") || rest.starts_with("%}")) {
            return (tokens, at + 2);
        }
        let two = ["**", "//", "==", "!=", "<=", ">="];
        let (kind, len) = match c {
            _ if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '\'' | '"' => (Kind::Operand, quoted(rest, c)),
            '(' | '[' | '{' => (Kind::Open, 1),
            ')' | ']' | '}' => (Kind::Close, 1),
            '0'..='9' => (Kind::Operand, number(rest)),
            _ if c.is_alphanumeric() || c == '_' => {
                let len = word(rest);
                let is_keyword = KEYWORDS.contains(&&rest[..len]);
                (
                    if is_keyword {
                        Kind::Keyword
                    } else {
                        Kind::Operand
                    },
                    len,
                )
            }
            _ if two.iter().any(|op| rest.starts_with(op)) => (Kind::Operator, 2),
            _ => (Kind::Operator, c.len_utf8()),
        };
        match kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        tokens.push(Token {
            kind,
            at: at..at + len,
        });
        at += len;
    }
    // A block without an end is for the engine to refuse.
    (Vec::new(), source.len())
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return i + 1,
            _ => {}
        }
    }
    rest.len()
}

fn word(rest: &str) -> usize {
    rest.find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(rest.len())
}

fn number(rest: &str) -> usize {
    let mut len = word(rest);
    let fraction = rest[len..]
        .strip_prefix('.')
        .filter(|f| f.starts_with(|c: char| c.is_ascii_digit()));
    if let Some(fraction) = fraction {
        len += 1 + word(fraction);
    }
    let exponent = rest[..len].ends_with(['e', 'E']) && !rest.starts_with("0x");
    if exponent && rest[len..].starts_with(['+', '-']) {
        len += 1 + word(&rest[len + 1..]);
    }
    len
}

/// `left % right`.
pub(super) fn percent(left: &Value, right: &Value) -> Result<Value, Error> {
    match left.as_str() {
        Some(text) => Ok(printf(text, right)?.into()),
        None => remainder(left, right),
    }
}

fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// With the sign of the divisor, as in Python.
fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    if !is_number(left) || !is_number(right) {
        return Err(invalid(format!(
            "% of {} and {}: neither numbers nor a text to format",
            left.kind(),
            right.kind()
        )));
    }
    let whole = |v: &Value| v.is_integer() || v.kind() == ValueKind::Bool;
    if whole(left) && whole(right) {
        let (a, b) = (
            i128::try_from(left.clone())?,
            i128::try_from(right.clone())?,
        );
        return match a.checked_rem(b) {
            Some(r) if r != 0 && (r < 0) != (b < 0) => Ok((r + b).into()),
            Some(r) => Ok(r.into()),
            None => Err(invalid("% by zero")),
        };
    }
    let (a, b) = (float(left)?, float(right)?);
    if b == 0.0 {
        return Err(invalid("% by zero"));
    }
    let r = a % b;
    Ok(if r != 0.0 && (r < 0.0) != (b < 0.0) {
        r + b
    } else {
        r
    }
    .into())
}

fn float(value: &Value) -> Result<f64, Error> {
    match value.kind() {
        ValueKind::Bool => Ok(f64::from(u8::from(value.is_true()))),
        _ => f64::try_from(value.clone()),
    }
}

/// `text % values`, each specification by the engine's own formatter.
pub(super) fn printf(text: &str, values: &Value) -> Result<String, Error> {
    let list: Vec<Value> = match values.is_tuple() {
        true => values.try_iter()?.collect(),
        false => vec![values.clone()],
    };
    let mut list = list.into_iter();
    let mut next = || {
        list.next()
            .ok_or_else(|| invalid("not enough arguments for format string"))
    };
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let mut named = None;
        if let Some(name) = rest.strip_prefix('(') {
            let end = name
                .find(')')
                .ok_or_else(|| invalid("incomplete format key"))?;
            named = Some(values.get_item(&Value::from(&name[..end]))?);
            rest = &name[end + 1..];
        }
        let mut spec = String::from("%");
        let kind = loop {
            let c = rest
                .chars()
                .next()
                .ok_or_else(|| invalid("incomplete format"))?;
            rest = &rest[c.len_utf8()..];
            match c {
                '*' => spec.push_str(&i64::try_from(next()?)?.to_string()),
                '#' | '0'..='9' | '-' | '+' | ' ' | '.' => spec.push(c),
                'h' | 'l' | 'L' => {}
                _ => break c,
            }
        };
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next()?,
        };
        let (kind, value) = converted(kind, value)?;
        spec.push(kind);
        out.push_str(&format(FormatStyle::Printf, &spec, &[value])?);
    }
    let unused = list.next().is_some() && values.kind() != ValueKind::Map;
    if unused && (values.is_tuple() || !matches!(values.kind(), ValueKind::Seq)) {
        return Err(invalid(
            "not all arguments converted during string formatting",
        ));
    }
    Ok(out + rest)
}

/// The value as Python's conversion takes it, and the formatter's letter for that.
fn converted(kind: char, value: Value) -> Result<(char, Value), Error> {
    match kind {
        's' => Ok(('s', text_of(&value)?.into())),
        'r' | 'a' => Ok(('s', repr(&value)?.into())),
        'd' | 'i' | 'u' if is_number(&value) => {
            let whole = value.is_integer() || value.kind() == ValueKind::Bool;
            let value = if whole {
                i128::try_from(value)?
            } else {
                float(&value)?.trunc() as i128
            };
            Ok(('d', value.into()))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' if is_number(&value) => Ok((kind, float(&value)?.into())),
        'x' | 'X' | 'o' if value.is_integer() => Ok((kind, value)),
        'c' => Ok((kind, value)),
        _ => Err(invalid(format!("%{kind} cannot format {}", value.kind()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_what_the_grammar_gives() {
        let rewritten = |source: &str| rewrite(source).replace(NAME, "p");
        for (source, wanted) in [
            ("{{ a % b }}", "{{ (a )|p( b) }}"),
            (
                "{{ 1 + a * b % -c.d(1)[2]|e * f }}",
                "{{ 1 + (a * b )|p( -c.d(1)[2]|e) * f }}",
            ),
            ("{{ a % b % c }}", "{{ ((a )|p( b) )|p( c) }}"),
            ("{% if not a % 2 == 0 %}", "{% if not (a )|p( 2) == 0 %}"),
            ("{{ {'a': x % y} }}", "{{ {'a': (x )|p( y)} }}"),
            ("{{ '%' ~ \"}}%\" }}% %}", "{{ '%' ~ \"}}%\" }}% %}"),
            (
                "{% raw %}{{ a % b }}{% endraw %}{# {{ a % b }} #}",
                "{% raw %}{{ a % b }}{% endraw %}{# {{ a % b }} #}",
            ),
            ("{%- set x=5%3-%}", "{%- set x=(5)|p(3)-%}"),
            ("{{ a % }}", "{{ a % }}"),
            ("{{ a % b", "{{ a % b"),
            ("{{ 1 if a % 2 else b }}", "{{ 1 if (a )|p( 2) else b }}"),
            ("{{ 1e+3 + +2 }}", "{{ 1e+3 +  2 }}"),
        ] {
            assert_eq!(rewritten(source), wanted);
        }
    }
}
