#!/usr/bin/env python3
"""Time Hugging Face transformers on GPUs, to stand beside tandem's own figures.

    python3 benches/peer_gpu.py gpu SHAPE                       one GPU
    torchrun --nproc-per-node 2 benches/peer_gpu.py tp SHAPE    tp_plan="auto", as many GPUs as processes
    python3 benches/peer_gpu.py offload SHAPE --gpu-memory 5    accelerate's offload, GiB of weights on the GPU
    python3 benches/peer_gpu.py make SHAPE                      the checkpoint alone
        [--prompt 1024] [--tokens 128] [--checkpoint DIR]

SHAPE is 0.5b, 7b, 32b or 72b. Its checkpoint, of random weights, is made in DIR (a folder in /dev/shm or /tmp) unless it
is there, serves every mode, and stays. Batch 1: the prompt's forward pass up to its next token, then a plain loop over `forward` with its
KV cache and an argmax, which is `generate` without its bookkeeping. One JSON line: times in seconds, medians, after a
warm-up; `ready_s` is what from_pretrained took.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from peer_shapes import SHAPES, config, prompt, weight_bytes
from safetensors.torch import save_file

ON_GPU = torch.cuda.is_available()
RANK = int(os.environ.get("RANK", "0"))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def room_for(shape: str) -> Path:
    """A folder with room for the checkpoint, in memory if there is one."""
    need = weight_bytes(shape) * 1.02
    for parent in (Path("/dev/shm"), Path("/tmp")):
        if (parent / f"peer-{shape}").exists() or shutil.disk_usage(parent).free > need:
            return parent / f"peer-{shape}"
    sys.exit(f"peer_gpu: no room for {need / 2**30:.0f} GiB in /dev/shm and /tmp: name a folder with --checkpoint")


def file_of(name: str) -> str:
    """A file for each layer, and one for the rest."""
    parts = name.split(".")
    return f"layer-{int(parts[2]):03}.safetensors" if parts[1] == "layers" else "rest.safetensors"


def make_checkpoint(shape: str, folder: Path) -> None:
    """Random weights from the GPU's generator: never more than a layer of them in memory besides the files."""
    if (folder / "config.json").exists():
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**config(shape)), dtype=torch.bfloat16
        )
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        files.setdefault(file_of(name), {})[name] = weight
    for file, weights in files.items():
        for name, weight in weights.items():
            if "norm" in name:
                weights[name] = torch.ones(weight.shape, dtype=torch.bfloat16)
            else:
                device = "cuda" if ON_GPU else "cpu"
                values = torch.randn(weight.shape, dtype=torch.bfloat16, device=device) * 0.02
                weights[name] = values.cpu()
        save_file(weights, folder / file, metadata={"format": "pt"})
        weights.update(dict.fromkeys(weights))
    index = {"metadata": {"total_size": weight_bytes(shape)}}
    index["weight_map"] = {name: file for file, weights in files.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Written last: what is there is whole.
    (folder / "config.json").write_text(json.dumps(config(shape)))


def wait_for(folder: Path) -> None:
    while not (folder / "config.json").exists():
        time.sleep(0.2)


def load(args, folder: Path):
    budget = int((args.gpu_memory or 0) * 2**30)
    where = {
        "gpu": {"device_map": {"": "cuda:0" if ON_GPU else "cpu"}},
        "tp": {"tp_plan": "auto"},
        "offload": {"device_map": "auto", "max_memory": {0: budget, "cpu": 1 << 40}},
    }[args.mode]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **where).eval()
    synchronize()
    return model


def run(model, ids: torch.Tensor, tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each of the following."""
    synchronize()
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    synchronize()
    first = time.perf_counter() - start
    times = []
    for _ in range(tokens):
        start = time.perf_counter()
        out = model(token.to(ids.device), past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronize()
        times.append(time.perf_counter() - start)
    return first, times


@torch.inference_mode()
def measure(model, args) -> tuple[float, float]:
    device = f"cuda:{torch.cuda.current_device()}" if ON_GPU else "cpu"
    ids = torch.tensor([prompt(args.shape, args.prompt)], device=device)
    # Offload takes seconds a token and has nothing to warm up but its first copies.
    slow = args.mode == "offload"
    run(model, ids[:, :16], 1) if slow else run(model, ids, 8)
    runs = [run(model, ids, args.tokens) for _ in range(1 if slow else 3)]
    return statistics.median(first for first, _ in runs), statistics.median(t for _, times in runs for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time transformers on GPUs.")
    parser.add_argument("mode", choices=["gpu", "tp", "offload", "make"])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--gpu-memory", type=float, help="GiB that the weights may take on the GPU, for offload")
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    if (args.mode == "offload") != (args.gpu_memory is not None):
        parser.error("--gpu-memory belongs to the mode offload")
    transformers.utils.logging.disable_progress_bar()
    folder = args.checkpoint or room_for(args.shape)
    if RANK == 0:
        make_checkpoint(args.shape, folder)
    if args.mode == "make":
        return
    wait_for(folder)
    start = time.perf_counter()
    model = load(args, folder)
    ready = time.perf_counter() - start
    first, token = measure(model, args)
    if RANK == 0:
        print(
            json.dumps(
                {
                    "who": f"transformers {transformers.__version__}",
                    "mode": args.mode,
                    "shape": args.shape,
                    "ranks": int(os.environ.get("WORLD_SIZE", "1")),
                    "prompt": args.prompt,
                    "tokens": args.tokens,
                    "gpu_memory_gib": args.gpu_memory,
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if ON_GPU else None,
                    "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
                    "load_s": round(ready, 3),
                    "ttft_s": round(first, 5),
                    "tpot_s": round(token, 6),
                }
            ),
            flush=True,
        )
    if torch.distributed.is_initialized():
        # A process that leaves first would take the others' connections away under them.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
