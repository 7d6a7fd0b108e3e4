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
        ("is_causal", json!(false), "\"is_causal\" (false)"),
        ("mlp_bias", json!(true), "\"mlp_bias\" (true)"),
        ("logit_scale", json!(0.5), "\"logit_scale\" (0.5)"),
        (
            "final_logit_softcapping",
            json!(30.0),
            "final_logit_softcapping",
        ),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        ("per_layer_config", json!({"0": {}}), "per_layer_config"),
        ("text_config", json!({"hidden_size": 1}), "text_config"),
        (
            "transformers_weights",
            json!("other.safetensors"),
            "transformers_weights",
        ),
        ("attention_chunk_size", json!(64), "attention_chunk_size"),
        ("pruned_heads", json!({"0": [1]}), "pruned_heads"),
        ("use_qk_norm", json!(true), "use_qk_norm"),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "default", "mrope_section": [8, 12, 12]}),
            "mrope_section",
        ),
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
fn what_no_forward_pass_reads_changes_nothing() {
    let plain = ModelConfig::from_json(&qwen25().to_string()).unwrap();
    let cases: &[(&str, Value, &[&str])] = &[
        ("attention_bias", json!(true), &[]),
        ("tokenizer_class", json!("Qwen2Tokenizer"), &[]),
        ("pruned_heads", json!({}), &[]),
        ("mlp_only_layers", json!([]), &[]),
        ("use_flash_attention", json!(true), &["use_flash_attention"]),
        ("model_name", json!("unsloth/Qwen2.5-7B"), &[]),
        ("temperature", json!(0.7), &[]),
        ("suppress_tokens", json!([1]), &[]),
        ("is_causal", json!(true), &[]),
        ("task_specific_params", json!({"a": 1}), &[]),
        ("attn_pdrop", json!(0.1), &["attn_pdrop"]),
        ("max_grad_norm", json!(1.0), &["max_grad_norm"]),
        ("lora_r", json!(16), &["lora_r"]),
        ("training_args", json!({"layers": 1}), &["training_args"]),
        ("wandb_run", json!("x"), &["wandb_run"]),
        ("quantization_config", json!(null), &[]),
        ("hidden_act", json!("swish"), &[]),
        ("mlp_bias", json!(false), &[]),
        ("partial_rotary_factor", json!(1.0), &[]),
        ("rope_scaling", json!({"type": "default"}), &[]),
        ("rope_scaling", json!({}), &[]),
        (
            "rope_parameters",
            json!({"rope_type": "default", "rope_theta": 1e6}),
            &[],
        ),
        ("transformers_weights", json!("model.safetensors"), &[]),
    ];
    for (key, value, unknown) in cases {
        let mut config = qwen25();
        config[*key] = value.clone();
        let (config, names) = ModelConfig::parse(&config.to_string()).unwrap();
        assert_eq!(config, plain, "{key}");
        assert_eq!(names, *unknown, "{key}");
    }
    let mut qwen3 = qwen25();
    qwen3["model_type"] = json!("qwen3");
    qwen3["attention_bias"] = json!(true);
    let e = ModelConfig::from_json(&qwen3.to_string()).unwrap_err();
    assert!(e.to_string().contains("\"attention_bias\" (true)"), "{e}");
}

#[test]
fn a_window_of_no_layer_or_of_all_tokens_is_none() {
    let outcome = |first: usize, window: Value, types: Value| {
        let mut config = qwen25();
        config["use_sliding_window"] = json!(true);
        config["max_window_layers"] = json!(first);
        config["sliding_window"] = window;
        config["layer_types"] = types;
        ModelConfig::from_json(&config.to_string()).map_err(|e| e.to_string())
    };
    let plain = ModelConfig::from_json(&qwen25().to_string());
    let both = || json!(["full_attention", "sliding_attention"]);
    assert_eq!(
        outcome(80, json!(4096), json!(null)).ok(),
        plain.clone().ok()
    );
    assert_eq!(
        outcome(0, json!(32768), json!(null)).ok(),
        plain.clone().ok()
    );
    assert_eq!(
        outcome(0, json!(null), json!(null)).ok(),
        plain.clone().ok()
    );
    assert_eq!(outcome(0, json!(32768), both()).ok(), plain.clone().ok());
    assert_eq!(
        outcome(0, json!(4096), json!(["full_attention"])).ok(),
        plain.ok()
    );
    for refused in [
        outcome(79, json!(32767), json!(null)),
        outcome(80, json!(4096), both()),
        outcome(
            80,
            json!(32768),
            json!(["full_attention", "linear_attention"]),
        ),
    ] {
        let e = refused.unwrap_err();
        assert!(
            e.contains("sliding_window") || e.contains("layer_types"),
            "{e}"
        );
    }
}

#[test]
fn two_spellings_of_the_rope_must_say_the_same() {
    let yarn =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192});
    let mut with_more = yarn.clone();
    with_more["attn_factor"] = json!(0.878);
    with_more["finetuned"] = json!(true);
    let read = |scaling: &Value, parameters: &Value| {
        let mut config = qwen25();
        config["rope_scaling"] = scaling.clone();
        config["rope_parameters"] = parameters.clone();
        ModelConfig::from_json(&config.to_string()).map_err(|e| e.to_string())
    };
    let alone = read(&yarn, &json!(null)).unwrap();
    // Of other programs; transformers does not read it.
    assert_eq!(read(&with_more, &json!(null)).unwrap(), alone);
    assert_eq!(read(&yarn, &with_more).unwrap(), alone);
    let e = read(&yarn, &json!({"rope_type": "default"})).unwrap_err();
    assert!(e.contains("contradict"), "{e}");
    let other_theta = json!({"rope_type": "default", "rope_theta": 5e5});
    let e = read(&json!({"type": "default"}), &other_theta).unwrap_err();
    assert!(e.contains("contradict"), "{e}");
}

#[test]
fn numbers_that_single_precision_does_not_hold_are_refused_by_name() {
    let yarn = |key: &str, value: Value| {
        let mut yarn = json!({"rope_type": "yarn", "factor": 4.0});
        yarn[key] = value;
        yarn
    };
    for (key, value) in [
        ("attention_factor", json!(1e300)),
        ("attention_factor", json!(1e30)),
        ("attention_factor", json!(1e-30)),
        ("attention_factor", json!(-1)),
        ("factor", json!(1e300)),
        ("factor", json!(0)),
        ("beta_fast", json!(1e300)),
        ("beta_slow", json!(-1e-3)),
        ("beta_slow", json!(64)),
        ("mscale", json!(1e300)),
        ("original_max_position_embeddings", json!(1e300)),
        ("original_max_position_embeddings", json!(0)),
    ] {
        let message = refused(|c| c["rope_scaling"] = yarn(key, value.clone()));
        assert!(message.contains(key), "{key}: {message}");
    }
    for value in [json!(1e300), json!(1e30), json!(0), json!(-5)] {
        let message = refused(|c| c["rope_theta"] = value);
        assert!(message.contains("rope_theta"), "{message}");
    }
    for value in [json!(1e-60), json!(1e60), json!(-1e-6)] {
        let message = refused(|c| c["rms_norm_eps"] = value);
        assert!(message.contains("rms_norm_eps"), "{message}");
    }
    let derived = refused(|c| {
        c["rope_scaling"] =
            json!({"rope_type": "yarn", "factor": 4.0, "mscale": -8.0, "mscale_all_dim": 1.0})
    });
    assert!(derived.contains("attention_factor"), "{derived}");
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
fn keys_that_are_not_applied_are_named_unless_they_change_nothing() {
    let names = |text: &str| -> Vec<(&str, bool)> {
        let g = GenerationConfig::from_json(text).unwrap();
        g.unapplied.iter().map(|u| (u.key, u.drawn_only)).collect()
    };
    let neutral = r#"{"num_beams": 1, "no_repeat_ngram_size": 0, "guidance_scale": null, "renormalize_logits": false,
        "typical_p": 1.0, "epsilon_cutoff": 0.0, "encoder_repetition_penalty": 1, "sequence_bias": [], "length_penalty": 2.0,
        "use_cache": false, "pad_token_id": 3, "token_healing": false, "bad_words_ids": null, "presence_penalty": 1.5,
        "cache_implementation": "hybrid", "penalty_alpha": 0.0, "num_return_sequences": 1, "no_such_key": 1}"#;
    assert_eq!(names(neutral), []);
    let acting = r#"{"num_beams": 4, "guidance_scale": 1.5, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "top_h": 0.4,
        "forced_eos_token_id": 0, "stop_strings": "x", "sequence_bias": [[[1], 2.0]], "exponential_decay_length_penalty": [1, 2.0]}"#;
    let want = [
        ("epsilon_cutoff", true),
        ("exponential_decay_length_penalty", false),
        ("forced_eos_token_id", false),
        ("guidance_scale", false),
        ("num_beams", false),
        ("sequence_bias", false),
        ("stop_strings", false),
        ("top_h", true),
        ("typical_p", true),
    ];
    assert_eq!(names(acting), want);
    let g = GenerationConfig::from_json(
        r#"{"suppress_tokens": [5, 6], "bad_words_ids": [[1, 2], [], [3]], "no_repeat_ngram_size": 2, "min_new_tokens": 4}"#,
    )
    .unwrap();
    assert_eq!(
        (g.suppress_tokens, g.no_repeat_ngram_size, g.min_new_tokens),
        (vec![5, 6], 2, 4)
    );
    assert_eq!(g.bad_words_ids, [vec![1, 2], vec![3]]);
}

#[test]
fn without_a_generation_config_the_model_says_where_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let stops = || {
        GenerationConfig::from_dir(dir.path())
            .unwrap()
            .eos_token_ids
    };
    assert_eq!(stops(), [0u32; 0]);
    for (eos, want) in [
        ("2", vec![2]),
        ("[2, 0]", vec![2, 0]),
        ("[-1, 2]", vec![2]),
        ("null", vec![]),
    ] {
        put(
            "config.json",
            &format!(
                r#"{{"eos_token_id": {eos}, "do_sample": true, "temperature": 0.7, "min_new_tokens": 3}}"#
            ),
        );
        assert_eq!(stops(), want);
    }
    // Sampling keys of a config.json are passed over, as transformers does since version 5.
    let g = GenerationConfig::from_dir(dir.path()).unwrap();
    assert_eq!(
        (g.do_sample, g.temperature, g.min_new_tokens),
        (None, None, 3)
    );
    // A file that is there and does not say where to stop is obeyed.
    put("config.json", r#"{"eos_token_id": 2}"#);
    put("generation_config.json", r#"{"eos_token_id": null}"#);
    assert_eq!(stops(), [0u32; 0]);
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
