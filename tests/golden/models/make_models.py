#!/usr/bin/env python3
"""Make the tiny random models of this folder and what transformers computes from them.

    pip install torch transformers
    python tests/golden/models/make_models.py [CASE ...]

Every case becomes a folder as Hugging Face saves it, plus `golden.safetensors`, made from the
saved files themselves: loaded as float32, eager attention, one sequence at a time. For each of
two prompts (`short`, `long`: six 16-token KV blocks) that file holds

    <prompt>.ids        i64 [T]      the prompt; its text is in the metadata
    <prompt>.logits     f32 [T, V]   logits at every position of the prompt
    <prompt>.greedy     i64 [32]     continuation by `generate(do_sample=False)`, which applies the
                                     repetition penalty of generation_config.json; end tokens do
                                     not occur in it; padding rows of the vocabulary are suppressed
    <prompt>.logprobs   f32 [32]     log-softmax of the raw logits (no penalty) at those ids, over
                                     the tokens that exist (padding rows left out)
    <prompt>.gap        f32 [32]     how far the winner was ahead of the runner-up, in logits

Configs are written in the style of transformers 4 where `legacy` is set, as Qwen's own downloads
have it, and otherwise as transformers 5 saves them.
"""

import argparse
import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

HERE = Path(__file__).parent
GREEDY_TOKENS = 32
# A continuation with a closer call than this could turn on rounding alone: the seeds were chosen for
# wider gaps, and for continuations of 16 different tokens or more.
MIN_GAP = 2e-3

SHORT = "The harbour was quiet at dawn; 3 boats left it."
LONG = (
    "There was once a lighthouse that counted the ships: one, two, three. When the fog came in, "
    "nobody could see it, so it learned to sing."
)
# Enough merges that words are not all single bytes; `Ġ` is the byte-level alphabet's space.
MERGES = (
    "Ġ t|h e|Ġ a|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|o u|Ġ c|n d|Ġ b|e n|Ġ o|i t|i s|o r|e s|Ġ f|"
    "a n|in g|Ġ i|Ġa nd|Ġ m|a l|Ġ p|e d|l l|Ġ n|Ġt o|Ġ l|o t|a s|Ġ h|Ġ g|l e|t s|a r"
).split("|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
N_TOKENS = 256 + len(MERGES) + len(SPECIAL)
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass
class Case:
    """One model: what is particular about it, over the defaults of `shape`."""

    name: str
    seed: int
    family: type = Qwen2Config
    legacy: bool = False
    dtype: torch.dtype = torch.bfloat16
    max_shard_size: str = "1GB"
    repetition_penalty: float = 1.0
    config: dict = field(default_factory=dict)

    def shape(self) -> dict:
        shape = {
            "vocab_size": N_TOKENS,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": N_TOKENS - 3,
            "eos_token_id": N_TOKENS - 1,
        }
        return copy.deepcopy(shape | self.config)  # transformers adds keys to what it is given


CASES = [
    Case("qwen2-tied", seed=74, legacy=True),
    Case(
        "qwen2-untied",
        seed=30,
        config={
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    # Qwen2.5-0.5B's heads; 20 rows of vocabulary past the tokenizer's last token.
    Case(
        "qwen2-14heads-padded",
        seed=71,
        legacy=True,
        config={
            "vocab_size": N_TOKENS + 20,
            "hidden_size": 112,
            "intermediate_size": 112,
            "num_attention_heads": 14,
        },
    ),
    Case(
        "qwen2-9heads",
        seed=75,
        config={"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    # 231 × 2: Qwen2.5-72B's 29568 = 231 × 128 in small. One KV head for all ranks.
    Case(
        "qwen2-462wide",
        seed=30,
        legacy=True,
        config={"intermediate_size": 462, "num_key_value_heads": 1},
    ),
    Case("qwen2-f16", seed=103, legacy=True, dtype=torch.float16),
    Case("qwen2-f32", seed=103, dtype=torch.float32),
    Case("qwen2-penalty", seed=6, repetition_penalty=1.1),
    # Positions reach past the original length, as Qwen2.5's model card switches YaRN on.
    Case(
        "qwen2-yarn",
        seed=38,
        legacy=True,
        config={
            "hidden_size": 64,
            "max_position_embeddings": 32,
            "rope_parameters": {
                "type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    Case("qwen3-tied", seed=5, family=Qwen3Config, legacy=True, config={"head_dim": 32}),
    Case(
        "qwen3-sharded",
        seed=6,
        family=Qwen3Config,
        max_shard_size="100KB",
        config={"head_dim": 24, "num_attention_heads": 6, "tie_word_embeddings": False},
    ),
    # YaRN as Qwen3's model card writes it.
    Case(
        "qwen3-yarn",
        seed=3,
        family=Qwen3Config,
        legacy=True,
        config={
            "head_dim": 32,
            "max_position_embeddings": 160,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 40,
            },
        },
    ),
]


def byte_alphabet() -> list[str]:
    """One printable character a byte, in the order of the byte values (GPT-2's alphabet)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def tokenizer_json() -> dict:
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(tokens) + i, "content": token} | flags for i, token in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": MERGES,
        },
    }


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def random_weights(model, case: Case) -> None:
    """Weights at which every part counts: attention is peaked, biases and norms are not trivial."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(shape, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    for name, weight in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and case.shape()["tie_word_embeddings"]:
            continue
        if "norm" in name:
            weight.copy_(normal(weight.shape, 0.2, mean=1.0))
        elif name.endswith("bias"):
            weight.copy_(normal(weight.shape, 0.5))
        elif "embed_tokens" in name or "lm_head" in name:
            weight.copy_(normal(weight.shape, 2.5 * weight.shape[1] ** -0.5))
            weight[N_TOKENS:] *= 3.0  # padding rows that would win if they were let
        else:
            # What the layers add outweighs the token's own embedding, or greedy would echo it.
            gain = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.2
            weight.copy_(normal(weight.shape, gain * weight.shape[1] ** -0.5))


def legacy_config(saved: dict, case: Case) -> dict:
    """The same config in the keys that transformers 4 wrote."""
    config = {k: v for k, v in saved.items() if k not in ("dtype", "layer_types", "rope_parameters")}
    rope = dict(case.shape()["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    scaled = rope.get("type", rope.get("rope_type")) != "default"
    if scaled or case.family is Qwen3Config:
        config["rope_scaling"] = rope if scaled else None
    config["sliding_window"] = config["max_position_embeddings"]
    config["max_window_layers"] = config["num_hidden_layers"]
    config["torch_dtype"] = saved["dtype"]
    config["transformers_version"] = "4.51.0"
    return dict(sorted(config.items()))


def generation_config(case: Case) -> dict:
    config = {
        "bos_token_id": N_TOKENS - 3,
        "do_sample": True,
        "eos_token_id": [N_TOKENS - 1, N_TOKENS - 3],
        "pad_token_id": N_TOKENS - 3,
        "repetition_penalty": case.repetition_penalty,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.51.0",
    }
    if case.repetition_penalty == 1.0:
        del config["repetition_penalty"]
    return config


def write_model(case: Case, folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(case.family(**case.shape()))
    random_weights(model, case)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    if case.legacy:
        saved = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", legacy_config(saved, case))
    write_json(folder / "generation_config.json", generation_config(case))
    write_json(folder / "tokenizer.json", tokenizer_json(), indent=None)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[0],
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )


def greedy(model, ids: torch.Tensor, penalty: float) -> dict[str, torch.Tensor]:
    sequence = model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        do_sample=False,
        min_new_tokens=0,
        max_new_tokens=GREEDY_TOKENS,
        suppress_tokens=list(range(N_TOKENS, model.config.vocab_size)) or None,
    )[0]
    tokens = sequence[len(ids) :]
    assert len(tokens) == GREEDY_TOKENS, f"ended after {len(tokens)} tokens; choose another seed"
    # One pass over the whole sequence: the logits that stood before each generated token.
    logits = model(sequence[None]).logits[0, len(ids) - 1 : -1, :N_TOKENS]
    gaps = []
    for step, row in enumerate(logits.clone()):
        seen = sequence[: len(ids) + step].unique()
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        best = row.topk(2)
        assert best.indices[0] == tokens[step], "generate and forward disagree"
        gaps.append(best.values[0] - best.values[1])
    gap = torch.stack(gaps)
    assert gap.min() > MIN_GAP, f"a gap of {gap.min():.2e}; choose another seed"
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return {"greedy": tokens, "logprobs": logprobs, "gap": gap}


def write_golden(case: Case, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tensors = {}
    for prompt, text in {"short": SHORT, "long": LONG}.items():
        ids = torch.tensor(tokenizer(text).input_ids)
        tensors[f"{prompt}.ids"] = ids
        tensors[f"{prompt}.logits"] = model(ids[None]).logits[0].clone()
        for name, value in greedy(model, ids, case.repetition_penalty).items():
            tensors[f"{prompt}.{name}"] = value
    made_by = f"torch {torch.__version__}, transformers {transformers.__version__}"
    metadata = {"short": SHORT, "long": LONG, "made_by": made_by}
    save_file(tensors, folder / "golden.safetensors", metadata=metadata)
    lengths = [len(tensors[f"{prompt}.ids"]) for prompt in ("short", "long")]
    gap = min(float(tensors[f"{prompt}.gap"].min()) for prompt in ("short", "long"))
    n_distinct = len(tensors["long.greedy"].unique())
    print(f"{case.name}: prompts {lengths}, {n_distinct} distinct tokens, smallest gap {gap:.4f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny golden models.")
    parser.add_argument("case", nargs="*", help="cases to make (default: all)")
    wanted = parser.parse_args().case
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        folder = HERE / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_model(case, folder)
        write_golden(case, folder)


if __name__ == "__main__":
    main()
