#!/bin/bash
# Everything that needs a GPU, in one go: the ignored gpu_ tests, the kernels against PyTorch, and the whole program.
#
#   cargo test --release --lib --no-run       (build both anywhere, also on a machine without a GPU)
#   cargo build --release
#   tests/gpu.sh LIBTEST TANDEM [OUT_DIR]     (on the GPU machine, from the repository root)
#
# Needs python3 with torch, cupy and safetensors for the kernels' part. Ends with a line that counts what failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
libtest=$(realpath "${1:?usage: tests/gpu.sh LIBTEST TANDEM [OUT_DIR]}")
tandem=$(realpath "${2:?usage: tests/gpu.sh LIBTEST TANDEM [OUT_DIR]}")
out=${3:-$(mktemp -d)}
failed=0

# part NAME SECONDS COMMAND...: runs it, keeps the whole output, shows its end.
part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { failed=$((failed + 1)) && echo "FAILED: $name ($?)"; }
    tail -n "${lines:-25}" "$out/$name.log" | cut -c1-200
}

# The two functions run in shells of their own, where a time limit can end them.
# shellcheck disable=SC2317
golden() {
    local model
    for model in qwen2-tied qwen2-9heads qwen2-yarn qwen3-tied qwen3-sharded; do
        "$tandem" generate --device cuda --model "tests/golden/models/$model" --json --temperature 0 --max-tokens 32 \
            --prompt 'The harbour was quiet at dawn; 3 boats left it.' 2>/dev/null |
            python3 tests/golden/models/same_tokens.py "tests/golden/models/$model" || return 1
    done
}

# shellcheck disable=SC2317
latency() {
    local shape tokens
    for shape in qwen2.5-0.5b qwen2.5-7b qwen3-8b qwen2.5-32b; do
        for tokens in 1024 4096; do
            "$tandem" generate --device cuda --model "$shape" --weights random --prompt-tokens "$tokens" \
                --max-tokens 129 --ignore-eos --temperature 0 --json 2>/dev/null |
                python3 -c 'import json, sys; t = json.load(sys.stdin)["timings"]
print(*sys.argv[1:], *(f"{k} {v:.5f}" for k, v in t.items()))' "$shape" "prompt $tokens"
        done
    done
}

lines=8 part doctor 30 "$tandem" doctor
lines=40 part gpu_tests 240 "$libtest" gpu_ --ignored --test-threads 1 --nocapture
export tandem
export -f golden latency
part golden 60 bash -c golden
part latency 150 bash -c latency
lines=12 part kernels_check 90 python3 tests/kernels/check.py --device cuda --rounds 4 --real
lines=60 part kernels_bench 150 python3 tests/kernels/bench.py
echo "$failed parts failed; whole logs in $out"
exit $((failed > 0))
