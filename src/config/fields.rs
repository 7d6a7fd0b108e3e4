//! Typed access to a JSON object that remembers which keys nobody asked for.

use crate::{Error, Result, files};
use serde_json::{Map, Value};
use std::path::Path;

pub(super) fn read_text(path: &Path) -> Result<String> {
    files::read_text(path)?
        .ok_or_else(|| Error::file(path, "cannot be read: there is no such file"))
}

/// A JSON object whose keys are taken out one by one; `null` counts as absent, as it does in Python.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub fn parse(text: &str) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Fields(map)),
            Ok(_) => Err(Error::failed("not a JSON object")),
            Err(e) => Err(Error::failed(format!("not valid JSON: {e}"))),
        }
    }

    pub fn from_value(key: &str, value: Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Fields(map)),
            other => Err(Error::failed(format!("{key} is {other}, not an object"))),
        }
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key).filter(|v| !v.is_null())
    }

    pub fn optional_size(&mut self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max as u64 => Ok(Some(n as usize)),
            _ => Err(Error::failed(format!(
                "{key} is {value}; a whole number from 1 to {max} is needed"
            ))),
        }
    }

    /// A whole number, 0 included.
    pub fn count(&mut self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(Error::failed(format!(
                "{key} is {value}; a whole number is needed"
            ))),
        }
    }

    pub fn size(&mut self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .ok_or_else(|| Error::failed(format!("{key} is missing")))
    }

    /// A number that single precision holds, since that is what the model computes in.
    pub fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|&x| (x as f32).is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::failed(format!(
                "{key} is {value}; a number is needed, and none beyond 3.4e38"
            ))),
        }
    }

    pub fn boolean(&mut self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_bool() {
            Some(b) => Ok(Some(b)),
            None => Err(Error::failed(format!(
                "{key} is {value}; true or false is needed"
            ))),
        }
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => Err(Error::failed(format!(
                "{key} is {value}; a string is needed"
            ))),
        }
    }

    /// One token id or a list of them. Negative numbers, as some files have for none, are no token's.
    pub fn token_ids(&mut self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.take(key) else {
            return Ok(Vec::new());
        };
        let id = |v: &Value| match v.as_i64() {
            Some(n) if n < 0 => Some(None),
            _ => v.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some),
        };
        let ids = match &value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|n| vec![n]),
        };
        let ids = ids.ok_or_else(|| {
            Error::failed(format!(
                "{key} is {value}; a token id or a list of them is needed"
            ))
        })?;
        Ok(ids.into_iter().flatten().collect())
    }

    /// Rows of token ids; an empty one counts as none.
    pub fn token_rows(&mut self, key: &str) -> Result<Vec<Vec<u32>>> {
        let Some(value) = self.take(key) else {
            return Ok(Vec::new());
        };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let row = |v: &Value| v.as_array()?.iter().map(id).collect::<Option<Vec<u32>>>();
        let rows = value.as_array().map(|all| all.iter().map(row).collect());
        match rows {
            Some(Some(rows)) => Ok(Vec::into_iter(rows)
                .filter(|row: &Vec<u32>| !row.is_empty())
                .collect()),
            _ => Err(Error::failed(format!(
                "{key} is {value}; a list of lists of token ids is needed"
            ))),
        }
    }

    /// What was not taken.
    pub fn rest(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0.iter()
    }
}
