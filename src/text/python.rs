//! What chat templates expect of Python: how values are printed, `json.dumps`, `strftime`, Jinja2's own tests.
//!
//! minijinja and its `pycompat` come close; this, `methods`, `filters` and `percent` hold what differs where a template
//! can see it.

use std::borrow::Cow;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value, escape_formatter};

use super::{filters, methods};

/// Deepest nesting that `tojson` follows.
const MAX_DEPTH: usize = 200;

/// Adds all of it to a template's environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(methods::method);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => Ok(out.write_str(&text_of(value)?)?),
        _ => escape_formatter(out, state, value),
    });
    filters::install(environment);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| {
        Err::<Value, _>(invalid(message))
    });
    environment.add_function("strftime_now", |format: String| strftime_now(&format));
    environment.add_test("callable", |v: &Value| v.kind() == ValueKind::Plain);
    // In Python a text is a sequence, and a bool a number.
    environment.add_test("sequence", |v: &Value| {
        matches!(
            v.kind(),
            ValueKind::String | ValueKind::Seq | ValueKind::Map
        )
    });
    environment.add_test("iterable", |v: &Value| {
        !matches!(
            v.kind(),
            ValueKind::None | ValueKind::Bool | ValueKind::Number
        )
    });
    environment.add_test("number", |v: &Value| {
        matches!(v.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

pub(super) fn invalid(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer())
        .then(|| f64::try_from(value.clone()).ok())
        .flatten()
}

/// Python's `repr(float)`: the shortest digits that read back as the same number, with an exponent from 1e16 and below 1e-4.
fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string().to_lowercase();
    }
    let scientific = format!("{value:e}");
    match scientific
        .split_once('e')
        .map(|(m, e)| (m, e.parse::<i32>()))
    {
        Some((mantissa, Ok(exponent))) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

/// Python's `str(value)`.
pub(super) fn text_of(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repr(value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(value, 0, &mut out)?;
    Ok(out)
}

fn write_repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid(format!("nested more than {MAX_DEPTH} deep")));
    }
    match value.kind() {
        ValueKind::String => write_text_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            let [open, close] = if value.is_tuple() {
                ['(', ')']
            } else {
                ['[', ']']
            };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(&item, depth + 1, out)?;
            }
            if value.is_tuple() && value.len() == Some(1) {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(&key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => match float(value) {
            Some(float) => out.push_str(&float_repr(float)),
            None => out.push_str(&value.to_string()),
        },
    }
    Ok(())
}

/// In single quotes unless it holds one and no double quote.
fn write_text_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ => out.push_str(&match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x10000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// Python's `str.isprintable`, but for code points that have no character yet.
fn is_printable(c: char) -> bool {
    let invisible = matches!(c, '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e000}'..='\u{f8ff}' | '\u{e0001}'..='\u{e007f}' | '\u{f0000}'..);
    c == ' ' || !(c.is_control() || c.is_whitespace() || invisible)
}

/// Layout of [`tojson`], as `json.dumps` takes it.
struct Json {
    /// One indentation step; `None` puts all on one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// The filter that transformers puts in place of Jinja2's: `json.dumps(x, ensure_ascii=False, …)`, nothing escaped for HTML.
fn tojson(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let arg = |index: usize| -> Result<Value, Error> {
        match positional.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs
                .get::<Option<Value>>(names[index])?
                .unwrap_or(Value::from(()))),
        }
    };
    let (ensure_ascii, indent, separators, sort_keys) = (arg(0)?, arg(1)?, arg(2)?, arg(3)?);
    kwargs.assert_all_used()?;
    let indent = match indent.kind() {
        ValueKind::None | ValueKind::Undefined => None,
        ValueKind::String => Some(indent.to_string()),
        ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        _ => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 100) as usize)),
    };
    let default_item = if indent.is_some() { "," } else { ", " };
    let (item_separator, key_separator) = match separators.kind() {
        ValueKind::None | ValueKind::Undefined => (default_item.into(), ": ".into()),
        _ => (separator(&separators, 0)?, separator(&separators, 1)?),
    };
    let json = Json {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: ensure_ascii.is_true(),
        sort_keys: sort_keys.is_true(),
    };
    let mut out = String::new();
    json.write(value, 0, &mut out)?;
    Ok(out)
}

fn separator(separators: &Value, index: usize) -> Result<String, Error> {
    let separator = separators.get_item_by_index(index)?;
    let text = separator.as_str().map(str::to_owned);
    text.ok_or_else(|| invalid("tojson: separators must be two texts"))
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!(
                "tojson: nested more than {MAX_DEPTH} deep"
            )));
        }
        match value.kind() {
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?;
                self.write_items(items, ['[', ']'], depth, out, |item, out| {
                    self.write(&item, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.collect::<Vec<_>>();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items(keys.into_iter(), ['{', '}'], depth, out, |key, out| {
                    self.write_text(&key_text(&key)?, out);
                    out.push_str(&self.key_separator);
                    self.write(&value.get_item(&key)?, depth + 1, out)
                })?;
            }
            _ => out.push_str(&scalar(value)?),
        }
        Ok(())
    }

    fn write_items(
        &self,
        items: impl Iterator<Item = Value>,
        [open, close]: [char; 2],
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                out.push_str(&self.item_separator);
            }
            empty = false;
            self.new_line(depth + 1, out);
            write(item, out)?;
        }
        if !empty {
            self.new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    let units = c.encode_utf16(&mut [0; 2]).to_vec();
                    out.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(match float(value) {
            None => value.to_string(),
            Some(float) if float.is_nan() => "NaN".into(),
            Some(f64::INFINITY) => "Infinity".into(),
            Some(f64::NEG_INFINITY) => "-Infinity".into(),
            Some(float) => float_repr(float),
        }),
        kind => Err(invalid(format!("tojson: {kind} has no JSON form"))),
    }
}

fn key_text(key: &Value) -> Result<Cow<'_, str>, Error> {
    match key.as_str() {
        Some(text) => Ok(text.into()),
        None => scalar(key).map(Cow::Owned),
    }
}

/// Python's `str.isspace`: Unicode's white space and the four ASCII separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let drop = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    let text = if left {
        text.trim_start_matches(drop)
    } else {
        text
    };
    if right {
        text.trim_end_matches(drop)
    } else {
        text
    }
}

/// `datetime.now().strftime(format)`: local time, English names.
fn strftime_now(format: &str) -> Result<String, Error> {
    // A naive datetime has no time zone: Python prints nothing for it.
    let format = format.replace("%z", "").replace("%Z", "");
    if format.is_empty() {
        return Ok(String::new());
    }
    let c_format = std::ffi::CString::new(format)
        .map_err(|_| invalid("strftime_now: a NUL byte in the format"))?;
    let mut out = vec![0u8; 16 * c_format.as_bytes().len() + 64];
    // SAFETY: `time` accepts a null pointer; `tm` is plain data that `localtime_r` fills before it is read
    // (its result is checked); `strftime` writes at most `out.len()` bytes and reads a NUL-terminated format.
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut tm).is_null() {
            return Err(invalid("strftime_now: the clock cannot be read"));
        }
        libc::strftime(out.as_mut_ptr().cast(), out.len(), c_format.as_ptr(), &tm)
    };
    out.truncate(written);
    String::from_utf8(out).map_err(|_| invalid("strftime_now: the date is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference is the system's `date`.
    #[test]
    fn strftime_now_is_local_time() {
        let format = "%d %b %Y, %A %B %j";
        let date = || {
            let out = std::process::Command::new("date")
                .arg(format!("+{format}"))
                .env("LC_ALL", "C")
                .output()
                .unwrap();
            String::from_utf8(out.stdout).unwrap().trim().to_owned()
        };
        // Midnight may pass between the two.
        let (before, ours, after) = (date(), strftime_now(format).unwrap(), date());
        assert!(ours == before || ours == after, "{ours} is not {before}");
        assert_eq!(strftime_now("%Z%z").unwrap(), "");
        assert!(strftime_now("\0").is_err());
    }

    #[test]
    fn nesting_without_end_is_an_error() {
        let nested = (0..1000).fold(Value::from(0), |inner, _| Value::from(vec![inner]));
        let mut environment = Environment::new();
        install(&mut environment);
        let context = Value::from_pairs([("nested", nested)]);
        let error = environment
            .render_str("{{ nested | tojson }}", context)
            .unwrap_err();
        assert!(
            error.to_string().contains("nested more than 200 deep"),
            "{error}"
        );
    }
}
