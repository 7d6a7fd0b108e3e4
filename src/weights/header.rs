//! The safetensors header: parsed and checked as bytes from a stranger.
//!
//! A file is an 8-byte little-endian length, that many bytes of JSON (tensor name → dtype, shape and byte range),
//! then the data. The format: <https://github.com/huggingface/safetensors#format>. The crate of that name, the reference,
//! reads each entry and holds ranges against dtypes and shapes; it has to have a whole file in memory for what is left, so
//! the length, names that come twice and the end of the file are looked at here. Checked is all that the header alone can
//! prove wrong, so that whoever uses the result can compute offsets without checking again.

use super::Dtype;
use super::text::{UniqueMap, clip, dims, quote};
use crate::{Error, Result};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype as Stored, Metadata, TensorInfo};
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
    pub dtype: Stored,
    /// Sizes of the dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file (not in the data section).
    pub bytes: Range<u64>,
}

/// The element type, when it is one that tandem computes with.
pub fn weight_dtype(stored: Stored) -> Option<Dtype> {
    match stored {
        Stored::BF16 => Some(Dtype::Bf16),
        Stored::F16 => Some(Dtype::F16),
        Stored::F32 => Some(Dtype::F32),
        _ => None,
    }
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
/// cover the data section without hole or overlap.
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
    let top: UniqueMap<TensorInfo> = serde_json::from_slice(json).map_err(|e| {
        Error::failed(format_args!(
            "the header is damaged: {}",
            clip(&e.to_string())
        ))
    })?;
    let mut tensors = Vec::from_iter(top.0);
    tensors.sort_by_key(|(_, t)| t.data_offsets);
    for (name, tensor) in &tensors {
        check_alone(tensor)
            .map_err(|what| Error::failed(format_args!("tensor {}: {what}", quote(name))))?;
    }
    let names: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
    let metadata = Metadata::new(None, tensors).map_err(|e| Error::failed(cover(&e)))?;
    let mut entries = BTreeMap::new();
    for name in names {
        let Some(tensor) = metadata.info(&name) else {
            continue;
        };
        // The ranges begin at 0 and follow each other, so the longest sum is that of the last one's end.
        let place = |offset: usize| data.checked_add(offset as u64).filter(|&at| at <= file_len);
        let (from, to) = tensor.data_offsets;
        let (Some(from), Some(to)) = (place(from), place(to)) else {
            let there = file_len - data;
            return Err(Error::failed(format_args!(
                "truncated at tensor {}: {} bytes of data are there, the header speaks of {}; download it again",
                quote(&name),
                there,
                metadata.data_len()
            )));
        };
        let entry = Entry {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: from..to,
        };
        entries.insert(name, entry);
    }
    let rest = (file_len - data).saturating_sub(metadata.data_len() as u64);
    match rest {
        0 => Ok(entries),
        _ => Err(Error::failed(format_args!(
            "{rest} bytes at the end belong to no tensor"
        ))),
    }
}

/// Holds one tensor's range against its dtype and shape; the crate's own errors do not say which tensor they are about.
fn check_alone(tensor: &TensorInfo) -> Result<(), String> {
    let (begin, end) = tensor.data_offsets;
    let Some(len) = end.checked_sub(begin) else {
        return Err(format!("data_offsets [{begin}, {end}] are not a range"));
    };
    let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
    let alone = TensorInfo {
        dtype,
        shape,
        data_offsets: (0, len),
    };
    match Metadata::new(None, vec![(String::new(), alone)]) {
        Ok(_) => Ok(()),
        Err(e) => Err(format!(
            "{dtype} {} in {len} bytes: {e}",
            dims(&tensor.shape)
        )),
    }
}

/// What is wrong with ranges that are right one by one.
fn cover(e: &SafeTensorError) -> String {
    match e {
        SafeTensorError::InvalidOffset(name) => format!(
            "tensor {} does not begin where the one before it ends: a hole, or an overlap",
            quote(name)
        ),
        other => clip(&other.to_string()),
    }
}
