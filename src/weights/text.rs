//! What the readers of untrusted JSON share: maps without duplicate keys, and names short enough for one line.

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;

/// A JSON object from tensor names to `V`; a name that comes twice is refused, `__metadata__` (free text) is skipped.
pub(super) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object keyed by tensor name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
        let (mut map, mut metadata) = (BTreeMap::new(), false);
        while let Some(name) = from.next_key::<String>()? {
            let twice = if name == "__metadata__" {
                from.next_value::<Option<HashMap<String, String>>>()?;
                std::mem::replace(&mut metadata, true)
            } else {
                let value = from
                    .next_value()
                    .map_err(|e| A::Error::custom(format_args!("tensor {}: {e}", quote(&name))))?;
                map.insert(name.clone(), value).is_some()
            };
            if twice {
                let name = quote(&name);
                return Err(A::Error::custom(format_args!("{name} is listed twice")));
            }
        }
        Ok(UniqueMap(map))
    }
}

/// At most 200 characters of a message; a damaged file may put megabytes into one.
pub(super) fn clip(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A name as it stands in an error.
pub(super) fn quote(name: &str) -> String {
    format!("`{}`", clip(name))
}

/// A shape as it stands in an error: `[152064, 8192]`.
pub(super) fn dims(shape: &[usize]) -> String {
    clip(&format!("{shape:?}"))
}

/// The first few of `names`, and how many there are beyond them.
pub(super) fn first_few<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const FEW: usize = 3;
    let more = names.len().saturating_sub(FEW);
    let shown: Vec<_> = names.take(FEW).map(quote).collect();
    match more {
        0 => shown.join(", "),
        _ => format!("{} and {more} more", shown.join(", ")),
    }
}
