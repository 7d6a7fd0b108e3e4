//! Jinja2's filters that the engine lacks, or whose arguments it takes otherwise.

use minijinja::functions::namespace;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, State, Value, filters};
use minijinja_contrib::globals::joiner;

use super::percent::{self, printf};
use super::python::{invalid, strip, text_of};

/// Longest text that `center` and `indent` put in.
const MAX_WIDTH: usize = 1 << 20;

/// Arguments of a filter by their names, those given by place included.
struct Named {
    values: Vec<Option<Value>>,
    names: &'static [&'static str],
}

impl Named {
    fn new(
        names: &'static [&'static str],
        places: Rest<Value>,
        by_name: Kwargs,
    ) -> Result<Self, Error> {
        if places.len() > names.len() {
            return Err(Error::from(minijinja::ErrorKind::TooManyArguments));
        }
        let mut values: Vec<Option<Value>> = places.iter().cloned().map(Some).collect();
        for name in &names[values.len()..] {
            values.push(by_name.get(name)?);
        }
        by_name.assert_all_used()?;
        Ok(Self { values, names })
    }

    fn get(&self, i: usize) -> Option<Value> {
        self.values[i].clone()
    }

    fn flag(&self, i: usize, default: bool) -> bool {
        self.get(i).map_or(default, |v| v.is_true())
    }

    fn number(&self, i: usize, default: usize) -> Result<usize, Error> {
        self.get(i).map_or(Ok(default), usize::try_from)
    }

    fn text(&self, i: usize, default: &str) -> String {
        self.get(i).map_or(default.to_owned(), |v| v.to_string())
    }

    /// As the engine's own filters take them: by name, and only those that were given.
    fn kwargs(self) -> Kwargs {
        let pairs = self.names.iter().zip(self.values);
        pairs
            .filter_map(|(name, value)| Some((*name, value?)))
            .collect()
    }
}

/// One item after the other, and from the first again.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Object for Cycler {
    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let at = self.at.load(Ordering::Relaxed);
        (key == "current").then(|| self.items[at].clone())
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let () = from_args(args)?;
        match name {
            "next" => {
                let at = self.at.load(Ordering::Relaxed);
                self.at
                    .store((at + 1) % self.items.len(), Ordering::Relaxed);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(minijinja::ErrorKind::UnknownMethod.into()),
        }
    }
}

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_filter(percent::NAME, |a: &Value, b: &Value| percent::percent(a, b));
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    for name in ["escape", "e"] {
        environment.add_filter(name, |v: &Value| match v.is_safe() {
            true => v.clone(),
            false => escaped(v),
        });
    }
    environment.add_filter("forceescape", escaped);
    environment.add_filter("string", |v: &Value| match v.as_str() {
        Some(_) => Ok(v.clone()),
        None => text_of(v).map(Value::from),
    });
    environment.add_filter("format", format);
    environment.add_filter("trim", trim);
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("center", center);
    environment.add_filter("wordcount", |text: &str| {
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
        words.filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("urlencode", urlencode);
    environment.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(invalid("cycler: at least one item")),
        false => Ok(Value::from_object(Cycler {
            items: items.to_vec(),
            at: AtomicUsize::new(0),
        })),
    });
    environment.add_function("joiner", |separator: Option<Value>| {
        joiner(Some(separator.unwrap_or_else(|| Value::from(", "))))
    });
    environment.add_function("dict", dict);
    environment.add_function("namespace", |value: Option<Value>, by_name: Kwargs| {
        namespace(Some(dict(value, by_name)?.into()))
    });
    environment.remove_global("debug");
    install_with_places(environment);
}

/// Filters that the engine has, with arguments by name alone or by place alone.
fn install_with_places(environment: &mut Environment<'static>) {
    environment.add_filter(
        "sort",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["reverse", "case_sensitive", "attribute"], places, by_name)?;
            filters::sort(state, v, args.kwargs())
        },
    );
    environment.add_filter(
        "unique",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["case_sensitive", "attribute"], places, by_name)?;
            filters::unique(state, v, args.kwargs())
        },
    );
    environment.add_filter(
        "min",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["case_sensitive", "attribute"], places, by_name)?;
            filters::min(state, v, args.kwargs())
        },
    );
    environment.add_filter(
        "max",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["case_sensitive", "attribute"], places, by_name)?;
            filters::max(state, v, args.kwargs())
        },
    );
    environment.add_filter(
        "dictsort",
        |v: &Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["case_sensitive", "by", "reverse"], places, by_name)?;
            filters::dictsort(v, args.kwargs())
        },
    );
    environment.add_filter(
        "batch",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["linecount", "fill_with"], places, by_name)?;
            filters::batch(state, v, args.number(0, 0)?, args.get(1))
        },
    );
    environment.add_filter(
        "slice",
        |state: &State, v: Value, places: Rest<Value>, by_name: Kwargs| {
            let args = Named::new(&["slices", "fill_with"], places, by_name)?;
            filters::slice(state, v, args.number(0, 0)?, args.get(1))
        },
    );
}

fn default(value: &Value, places: Rest<Value>, by_name: Kwargs) -> Result<Value, Error> {
    let args = Named::new(&["default_value", "boolean"], places, by_name)?;
    let missing = value.is_undefined() || args.flag(1, false) && !value.is_true();
    Ok(match missing {
        true => args.get(0).unwrap_or_else(|| Value::from("")),
        false => value.clone(),
    })
}

/// With the entities of Python's markupsafe.
fn escaped(value: &Value) -> Value {
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    Value::from_safe_string(out)
}

fn format(text: &str, places: Rest<Value>, by_name: Kwargs) -> Result<String, Error> {
    let names = by_name.args().collect::<Vec<_>>();
    match (names.is_empty(), places.is_empty()) {
        (true, _) => {
            let values = minijinja::value::Tuple::from(places.to_vec());
            printf(text, &Value::from(values))
        }
        (false, true) => {
            let pairs = names
                .iter()
                .map(|&name| Ok((name, by_name.get::<Value>(name)?)));
            let pairs = pairs.collect::<Result<Vec<_>, Error>>()?;
            printf(text, &Value::from_pairs(pairs))
        }
        (false, false) => Err(invalid("format: arguments by place or by name, not both")),
    }
}

fn trim(text: &Value, places: Rest<Value>, by_name: Kwargs) -> Result<String, Error> {
    let chars = Named::new(&["chars"], places, by_name)?.get(0);
    let chars = chars.filter(|c| !c.is_none()).map(|c| c.to_string());
    Ok(strip(&text.to_string(), chars.as_deref(), true, true).to_owned())
}

fn indent(text: &str, places: Rest<Value>, by_name: Kwargs) -> Result<String, Error> {
    let args = Named::new(&["width", "first", "blank"], places, by_name)?;
    let step = match args.get(0) {
        Some(width) if width.as_str().is_some() => width.to_string(),
        _ => " ".repeat(args.number(0, 4)?.min(MAX_WIDTH)),
    };
    let (first, blank) = (args.flag(1, false), args.flag(2, false));
    let mut out = if first { step.clone() } else { String::new() };
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
            out.push_str(if blank || !line.is_empty() { &step } else { "" });
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(text: &str, places: Rest<Value>, by_name: Kwargs) -> Result<String, Error> {
    let args = Named::new(&["length", "killwords", "end", "leeway"], places, by_name)?;
    let (length, leeway) = (args.number(0, 255)?, args.number(3, 5)?);
    let end = args.text(2, "...");
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let kept = length.checked_sub(end.chars().count()).ok_or_else(|| {
        invalid(format!(
            "truncate: a length of {length} is less than its end's"
        ))
    })?;
    let mut text: String = text.chars().take(kept).collect();
    if !args.flag(1, false)
        && let Some(at) = text.rfind(' ')
    {
        text.truncate(at);
    }
    Ok(text + &end)
}

fn center(text: &str, width: Option<usize>) -> Result<String, Error> {
    let width = width.unwrap_or(80);
    if width > MAX_WIDTH {
        return Err(invalid(format!("center({width}): at most {MAX_WIDTH}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    // Python's own rule for the odd one.
    let left = missing / 2 + (missing & width & 1);
    Ok(" ".repeat(left) + text + &" ".repeat(missing - left))
}

/// `int(value, base)`, else the whole part of a number, else the default.
fn int(value: &Value, places: Rest<Value>, by_name: Kwargs) -> Result<Value, Error> {
    let args = Named::new(&["default", "base"], places, by_name)?;
    let base = args.number(1, 10)?;
    let whole = |f: f64| (f.is_finite() && f.abs() < 1e38).then_some(f.trunc() as i128);
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => {
            let text = strip(text, None, true, true);
            whole_number(text, base).or_else(|| whole(text.parse().ok()?))
        }
        (None, ValueKind::Bool) => Some(i128::from(value.is_true())),
        (None, ValueKind::Number) if value.is_integer() => return Ok(value.clone()),
        (None, ValueKind::Number) => whole(f64::try_from(value.clone())?),
        _ => None,
    };
    Ok(found.map_or_else(|| args.get(0).unwrap_or_else(|| 0.into()), Value::from))
}

fn whole_number(text: &str, base: usize) -> Option<i128> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefixed = |prefix: &str| {
        digits
            .strip_prefix(prefix)
            .or_else(|| digits.strip_prefix(&prefix.to_uppercase()))
    };
    let (base, digits) = [("0x", 16), ("0o", 8), ("0b", 2)]
        .into_iter()
        .filter(|&(_, of)| base == 0 || base == of)
        .find_map(|(prefix, of)| Some((of, prefixed(prefix)?)))
        .unwrap_or((if base == 0 { 10 } else { base }, digits));
    let plain = digits.replace('_', "");
    let is_sign = plain.starts_with(['+', '-']);
    if is_sign || !(2..=36).contains(&base) || digits.starts_with('_') || digits.ends_with('_') {
        return None;
    }
    Some(sign * i128::from_str_radix(&plain, base as u32).ok()?)
}

fn float(value: &Value, places: Rest<Value>, by_name: Kwargs) -> Result<Value, Error> {
    let default = Named::new(&["default"], places, by_name)?.get(0);
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => strip(text, None, true, true).replace('_', "").parse().ok(),
        (None, ValueKind::Bool) => Some(f64::from(u8::from(value.is_true()))),
        (None, ValueKind::Number) => Some(f64::try_from(value.clone())?),
        _ => None,
    };
    Ok(found.map_or_else(|| default.unwrap_or_else(|| 0.0.into()), Value::from))
}

fn urlencode(value: &Value) -> Result<String, Error> {
    let pair = |key: &Value, value: &Value| {
        let quoted = |v: &Value| quote(&v.to_string(), "").replace("%20", "+");
        format!("{}={}", quoted(key), quoted(value))
    };
    let pairs = match value.kind() {
        ValueKind::Map => value
            .try_iter()?
            .map(|key| Ok(pair(&key, &value.get_item(&key)?)))
            .collect::<Result<Vec<_>, Error>>()?,
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|p| Ok(pair(&p.get_item_by_index(0)?, &p.get_item_by_index(1)?)))
            .collect::<Result<Vec<_>, Error>>()?,
        _ => return Ok(quote(&value.to_string(), "/")),
    };
    Ok(pairs.join("&"))
}

fn quote(text: &str, safe: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        match c.is_ascii_alphanumeric() || "_.-~".contains(c) || safe.contains(c) {
            true => out.push(c),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// `dict(pairs or a dict, name=value, …)`.
fn dict(value: Option<Value>, by_name: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    if let Some(value) = value.filter(|v| !v.is_undefined()) {
        let is_dict = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            pairs.push(match is_dict {
                true => (item.clone(), value.get_item(&item)?),
                false => (item.get_item_by_index(0)?, item.get_item_by_index(1)?),
            });
        }
    }
    for name in by_name.args() {
        pairs.push((Value::from(name), by_name.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}
