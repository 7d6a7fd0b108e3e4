#!/usr/bin/env python3
"""Make `sampling.json`: the probabilities that transformers would draw the next token from.

    pip install torch transformers
    python tests/golden/make_sampling.py

Each case holds a row of float32 logits, the ids so far, the settings (absent: off), and the
probabilities after every logits processor that `generate(do_sample=True)` builds from these
settings, in the order in which it builds them. No row has exact ties: their order
would be an accident of the sort.
"""

import json
import random
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

VOCAB = 48
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},  # Qwen2.5
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.08, "repetition_penalty": 1.2},
    {"temperature": 0.05, "top_p": 0.95},
]
ROWS_EACH = 3


def probabilities(model, logits: torch.Tensor, history: list[int], settings: dict) -> torch.Tensor:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(do_sample=True, **(off | settings))
    # What `generate` itself calls: the order of the processors is transformers' own.
    processors = model._get_logits_processor(config, input_ids_seq_length=len(history))
    scores = processors(torch.tensor([history]), logits[None])
    return scores.softmax(-1)[0]


@torch.inference_mode()
def main() -> None:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    generator = torch.Generator().manual_seed(1)
    choice = random.Random(1)
    cases = []
    for settings in SETTINGS:
        for row in range(ROWS_EACH):
            # From nearly flat to nearly certain.
            logits = torch.randn(VOCAB, generator=generator) * (0.5, 2.0, 6.0)[row]
            assert len(logits.unique()) == VOCAB
            history = [choice.randrange(VOCAB) for _ in range(12)]
            cases.append(
                {
                    "settings": settings,
                    "history": history,
                    "logits": logits.tolist(),
                    "probabilities": probabilities(model, logits, history, settings).tolist(),
                }
            )
    made_by = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = ",\n".join("    " + json.dumps(case) for case in cases)
    text = f'{{\n  "made_by": {json.dumps(made_by)},\n  "cases": [\n{lines}\n  ]\n}}\n'
    Path(__file__).with_name("sampling.json").write_text(text)
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
