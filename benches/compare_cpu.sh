#!/bin/bash
# tandem and transformers on this machine's CPU, one after the other, and the ratios.
#
#   python3 -m venv /tmp/peer && /tmp/peer/bin/pip install torch transformers
#   PYTHON=/tmp/peer/bin/python benches/compare_cpu.sh models/smollm2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=$(realpath "${1:?usage: benches/compare_cpu.sh MODEL_DIR}")
ours=$(mktemp) theirs=$(mktemp)
trap 'rm -f "$ours" "$theirs"' EXIT
cargo bench --quiet --bench cpu_model -- "$model" >"$ours"
"${PYTHON:-python3}" benches/peer_transformers.py "$model" >"$theirs"
"${PYTHON:-python3}" - "$ours" "$theirs" <<'EOF'
import json, sys
us, them = (json.load(open(path)) for path in sys.argv[1:3])
bf16, f32 = them["bf16"], them["f32"]
print(f"decode   {us['decode_tpot_ms']:.2f} ms a token, {us['decode_gbs']:.1f} GB/s: "
      f"{us['decode_of_read_bandwidth']:.0%} of the {us['read_gbs']:.1f} GB/s that this memory reads; "
      f"transformers bf16 {bf16['decode_tpot_ms']:.2f} ms: {bf16['decode_tpot_ms'] / us['decode_tpot_ms']:.2f} times")
print(f"prefill  512 tokens in {us['prefill_ttft_ms']:.0f} ms, {us['prefill_gflops']:.0f} GFLOP/s: "
      f"{us['prefill_of_fma_rate']:.0%} of {us['fma_gflops']:.0f}; transformers float32 "
      f"{f32['prefill_ttft_ms']:.0f} ms: {f32['prefill_ttft_ms'] / us['prefill_ttft_ms']:.2f} times, "
      f"bf16 {bf16['prefill_ttft_ms']:.0f} ms")
EOF
