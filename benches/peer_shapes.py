"""The published Qwen2.5 shapes that the peers are timed on, as transformers' and vLLM's config.json."""

# name: hidden size, intermediate size, layers, query heads, key/value heads, vocabulary, tied embeddings
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
    # Tries the scripts on a machine without a GPU.
    "tiny": (64, 128, 2, 4, 2, 1024, False),
}


def config(shape: str) -> dict:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def weight_bytes(shape: str) -> int:
    """Bytes of all weights in bfloat16."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    kv = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate + 3 * hidden + 2 * kv
    return 2 * (layers * layer + (1 if tied else 2) * vocabulary * hidden + hidden)


def prompt(shape: str, length: int) -> list[int]:
    """Token ids that any peer may be asked to continue."""
    return [i * 7919 % min(SHAPES[shape][5], 150000) for i in range(length)]
