//! Does a checkpoint hold the model that its configuration describes?

use crate::config::ModelConfig;
use crate::layout::Shard;
use crate::weights::{Checkpoint, Dtype};
use crate::{Result, logging};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Checks every tensor's presence and shape, and returns the type that the weight matrices are kept in: the
/// checkpoint's own, or the one that holds all of them exactly where they differ.
///
/// What the files hold besides is left aside with a line that says so, as long as it is no part of the model. A tied
/// model with a head of its own that is not the embedding is not tied: `config` says so from here on.
///
/// # Errors
/// Missing tensors, other shapes, tensors that show that the model is another one than `config` says.
pub fn check_tensors(config: &mut ModelConfig, checkpoint: &mut Checkpoint) -> Result<Dtype> {
    checkpoint.add_prefix("model.", &["embed_tokens.", "layers.", "norm."]);
    if config.tie_word_embeddings {
        settle_head(config, checkpoint)?;
    }
    let matrices = Shard::new(config, 1, 0).matrices(config, config.dtype);
    let parts = || matrices.iter().flat_map(|m| &m.parts);
    let wanted: Vec<_> = parts().map(|p| (p.tensor.as_str(), p.shape)).collect();
    let part_of_model = |name: &str| {
        // A tied model's head was held against the embedding.
        let is_copy = config.tie_word_embeddings && name == HEAD;
        !is_copy && !is_table(name) && shows_another_model(name)
    };
    checkpoint.check(&wanted, &part_of_model)?;
    say_what_is_left(checkpoint, &wanted, config.tie_word_embeddings);
    checkpoint.dtype_of(
        parts()
            .filter(|p| p.shape[1] > 1)
            .map(|p| p.tensor.as_str()),
    )
}

/// One matrix serves as embedding and head, unless the file has two that differ.
fn settle_head(config: &mut ModelConfig, checkpoint: &mut Checkpoint) -> Result<()> {
    let there = |name| checkpoint.tensor(name).is_some() || checkpoint.is_listed(name);
    match (there(EMBEDDING), there(HEAD)) {
        (false, true) => checkpoint.rename(HEAD, EMBEDDING),
        (true, true) if !checkpoint.same_data(EMBEDDING, HEAD)? => {
            logging::said_by_one(format_args!(
                "config.json ties the head to the embedding, but {HEAD} is not the same: it is used as the head, as \
                 transformers does"
            ));
            config.tie_word_embeddings = false;
        }
        _ => {}
    }
    Ok(())
}

/// Tables that older exports carry and that are computed here.
fn is_table(name: &str) -> bool {
    ["inv_freq", "cos_cached", "sin_cached"]
        .iter()
        .any(|table| name.ends_with(&format!("rotary_emb.{table}")))
}

/// Whether a tensor that the forward pass does not read belongs to it all the same: a bias or norm of another
/// architecture, a layer too many, parts of a quantized matrix, an adapter that is not merged.
fn shows_another_model(name: &str) -> bool {
    let first = name.split('.').next().unwrap_or_default();
    let of_model = [
        "model",
        "base_model",
        "language_model",
        "transformer",
        "layers",
        "lm_head",
    ];
    let of_matrix = [
        "lora_",
        "qweight",
        "qzeros",
        "weight_scale",
        "weight_packed",
        "absmax",
    ];
    of_model.contains(&first) || of_matrix.iter().any(|part| name.contains(part))
}

/// Heads and towers beside the model change no token; that they are there may be news all the same.
fn say_what_is_left(checkpoint: &Checkpoint, wanted: &[(&str, [usize; 2])], tied: bool) {
    let quiet = |name: &str| is_table(name) || (tied && name == HEAD);
    if let Some(names) = checkpoint.unwanted(wanted, &|name| !quiet(name)) {
        logging::said_by_one(format_args!(
            "{}: left aside, since the language model does not read what lies beside it: {names}",
            checkpoint.dir().display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/models")
            .join(name)
    }

    /// The golden model with other tensors.
    fn changed(base: &str, change: impl FnOnce(&mut Tensors)) -> (tempfile::TempDir, ModelConfig) {
        let bytes = std::fs::read(golden(base).join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Tensors = file
            .iter()
            .map(|(n, t)| {
                (
                    n.to_owned(),
                    (t.dtype(), t.shape().to_vec(), t.data().to_vec()),
                )
            })
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(n, (dtype, shape, data))| {
            (
                n,
                safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap(),
            )
        });
        let dir = tempfile::tempdir().unwrap();
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let config = ModelConfig::from_dir(&golden(base)).unwrap();
        (dir, config)
    }

    /// What the check says, and whether the model is tied afterwards.
    fn outcome(base: &str, change: impl FnOnce(&mut Tensors)) -> (Result<Dtype, String>, bool) {
        let (dir, mut config) = changed(base, change);
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        let result = check_tensors(&mut config, &mut checkpoint).map_err(|e| e.to_string());
        (result, config.tie_word_embeddings)
    }

    fn some() -> (safetensors::Dtype, Vec<usize>, Vec<u8>) {
        (safetensors::Dtype::F32, vec![1, 1], vec![0; 4])
    }

    #[test]
    fn what_lies_beside_the_model_is_left_aside() {
        for name in [
            "v_head.summary.weight",
            "score.weight",
            "visual.patch_embed.proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        ] {
            let got = outcome("qwen2-tied", |t| drop(t.insert(name.into(), some())));
            assert_eq!(got, (Ok(Dtype::Bf16), true), "{name}");
        }
    }

    #[test]
    fn what_shows_another_model_is_refused_by_name() {
        for name in [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.o_proj.bias",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.2.input_layernorm.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "lm_head.bias",
            "lm_head.weight_scale",
        ] {
            let (result, _) = outcome("qwen2-tied", |t| drop(t.insert(name.into(), some())));
            let e = result.unwrap_err();
            assert!(e.contains(name) && e.contains("not read"), "{e}");
        }
    }

    #[test]
    fn a_tied_model_has_the_head_that_is_there() {
        let copy = outcome("qwen2-tied", |t| {
            let embedding = t[EMBEDDING].clone();
            t.insert(HEAD.into(), embedding);
        });
        assert_eq!(copy, (Ok(Dtype::Bf16), true));
        let own = outcome("qwen2-tied", |t| {
            let mut head = t[EMBEDDING].clone();
            // The very last byte.
            *head.2.last_mut().unwrap() ^= 1;
            t.insert(HEAD.into(), head);
        });
        assert_eq!(own, (Ok(Dtype::Bf16), false));
        let (other_shape, _) = outcome("qwen2-tied", |t| drop(t.insert(HEAD.into(), some())));
        assert!(
            other_shape
                .unwrap_err()
                .contains("`lm_head.weight` has shape [1, 1]")
        );
        let head_only = outcome("qwen2-tied", |t| {
            let embedding = t.remove(EMBEDDING).unwrap();
            t.insert(HEAD.into(), embedding);
        });
        assert_eq!(head_only, (Ok(Dtype::Bf16), true));
        let (none, _) = outcome("qwen2-untied", |t| drop(t.remove(HEAD)));
        assert!(
            none.unwrap_err()
                .contains("missing 1 tensor: `lm_head.weight`")
        );
    }

    #[test]
    fn names_without_the_prefix_of_the_whole_are_those_of_the_base_model() {
        let base = outcome("qwen2-tied", |t| {
            *t = std::mem::take(t)
                .into_iter()
                .map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor))
                .collect();
        });
        assert_eq!(base, (Ok(Dtype::Bf16), true));
    }
}
