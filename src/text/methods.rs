//! Python's methods of texts, lists and dicts that the engine lacks or takes otherwise.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::python::{invalid, is_space, strip};

/// Longest text that a method may pad to.
const MAX_WIDTH: usize = 1 << 20;

/// A method's arguments: by place, or by name where Python allows it.
struct Arguments {
    given: Vec<Value>,
    named: Kwargs,
}

impl Arguments {
    fn of(args: &[Value]) -> Result<Self, Error> {
        let (Rest(given), named): (Rest<Value>, Kwargs) = from_args(args)?;
        Ok(Self { given, named })
    }

    fn get(&self, place: usize, name: &str) -> Result<Option<Value>, Error> {
        let value = match self.given.get(place) {
            Some(value) => Some(value.clone()),
            None if name.is_empty() => None,
            None => self.named.get(name)?,
        };
        Ok(value.filter(|v| !v.is_none()))
    }

    fn text(&self, place: usize, name: &str) -> Result<Option<String>, Error> {
        let text = |v: Value| {
            let text = v.as_str().map(str::to_owned);
            text.ok_or_else(|| invalid(format!("argument {} must be a text", place + 1)))
        };
        self.get(place, name)?.map(text).transpose()
    }

    fn needed(&self, place: usize) -> Result<String, Error> {
        let missing = || invalid(format!("argument {} is missing", place + 1));
        self.text(place, "")?.ok_or_else(missing)
    }

    fn number(&self, place: usize, name: &str) -> Result<Option<i64>, Error> {
        self.get(place, name)?.map(i64::try_from).transpose()
    }

    /// Refuses arguments beyond `most`, and names that the method does not have.
    fn done(&self, most: usize) -> Result<(), Error> {
        if self.given.len() > most {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        self.named.assert_all_used()
    }
}

/// The engine asks here for each method that a value does not have by itself.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let done = match (value.kind(), value.as_str()) {
        (_, Some(text)) => text_method(text, name, args)?,
        (ValueKind::Seq, _) => list_method(value, name, args)?,
        (ValueKind::Map, _) if name == "copy" => Some(value.clone()),
        _ => None,
    };
    match done {
        Some(value) => Ok(value),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn list_method(list: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "copy" => Ok(Some(list.clone())),
        "index" => {
            let args = Arguments::of(args)?;
            let items: Vec<Value> = list.try_iter()?.collect();
            let (start, end) = window(args.number(1, "")?, args.number(2, "")?, items.len());
            let wanted = args.given.first().cloned().unwrap_or_default();
            args.done(3)?;
            let found = (start..end).find(|&i| items[i] == wanted);
            let found = found.ok_or_else(|| invalid("index: the value is not in the list"))?;
            Ok(Some(found.into()))
        }
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            Err(invalid(format!("{name}: a template may not change a list")))
        }
        _ => Ok(None),
    }
}

fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let args = &Arguments::of(args)?;
    let value = match name {
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => split(text, name, args)?,
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            search(text, name, args)?
        }
        "zfill" | "center" | "ljust" | "rjust" | "expandtabs" => pad(text, name, args)?.into(),
        "strip" | "lstrip" | "rstrip" => {
            let chars = args.text(0, "")?;
            args.done(1)?;
            strip(text, chars.as_deref(), name != "rstrip", name != "lstrip").into()
        }
        "removeprefix" => text.strip_prefix(&*args.needed(0)?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(&*args.needed(0)?).unwrap_or(text).into(),
        "title" => title(text).into(),
        "capitalize" => capitalized(text).into(),
        "swapcase" => text.chars().map(swapped).collect::<String>().into(),
        "casefold" => text.chars().map(folded).collect::<String>().into(),
        "isspace" => all(text, is_space).into(),
        "isdecimal" => all(text, is_decimal).into(),
        "isdigit" => all(text, |c| is_decimal(c) || is_digit(c)).into(),
        "istitle" => (text.chars().any(char::is_alphabetic) && title(text) == text).into(),
        "isidentifier" => {
            let first = text.starts_with(|c: char| c == '_' || c.is_alphabetic());
            (first && all(text, |c| c == '_' || c.is_alphanumeric())).into()
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn all(text: &str, is: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(is)
}

fn split(text: &str, name: &str, args: &Arguments) -> Result<Value, Error> {
    let values = |parts: Vec<&str>| parts.into_iter().map(Value::from).collect::<Value>();
    match name {
        "splitlines" => {
            let keep = args.get(0, "keepends")?.is_some_and(|v| v.is_true());
            args.done(1)?;
            return Ok(values(lines(text, keep)));
        }
        "partition" | "rpartition" => {
            let separator = args.needed(0)?;
            if separator.is_empty() {
                return Err(invalid("empty separator"));
            }
            let (found, missing) = match name {
                "partition" => (text.split_once(&*separator), [text, "", ""]),
                _ => (text.rsplit_once(&*separator), ["", "", text]),
            };
            let parts = found.map_or(missing, |(before, after)| [before, &separator, after]);
            return Ok(Value::from(Tuple::from(parts.map(Value::from))));
        }
        _ => {}
    }
    let separator = args.text(0, "sep")?;
    let most = args
        .number(1, "maxsplit")?
        .and_then(|n| usize::try_from(n).ok());
    args.done(2)?;
    let limit = most.map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<&str> = match (separator.as_deref(), name) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(separator), "split") => text.splitn(limit, separator).collect(),
        (Some(separator), _) => text.rsplitn(limit, separator).collect(),
        (None, "split") => words(text, limit, false),
        (None, _) => words(text, limit, true),
    };
    if name == "rsplit" {
        parts.reverse();
    }
    Ok(values(parts))
}

/// The words between white space, at most `limit`; the last one is then all that is left. From the end if `back`.
fn words(text: &str, limit: usize, back: bool) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    loop {
        rest = strip(rest, None, !back, back);
        if rest.is_empty() {
            return words;
        }
        let cut = match back {
            _ if words.len() + 1 >= limit => None,
            false => rest.find(is_space).map(|at| (&rest[..at], &rest[at..])),
            true => rest
                .char_indices()
                .rev()
                .find(|&(_, c)| is_space(c))
                .map(|(at, c)| {
                    let at = at + c.len_utf8();
                    (&rest[at..], &rest[..at])
                }),
        };
        let (word, left) = cut.unwrap_or((rest, ""));
        words.push(word);
        rest = left;
    }
}

/// Python's lines, which end at more than `\n`.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(is_end).unwrap_or(rest.len());
        let after = &rest[at..];
        let end = match after.chars().next() {
            _ if after.starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        lines.push(&rest[..if keep { at + end } else { at }]);
        rest = &rest[at + end..];
    }
    lines
}

/// Start and end as Python's slices take them.
fn window(start: Option<i64>, end: Option<i64>, len: usize) -> (usize, usize) {
    let place = |i: i64| match usize::try_from(i) {
        Ok(i) => i.min(len),
        Err(_) => len.saturating_sub(usize::try_from(i.unsigned_abs()).unwrap_or(usize::MAX)),
    };
    (start.map_or(0, place), end.map_or(len, place))
}

fn search(text: &str, name: &str, args: &Arguments) -> Result<Value, Error> {
    let len = text.chars().count();
    // A start beyond the end finds nothing, not even the empty text.
    let beyond = args.number(1, "")?.is_some_and(|start| start > len as i64);
    let (start, end) = window(args.number(1, "")?, args.number(2, "")?, len);
    args.done(3)?;
    let byte = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
    let part = if start <= end {
        &text[byte(start)..byte(end)]
    } else {
        ""
    };
    let nothing = beyond || start > end;
    if name == "startswith" || name == "endswith" {
        let wanted = args.given.first().cloned().unwrap_or_default();
        let is = |v: &Value| match v.as_str() {
            Some(v) if name == "startswith" => Ok(!nothing && part.starts_with(v)),
            Some(v) => Ok(!nothing && part.ends_with(v)),
            None => Err(invalid(format!(
                "{name}: a text or a tuple of texts, not {}",
                v.kind()
            ))),
        };
        if wanted.kind() != ValueKind::Seq {
            return Ok(is(&wanted)?.into());
        }
        let any = wanted
            .try_iter()?
            .map(|v| is(&v))
            .collect::<Result<Vec<_>, _>>()?;
        return Ok(any.contains(&true).into());
    }
    let wanted = args.needed(0)?;
    if name == "count" {
        return Ok(if nothing {
            0
        } else {
            part.matches(&*wanted).count()
        }
        .into());
    }
    let found = match name {
        _ if nothing => None,
        "find" | "index" => part.find(&*wanted),
        _ => part.rfind(&*wanted),
    };
    match found {
        Some(at) => Ok((start + part[..at].chars().count()).into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(invalid(format!("{name}: the text is not found"))),
    }
}

fn pad(text: &str, name: &str, args: &Arguments) -> Result<String, Error> {
    let width = args.number(0, "tabsize")?.unwrap_or(8).max(0) as usize;
    let fill = args.text(1, "")?.unwrap_or_else(|| " ".into());
    args.done(2)?;
    if width > MAX_WIDTH {
        return Err(invalid(format!("{name}({width}): at most {MAX_WIDTH}")));
    }
    let mut chars = fill.chars();
    let (Some(fill), None) = (chars.next(), chars.next()) else {
        return Err(invalid(
            "the fill character must be exactly one character long",
        ));
    };
    let missing = width.saturating_sub(text.chars().count());
    let filled = |n: usize| fill.to_string().repeat(n);
    Ok(match name {
        "expandtabs" => expanded(text, width),
        "ljust" => text.to_owned() + &filled(missing),
        "rjust" => filled(missing) + text,
        "center" => {
            // Python's own rule for the odd one.
            let left = missing / 2 + (missing & width & 1);
            filled(left) + text + &filled(missing - left)
        }
        _ => {
            let sign = usize::from(text.starts_with(['+', '-']));
            format!("{}{}{}", &text[..sign], "0".repeat(missing), &text[sign..])
        }
    })
}

fn expanded(text: &str, width: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if width > 0 => {
                let n = width - column % width;
                out.extend(std::iter::repeat_n(' ', n));
                column += n;
            }
            '\t' => {}
            _ => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
            }
        }
    }
    out
}

/// A capital after each character that is no letter, as in Python.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out += &capital(c),
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

pub(super) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(capital).unwrap_or_default();
    first + &chars.as_str().to_lowercase()
}

/// The title case of a letter: of several capitals the first stays.
fn capital(c: char) -> String {
    match c {
        // The four letters with a form of their own.
        '\u{1c4}'..='\u{1c6}' => '\u{1c5}'.into(),
        '\u{1c7}'..='\u{1c9}' => '\u{1c8}'.into(),
        '\u{1ca}'..='\u{1cc}' => '\u{1cb}'.into(),
        '\u{1f1}'..='\u{1f3}' => '\u{1f2}'.into(),
        _ => {
            let mut upper = c.to_uppercase();
            let first = upper.next().map(String::from).unwrap_or_default();
            first + &upper.collect::<String>().to_lowercase()
        }
    }
}

fn swapped(c: char) -> String {
    match c {
        _ if c.is_uppercase() => c.to_lowercase().collect(),
        _ if c.is_lowercase() => c.to_uppercase().collect(),
        _ => c.into(),
    }
}

/// Letters that differ in case only become the same.
fn folded(c: char) -> String {
    match c {
        'ı' => c.into(),
        _ => c.to_uppercase().flat_map(char::to_lowercase).collect(),
    }
}

/// The zeros of Unicode's sets of decimal digits, without those of historic scripts.
const ZEROS: [u32; 38] = [
    0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66,
    0xde6, 0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90,
    0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10,
    0x104a0,
];

fn is_decimal(c: char) -> bool {
    ZEROS
        .iter()
        .any(|&zero| (zero..zero + 10).contains(&u32::from(c)))
}

/// Digits that are no decimals: raised, lowered, in circles.
fn is_digit(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '\u{2070}' | '\u{2074}'..='\u{2079}' | '\u{2080}'..='\u{2089}'
        | '\u{2460}'..='\u{2468}' | '\u{2474}'..='\u{247c}' | '\u{2488}'..='\u{2490}' | '\u{24ea}'
        | '\u{24f5}'..='\u{24fd}' | '\u{24ff}' | '\u{2776}'..='\u{277e}' | '\u{2780}'..='\u{2788}'
        | '\u{278a}'..='\u{2792}')
}
