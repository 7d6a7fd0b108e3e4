#!/usr/bin/env python3
"""Time Hugging Face transformers on the CPU, to stand beside tandem's own figures.

    python benches/peer_transformers.py MODEL_DIR [--threads 2]

Decode is a plain loop over `forward` with its KV cache and an argmax, which is `generate` without
its bookkeeping; prefill asks for the last position's logits only, as `generate` does. Prints one
JSON object; times in milliseconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

DECODE_PROMPT = 32
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
REPEATS = 5


def load(model_dir: Path, dtype: torch.dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    return model.eval()


def random_prompt(model, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def decode_ms(model) -> list[float]:
    """Milliseconds of each of DECODE_TOKENS single-token steps after the prompt."""
    out = model(random_prompt(model, DECODE_PROMPT), use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(DECODE_TOKENS):
        start = time.perf_counter()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def prefill_ms(model) -> float:
    """Milliseconds from the prompt to its next token."""
    prompt = random_prompt(model, PREFILL_TOKENS)
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def measure(model_dir: Path, dtype: torch.dtype) -> dict:
    model = load(model_dir, dtype)
    prefill_ms(model), decode_ms(model)  # warm up
    tpot = statistics.median(statistics.median(decode_ms(model)) for _ in range(REPEATS))
    prefill = statistics.median(prefill_ms(model) for _ in range(REPEATS))
    return {
        "decode_tpot_ms": round(tpot, 3),
        "decode_tokens_per_s": round(1e3 / tpot, 2),
        "prefill_ttft_ms": round(prefill, 2),
        "prefill_tokens_per_s": round(PREFILL_TOKENS * 1e3 / prefill, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time transformers on the CPU.")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    report = {
        "model": args.model.name,
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "decode": f"batch 1, prompt {DECODE_PROMPT}, median of {REPEATS} runs of {DECODE_TOKENS} tokens",
        "prefill": f"{PREFILL_TOKENS} tokens, median of {REPEATS}",
        "bf16": measure(args.model, torch.bfloat16),
        "f32": measure(args.model, torch.float32),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
