"""Writes the golden checkpoints in this folder with PyTorch, safetensors and huggingface_hub.

single/   one model.safetensors; sharded/ the same tensors as several files with their index.
expected.json: dtype, shape and the float32 values of every tensor, as PyTorch converts them.

    python generate.py        (torch 2.x, safetensors, huggingface_hub; reproducible)
"""

import json
import math
import pathlib

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent

torch.manual_seed(0)
special = [0.0, -0.0, math.inf, -math.inf, 1e-7, 6.1e-5, 65504.0, -1.0]
tensors = {
    "model.embed_tokens.weight": torch.randn(24, 16).to(torch.bfloat16),
    "model.layers.0.mlp.down_proj.weight": torch.randn(16, 40).to(torch.float16),
    "model.layers.0.mlp.up_proj.weight": torch.randn(40, 16),
    "model.norm.weight": torch.ones(16, dtype=torch.bfloat16),
    "special.bf16": torch.tensor(special, dtype=torch.bfloat16),
    "special.f16": torch.tensor(special, dtype=torch.float16),
    "special.f32": torch.tensor(special, dtype=torch.float32),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "unicode.\u91cd\u307f \U0001f980": torch.randn(3, 5),
    "position_ids": torch.arange(6, dtype=torch.int64).reshape(1, 6),
}

for folder in ("single", "sharded"):
    (HERE / folder).mkdir(exist_ok=True)
save_file(tensors, HERE / "single" / "model.safetensors", metadata={"format": "pt"})
save_torch_state_dict(tensors, HERE / "sharded", max_shard_size=1500)

names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
expected = {
    name: {
        "dtype": names[t.dtype],
        "shape": list(t.shape),
        # As bit patterns, because JSON has no infinities.
        "f32_bits": (t.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF).flatten().tolist(),
    }
    for name, t in tensors.items()
}
(HERE / "expected.json").write_text(json.dumps(expected, indent=None, separators=(",", ":")) + "\n")
