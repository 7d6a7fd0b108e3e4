//! `model.safetensors.index.json`: which files a checkpoint has, read as from a stranger; and folders without any.

use super::checkpoint::{INDEX, SINGLE};
use super::text::{UniqueMap, clip, quote};
use crate::{Error, Result, files};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Component, Path};

/// `weight_map` of an index: tensor name → file name, every file name plain.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let json = files::read(path, files::LARGE)?.unwrap_or_default();
    let index: Index = serde_json::from_slice(&json)
        .map_err(|e| Error::file(path, format_args!("damaged: {}", clip(&e.to_string()))))?;
    let map = index.weight_map.0;
    if map.is_empty() {
        return Err(Error::file(path, "`weight_map` is empty"));
    }
    for (tensor, file) in &map {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(f)), None) if f == OsStr::new(file));
        if !plain || !file.ends_with(".safetensors") {
            return Err(Error::file(
                path,
                format_args!(
                    "tensor {} is said to lie in {}, which is not the name of a .safetensors file in this folder",
                    quote(tensor),
                    quote(file)
                ),
            ));
        }
    }
    Ok(map)
}

/// Why a directory without `model.safetensors` and index cannot be loaded, and what to do about it.
pub(super) fn nothing_to_open(dir: &Path) -> Error {
    let names: Vec<String> = match dir.read_dir() {
        Ok(entries) => entries
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect(),
        Err(e) => return Error::file(dir, e),
    };
    let any = |ends: &[&str]| {
        names
            .iter()
            .any(|n| ends.iter().any(|end| n.ends_with(end)))
    };
    if any(&[".safetensors"]) {
        Error::file(
            dir,
            format_args!("has .safetensors files but no {INDEX}; download that too"),
        )
    } else if any(&[".bin", ".pt", ".pth", ".bin.index.json"]) {
        Error::file(
            dir,
            "has PyTorch weights only, which can run code when read; convert them to safetensors \
             (transformers: `save_pretrained(dir, safe_serialization=True)`)",
        )
    } else if any(&[".gguf"]) {
        Error::file(
            dir,
            "has GGUF weights only; download the model's safetensors instead",
        )
    } else {
        Error::file(
            dir,
            format_args!("no weights here: neither {SINGLE} nor {INDEX}"),
        )
    }
}
