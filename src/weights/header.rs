//! The safetensors header: parsed and checked as bytes from a stranger.
//!
//! A file is an 8-byte little-endian length, that many bytes of JSON (tensor name → dtype, shape and byte range),
//! then the data. The format: <https://github.com/huggingface/safetensors#format>. Checked here is all that the header
//! alone can prove wrong, so that whoever uses the result can compute offsets without checking again.

use super::Dtype;
use super::text::{UniqueMap, clip, dims, quote};
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Range;

/// The longest header that is accepted, in bytes; the reference implementation has the same bound.
pub const MAX_HEADER: u64 = 100_000_000;

/// Bytes in front of the JSON: its length.
pub const PREFIX: u64 = 8;

/// A tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type as written, e.g. `BF16`; types that tandem cannot compute with are listed too.
    pub dtype: String,
    /// Sizes of the dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file (not in the data section).
    pub bytes: Range<u64>,
}

/// The element type of this name, when it is one that tandem computes with.
pub fn weight_dtype(name: &str) -> Option<Dtype> {
    match name {
        "BF16" => Some(Dtype::Bf16),
        "F16" => Some(Dtype::F16),
        "F32" => Some(Dtype::F32),
        _ => None,
    }
}

/// Bits of one element; `None` for a type that this version does not know.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" => 8,
        "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A tensor as written in the JSON; the offsets count from the end of the header.
#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The length of the JSON from the first bytes of a file of `file_len` bytes.
///
/// # Errors
/// A file too short for a header, a Git LFS pointer, a length of zero, beyond [`MAX_HEADER`] or beyond the file.
pub fn json_len(start: &[u8], file_len: u64) -> Result<u64> {
    let Some(prefix) = start.first_chunk::<8>().filter(|_| file_len >= PREFIX) else {
        return Err(Error::failed(format_args!(
            "{file_len} bytes is too short for a safetensors file; download it again"
        )));
    };
    if prefix == b"version " {
        return Err(Error::failed(
            "a Git LFS pointer, not the weights themselves; run `git lfs pull` in the model's folder",
        ));
    }
    let len = u64::from_le_bytes(*prefix);
    let there = file_len - PREFIX;
    match len {
        0 => Err(Error::failed("header length 0: not a safetensors file")),
        1..=MAX_HEADER if len <= there => Ok(len),
        1..=MAX_HEADER => Err(Error::failed(format_args!(
            "truncated: the header has {len} bytes and the file {there} after the length ({} missing); download it again",
            len - there
        ))),
        _ => Err(Error::failed(format_args!(
            "header length {len} exceeds the limit of {MAX_HEADER} bytes: not a safetensors file, or damaged"
        ))),
    }
}

/// Parses the header at the start of a file of `file_len` bytes; `start` must reach to the end of the header.
///
/// Every returned range lies inside the file, has the length that dtype and shape ask for, and together the ranges
/// cover the data section without hole or overlap. (The length of a type unknown to this version is taken on trust.)
///
/// # Errors
/// One line naming the tensor at fault; the caller adds the file.
pub fn parse(start: &[u8], file_len: u64) -> Result<BTreeMap<String, Entry>> {
    let len = json_len(start, file_len)?;
    let data = PREFIX + len;
    let json = usize::try_from(data)
        .ok()
        .and_then(|end| start.get(PREFIX as usize..end))
        .ok_or_else(|| Error::failed("the header was not read to its end"))?;
    let top: UniqueMap<Raw> = serde_json::from_slice(json).map_err(|e| {
        Error::failed(format_args!(
            "the header is damaged: {}",
            clip(&e.to_string())
        ))
    })?;
    let mut tensors = BTreeMap::new();
    for (name, raw) in top.0 {
        let entry = entry(raw, data)
            .map_err(|what| Error::failed(format_args!("tensor {}: {what}", quote(&name))))?;
        tensors.insert(name, entry);
    }
    check_cover(&tensors, data, file_len)?;
    Ok(tensors)
}

/// One tensor, its byte range moved to file offsets and held against dtype and shape.
fn entry(raw: Raw, data: u64) -> Result<Entry, String> {
    let (begin, end) = raw.data_offsets;
    let bytes = match (data.checked_add(begin), data.checked_add(end)) {
        (Some(from), Some(to)) if from <= to => from..to,
        _ => return Err(format!("data_offsets [{begin}, {end}] are not a range")),
    };
    let elements = raw
        .shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d as u64));
    if let Some(bits) = bits(&raw.dtype) {
        let want = elements
            .and_then(|n| n.checked_mul(bits))
            .ok_or_else(|| format!("shape {} overflows", dims(&raw.shape)))?;
        if want % 8 != 0 || want / 8 != end - begin {
            return Err(format!(
                "{} {} needs {} bytes, data_offsets [{begin}, {end}] give {}",
                raw.dtype,
                dims(&raw.shape),
                want.div_ceil(8),
                end - begin
            ));
        }
    }
    Ok(Entry {
        dtype: raw.dtype,
        shape: raw.shape,
        bytes,
    })
}

/// The ranges must tile the data section, from its first byte to the last of the file.
fn check_cover(tensors: &BTreeMap<String, Entry>, data: u64, file_len: u64) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, t)| (t.bytes.start, t.bytes.end));
    let end = order.last().map_or(data, |(_, t)| t.bytes.end);
    let (mut at, mut before) = (data, "the header".to_owned());
    for (name, t) in order {
        let (from, name) = (t.bytes.start, quote(name));
        if from < at {
            let by = at - from;
            return Err(Error::failed(format_args!(
                "tensor {name} overlaps {before} by {by} bytes"
            )));
        }
        if from > at {
            let hole = from - at;
            return Err(Error::failed(format_args!(
                "{hole} bytes between {before} and tensor {name} belong to no tensor"
            )));
        }
        if t.bytes.end > file_len {
            let missing = end - file_len;
            return Err(Error::failed(format_args!(
                "truncated at tensor {name}: {missing} of {end} bytes are missing; download it again"
            )));
        }
        (at, before) = (t.bytes.end, name);
    }
    if at < file_len {
        let rest = file_len - at;
        return Err(Error::failed(format_args!(
            "{rest} bytes after {before} belong to no tensor"
        )));
    }
    Ok(())
}
