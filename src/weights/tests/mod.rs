//! Tests of the weights as a whole: broken files, golden files, and every way to cut against a naive reference.

mod broken;
mod golden;
mod loading;

use super::*;
use std::path::Path;

/// A safetensors file with this header and `data` bytes behind it.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// A well-formed file of tensors given as (name, dtype, shape, data).
fn well_formed(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let (mut entries, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend_from_slice(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        entries.insert((*name).to_owned(), entry);
    }
    file(&serde_json::Value::Object(entries).to_string(), &data)
}

fn put(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), bytes).unwrap();
}

/// One part that is a whole tensor.
fn whole(tensor: &str, shape: [usize; 2], dtype: Dtype) -> LocalMatrix {
    LocalMatrix {
        name: tensor.to_owned(),
        rows: shape[0],
        cols: shape[1],
        dtype,
        parts: vec![Part {
            tensor: tensor.to_owned(),
            shape,
            rows: 0..shape[0],
            cols: 0..shape[1],
            dst_row: 0,
        }],
    }
}

fn load_into(source: Source<'_>, m: &LocalMatrix, dest: &mut [u8]) -> crate::Result<LoadStats> {
    load(source, std::slice::from_ref(m), &mut [dest], 2, &|_| ())
}

fn load_one(source: Source<'_>, m: &LocalMatrix) -> crate::Result<Vec<u8>> {
    let mut dest = vec![0; m.bytes()];
    load_into(source, m, &mut dest)?;
    Ok(dest)
}
