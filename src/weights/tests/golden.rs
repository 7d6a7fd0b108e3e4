//! Checkpoints that Python's safetensors and huggingface_hub wrote; values as PyTorch converts them.

use super::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Expected {
    dtype: String,
    shape: Vec<usize>,
    f32_bits: Vec<u32>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/weights")
        .join(name)
}

#[test]
fn golden_checkpoints_read_as_pytorch_reads_them() {
    let text = std::fs::read_to_string(folder("expected.json")).unwrap();
    let expected: BTreeMap<String, Expected> = serde_json::from_str(&text).unwrap();
    for kind in ["single", "sharded"] {
        let checkpoint = Checkpoint::open(folder(kind)).unwrap();
        assert!(checkpoint.names().eq(expected.keys()));
        let wanted: Vec<_> = expected
            .iter()
            .filter(|(_, e)| e.dtype != "I64")
            .map(|(name, _)| {
                (
                    name.as_str(),
                    checkpoint.tensor(name).unwrap().matrix_shape().unwrap(),
                )
            })
            .collect();
        checkpoint
            .check(&wanted, &|name| name != "position_ids")
            .unwrap();
        for (name, expected) in &expected {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(
                (&tensor.stored_dtype.to_string(), &tensor.shape),
                (&expected.dtype, &expected.shape)
            );
            let Some(_) = tensor.dtype() else { continue };
            let m = whole(name, tensor.matrix_shape().unwrap(), Dtype::F32);
            let bytes = load_one(Source::Checkpoint(&checkpoint), &m).unwrap();
            let bits: Vec<_> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| u32::from_le_bytes(b))
                .collect();
            assert_eq!(bits, expected.f32_bits, "{kind} {name}");
        }
    }
}

#[test]
fn dtypes_join_and_quantized_tensors_are_refused_on_use() {
    let c = Checkpoint::open(folder("single")).unwrap();
    assert_eq!(
        c.dtype_of(["special.bf16", "model.norm.weight"]).unwrap(),
        Dtype::Bf16
    );
    assert_eq!(
        c.dtype_of(["special.bf16", "special.f16"]).unwrap(),
        Dtype::F32
    );
    let message = |e: crate::Error| e.to_string().rsplit(": ").next().unwrap().to_owned();
    assert_eq!(
        message(c.dtype_of(["special.f16", "nope"]).unwrap_err()),
        "tensor `nope` is missing"
    );
    let refused = "tensor `position_ids` is `I64`; tandem reads BF16, F16 and F32 (quantized checkpoints are not supported)";
    assert_eq!(message(c.dtype_of(["position_ids"]).unwrap_err()), refused);
    let m = whole("position_ids", [1, 6], Dtype::F32);
    assert_eq!(
        message(load_one(Source::Checkpoint(&c), &m).unwrap_err()),
        refused
    );
    assert_eq!(
        message(c.check(&[("position_ids", [1, 6])], &|_| true).unwrap_err()),
        refused
    );
    assert!(c.dtype_of([]).is_err());
}

#[test]
fn the_fingerprint_follows_the_content_not_the_path() {
    let of = |dir: &Path| Checkpoint::open(dir).unwrap().fingerprint().unwrap();
    let copy = tempfile::tempdir().unwrap();
    for entry in folder("sharded").read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    assert_eq!(of(copy.path()), of(&folder("sharded")));
    assert_ne!(of(&folder("single")), of(&folder("sharded")));
    let data = [0; 8];
    put(
        copy.path(),
        "model.safetensors",
        well_formed(&[("a", "F32", &[2], &data)]),
    );
    let before = of(copy.path());
    put(
        copy.path(),
        "model.safetensors",
        well_formed(&[("b", "F32", &[2], &data)]),
    );
    assert_ne!(of(copy.path()), before);
}

/// Nothing but data: a fine-tune beside its base. Wherever it was changed, a few equal parts of every tensor are looked at.
#[test]
fn the_fingerprint_follows_the_data_of_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let of = |changed: Option<usize>| {
        let data: Vec<_> = (0..20)
            .map(|i| vec![u8::from(changed == Some(i)); 4000])
            .collect();
        let names: Vec<_> = (0..20).map(|i| format!("t{i}")).collect();
        let tensors: Vec<_> = names
            .iter()
            .zip(&data)
            .map(|(name, data)| (name.as_str(), "F32", &[1000usize] as &[usize], &data[..]))
            .collect();
        put(dir.path(), "model.safetensors", well_formed(&tensors));
        Checkpoint::open(dir.path()).unwrap().fingerprint().unwrap()
    };
    let base = of(None);
    assert_eq!(of(None), base);
    (0..20).for_each(|i| assert_ne!(of(Some(i)), base, "{i}"));
}
