#!/usr/bin/env python3
"""Time vLLM on GPUs, to stand beside tandem's own figures.

    python3 benches/peer_vllm.py SHAPE [--ranks 2] [--offload-to 5] [--prompt 1024] [--tokens 128] [--eager]

SHAPE is 0.5b, 7b, 32b or 72b, with vLLM's own dummy weights. Batch 1, token ids in and out, no tokenizer. The first token
is a request for one token; a token is the difference to a request for `--tokens` more. `--offload-to` moves what is more
than that many GiB of weights to the host (`cpu_offload_gb`); the KV cache comes on top. `--eager` leaves out compilation
and CUDA graphs, which vLLM needs a minute for. One JSON line: times in seconds, medians of five, after a warm-up.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from peer_shapes import SHAPES, config, prompt, weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Time vLLM on GPUs.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--offload-to", type=float, metavar="GIB")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()

    # vLLM and its workers write their log to stdout, which is this script's one line's.
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # All requests are greedy; vLLM would import its sampler all the same.
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    start = time.perf_counter()
    import torch
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config(args.shape)))
        model = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            tensor_parallel_size=args.ranks,
            max_model_len=args.prompt + args.tokens + 64,
            enable_prefix_caching=False,
            enforce_eager=args.eager,
            cpu_offload_gb=0 if args.offload_to is None else weight_bytes(args.shape) / 2**30 - args.offload_to,
        )
        ready = time.perf_counter() - start
        first, token = measure(vllm, model, args)
    print(
        json.dumps(
            {
                "who": f"vLLM {vllm.__version__}",
                "mode": "gpu" if args.offload_to is None else "offload",
                "shape": args.shape,
                "ranks": args.ranks,
                "prompt": args.prompt,
                "tokens": args.tokens,
                "eager": args.eager,
                "gpu_memory_gib": args.offload_to,
                "device": torch.cuda.get_device_name(),
                "load_s": round(ready, 3),
                "ttft_s": round(first, 5),
                "tpot_s": round(token, 6),
            }
        ),
        file=line,
        flush=True,
    )


def measure(vllm, model, args) -> tuple[float, float]:
    """Seconds to the first token and for each of the following."""
    ids = {"prompt_token_ids": prompt(args.shape, args.prompt)}

    def run(tokens: int) -> float:
        how = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answer = model.generate([ids], how, use_tqdm=False)
        seconds = time.perf_counter() - start
        got = len(answer[0].outputs[0].token_ids)
        if got != tokens:
            sys.exit(f"peer_vllm: {got} tokens instead of {tokens}")
        return seconds

    run(8)
    repeats = 5 if args.offload_to is None else 2
    first = statistics.median(run(1) for _ in range(repeats))
    all_of_them = statistics.median(run(args.tokens + 1) for _ in range(repeats))
    return first, (all_of_them - first) / args.tokens


if __name__ == "__main__":
    main()
