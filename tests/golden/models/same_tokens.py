"""Compares an answer in bf16 (JSON on stdin) with a model's greedy continuation in float32: equal until a close call.

    tandem generate … --json | python3 same_tokens.py MODEL_DIR
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

# Logits of these models are a few units wide; bf16 moves them by up to a hundredth of that.
CLOSE = 0.05

model = Path(sys.argv[1])
golden = load_file(model / "golden.safetensors")
ids = json.load(sys.stdin)["token_ids"]
want, gap = golden["short.greedy"].tolist(), golden["short.gap"]
differs = next((i for i, (a, b) in enumerate(zip(ids, want)) if a != b), None)
if differs is None and len(ids) == len(want):
    print(f"{model.name}: all {len(want)} tokens equal")
elif differs is not None and gap[differs] < CLOSE:
    print(f"{model.name}: equal up to token {differs}, where the top two logits are {gap[differs]:.4f} apart")
else:
    sys.exit(f"{model.name}: token {differs} differs, {len(ids)} tokens for {len(want)}")
