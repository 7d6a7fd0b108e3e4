use super::*;
use serde_json::{Value, json};

fn qwen25() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
        "intermediate_size": 29568, "max_position_embeddings": 32768, "max_window_layers": 70,
        "model_type": "qwen2", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 152064
    })
}

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut config = qwen25();
    change(&mut config);
    ModelConfig::from_json(&config.to_string())
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn a_published_config_equals_its_named_shape() {
    let mut config = ModelConfig::from_json(&qwen25().to_string()).unwrap();
    assert_eq!(std::mem::take(&mut config.eos_token_ids), [151645]);
    assert_eq!(config, named_shape("qwen2.5-72b").unwrap());
    // The published parameter counts: 72.7 billion, and 0.49 billion for the smallest.
    assert_eq!(config.parameters(), 72_706_203_648);
    assert_eq!(
        named_shape("qwen2.5-0.5b").unwrap().parameters(),
        494_032_768
    );
    assert_eq!(named_shape("qwen3-8b").unwrap().parameters(), 8_190_735_360);
}

#[test]
fn the_newer_spelling_reads_the_same() {
    let mut new = qwen25();
    let map = new.as_object_mut().unwrap();
    for key in ["rope_theta", "torch_dtype"] {
        map.remove(key);
    }
    map.insert("dtype".into(), json!("bfloat16"));
    map.insert(
        "rope_parameters".into(),
        json!({"rope_type": "default", "rope_theta": 1000000.0}),
    );
    map.insert(
        "layer_types".into(),
        json!(["full_attention", "full_attention"]),
    );
    assert_eq!(
        ModelConfig::from_json(&new.to_string()).unwrap(),
        ModelConfig::from_json(&qwen25().to_string()).unwrap()
    );
}

#[test]
fn yarn_is_read_in_both_spellings() {
    for key in ["type", "rope_type"] {
        let mut config = qwen25();
        config["rope_scaling"] =
            json!({key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
        let config = ModelConfig::from_json(&config.to_string()).unwrap();
        assert_eq!(config.max_position_embeddings, 131_072);
        let yarn = config.rope.yarn.unwrap();
        assert_eq!(
            (yarn.factor, yarn.original_max_position_embeddings),
            (4.0, 32768)
        );
        assert!((yarn.attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let cases: &[(&str, Value, &str)] = &[
        ("model_type", json!("llama"), "model_type \"llama\""),
        ("hidden_act", json!("gelu"), "hidden_act \"gelu\""),
        ("use_sliding_window", json!(true), "use_sliding_window"),
        (
            "quantization_config",
            json!({"bits": 4}),
            "quantization_config",
        ),
        ("num_experts", json!(60), "\"num_experts\" (60)"),
        (
            "rope_scaling",
            json!({"type": "dynamic", "factor": 2.0}),
            "\"dynamic\"",
        ),
        ("rope_scaling", json!({"type": "yarn"}), "factor is missing"),
        (
            "rope_scaling",
            json!({"type": "yarn", "factor": 2.0, "low_freq_factor": 1}),
            "low_freq_factor",
        ),
        ("rope_scaling", json!(7), "rope_scaling is 7"),
        ("torch_dtype", json!("int8"), "\"int8\""),
        ("layer_types", json!(["sliding_attention"]), "layer_types"),
    ];
    for (key, value, expected) in cases {
        let message = refused(|c| c[*key] = value.clone());
        assert!(message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn absurd_and_contradictory_values_are_refused_with_the_value() {
    let cases: &[(&str, Value, &str)] = &[
        ("hidden_size", json!(0), "hidden_size is 0"),
        ("hidden_size", json!(-4), "hidden_size is -4"),
        ("hidden_size", json!(1e30), "hidden_size is 1e"),
        ("hidden_size", json!("8192"), "hidden_size is \"8192\""),
        (
            "hidden_size",
            json!(8191),
            "8191 is not a multiple of num_attention_heads 64",
        ),
        (
            "num_key_value_heads",
            json!(7),
            "not a multiple of num_key_value_heads 7",
        ),
        ("head_dim", json!(129), "head_dim 129"),
        ("rms_norm_eps", json!(0), "rms_norm_eps 0"),
        ("rope_theta", json!(1), "rope_theta 1"),
        ("eos_token_id", json!(999_999), "eos_token_id 999999"),
        ("eos_token_id", json!([1, "x"]), "eos_token_id"),
        (
            "num_hidden_layers",
            json!(16_000_000),
            "num_hidden_layers is 16000000",
        ),
        ("intermediate_size", json!(16_000_000), "parameters"),
        ("vocab_size", json!(null), "vocab_size is missing"),
        (
            "tie_word_embeddings",
            json!("no"),
            "tie_word_embeddings is \"no\"",
        ),
    ];
    for (key, value, expected) in cases {
        let message = refused(|c| c[*key] = value.clone());
        assert!(message.contains(expected), "{key}: {message}");
    }
    assert!(
        ModelConfig::from_json("[1]")
            .unwrap_err()
            .to_string()
            .contains("not a JSON object")
    );
    assert!(
        ModelConfig::from_json("{")
            .unwrap_err()
            .to_string()
            .contains("not valid JSON")
    );
}

#[test]
fn generation_defaults_are_read_and_checked() {
    let g = GenerationConfig::from_json(
        r#"{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
            "eos_token_id": [151645, 151643], "transformers_version": "4.37.0"}"#,
    )
    .unwrap();
    assert_eq!(
        (g.top_k, g.temperature, g.eos_token_ids),
        (Some(20), Some(0.7), vec![151645, 151643])
    );
    let bad = GenerationConfig::from_json(r#"{"top_p": 1.5}"#)
        .unwrap_err()
        .to_string();
    assert!(bad.contains("top_p is 1.5"), "{bad}");
}

#[test]
fn a_missing_folder_and_a_missing_file_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let e = ModelConfig::from_dir(&dir.path().join("nowhere"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("no such model folder"), "{e}");
    let e = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert!(e.contains("config.json: cannot be read"), "{e}");
}
