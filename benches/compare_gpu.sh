#!/bin/bash
# tandem, transformers and vLLM on this machine's GPUs, one after the other in one call, and the ratios.
#
#   benches/compare_gpu.sh TANDEM [VLLM_SITE]
#       [--parts one,two,offload]     one GPU; two GPUs (transformers: tp_plan); one GPU with a budget (accelerate, vLLM's offload)
#       [--shape 7b]                  0.5b, 7b, 32b or 72b, random weights everywhere
#       [--prompt 1024] [--tokens 128] [--budget 5]      (GiB of GPU memory, for the part offload)
#       [--who tandem,transformers,vllm] [--vllm-eager] [--out DIR]
#
# Needs python3 with torch, transformers and accelerate; VLLM_SITE is a folder of Python packages with vLLM (left out: no
# vLLM). tandem runs twice and the second run counts: the first compiles its kernels where they are not cached. Every run
# has a time limit. tandem's time a token is the mean over all of them, transformers' the median, vLLM's the difference of
# two requests. OUT/results.jsonl has every figure, OUT/*.log what the programs said. transformers' checkpoint stays in
# /dev/shm or /tmp, as peer-SHAPE.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh

parts=one,two,offload
who=tandem,transformers,vllm
shape=7b prompt=1024 tokens=128 budget=5 eager='' out=''
places=()
while [[ $# -gt 0 ]]; do
    case $1 in
    --parts | --who | --shape | --prompt | --tokens | --budget | --out)
        [[ $# -ge 2 ]] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --vllm-eager) eager=--eager ;;
    --*) fail "unknown flag $1" ;;
    *) places+=("$1") ;;
    esac
    shift
done
[[ ${#places[@]} -ge 1 && ${#places[@]} -le 2 ]] || fail "usage: benches/compare_gpu.sh TANDEM [VLLM_SITE] (flags: see the script)"
tandem=$(realpath "${places[0]}")
site=${places[1]:+$(realpath "${places[1]}")}
[[ -x $tandem ]] || fail "no program $tandem"
[[ -z $site || -d $site/vllm ]] || fail "no vllm in $site"
out=${out:-$(mktemp -d)}
mkdir -p "$out" && out=$(realpath "$out")
: >"$out/results.jsonl"
# Beside the programs' own choices: NVLink multicast is not to be used on a machine that others share.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# `timeout` passes it on to all that a program started, e.g. vLLM's workers.
running=
trap '[[ -z $running ]] || kill "$running"; exit 143' TERM INT

wanted() { [[ ,$1, == *,$2,* ]]; }

# timed PART NAME SECONDS COMMAND...: keeps the JSON line that COMMAND prints, with the part's name.
timed() {
    local part=$1 name=$2 limit=$3 status=0 start=$SECONDS
    shift 3
    timeout --kill-after=5 "$limit" "$@" >"$out/$part-$name.json" 2>"$out/$part-$name.log" </dev/null &
    running=$!
    wait "$running" || status=$?
    echo "$part, $name: exit status $status after $((SECONDS - start)) s" >&2
    python3 - "$part" "$name" "$status" "$out/$part-$name.json" >>"$out/results.jsonl" <<'PYTHON'
import json, sys
part, name, status, path = sys.argv[1:]
# A line is whole once it is there, however the program ended after it.
found = [json.loads(line) for line in open(path) if line.startswith("{")]
row = found[-1] if found else {}
times = row.get("timings", row)
print(json.dumps({"part": part, "name": name, "who": row.get("who", name), "status": int(status),
                  **{key: times.get(key) for key in ("load_s", "ttft_s", "tpot_s")}, "all": row}))
PYTHON
    [[ $status -eq 0 ]] || grep -E 'Error|error' "$out/$part-$name.log" | tail -n 3 | cut -c1-300 >&2
}

# time_tandem PART FLAGS...
time_tandem() {
    local part=$1 try
    shift
    wanted "$who" tandem || return 0
    for try in warm-up timed; do
        timed "$part" tandem 90 "$tandem" generate --device cuda --model "qwen2.5-$shape" --weights random \
            --prompt-tokens "$prompt" --max-tokens "$((tokens + 1))" --ignore-eos --temperature 0 --json "$@"
        [[ $try == timed ]] || sed -i '$d' "$out/results.jsonl"
    done
}

time_transformers() {
    local part=$1
    shift
    if wanted "$who" transformers; then timed "$part" transformers 120 "$@"; fi
}

time_vllm() {
    local part=$1
    shift
    [[ -n $site ]] && wanted "$who" vllm || return 0
    timed "$part" vllm 150 env PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
        VLLM_NO_USAGE_STATS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0 VLLM_CACHE_ROOT="$out/vllm-cache" \
        python3 benches/peer_vllm.py "$shape" --prompt "$prompt" --tokens "$tokens" $eager "$@"
}

# The table of what there is, also when a time limit ends this script.
# shellcheck disable=SC2317 # called by the trap
table() {
    local card
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
    python3 - "$out/results.jsonl" "$shape" "$prompt" "$budget" "${card:-no GPU}" <<'PYTHON' | tee "$out/table.txt"
import json, sys
path, shape, prompt, budget, card = sys.argv[1:]
rows = [json.loads(line) for line in open(path)]
title = {"one": "one GPU", "two": "two GPUs", "offload": f"one GPU, {budget} GiB"}
print(f"Qwen2.5-{shape.upper()}, random weights, batch 1, prompt {prompt}, on {card}")
print(f"{'':18}{'':22}{'ready':>9}{'first token':>13}{'a token':>12}{'tokens/s':>10}  tandem is")
for part, heading in title.items():
    ours = next((r for r in rows if r["part"] == part and r["name"] == "tandem" and r["tpot_s"]), None)
    for r in (r for r in rows if r["part"] == part):
        if r["tpot_s"] is None:
            print(f"{heading:18}{r['who']:22} no figure (exit status {r['status']})")
            continue
        ratio = "" if ours is None or r is ours else (
            f"  {r['tpot_s'] / ours['tpot_s']:.2f} times as fast a token, {r['ttft_s'] / ours['ttft_s']:.2f} to the first")
        print(f"{heading:18}{r['who']:22}{r['load_s']:7.1f} s{r['ttft_s'] * 1e3:10.1f} ms{r['tpot_s'] * 1e3:9.2f} ms"
              f"{1 / r['tpot_s']:10.1f}{ratio}")
PYTHON
    echo "all of it in $out"
}
trap table EXIT

peer=(benches/peer_gpu.py)
if wanted "$who" transformers; then
    timeout 300 python3 "${peer[@]}" make "$shape" || fail "no checkpoint for transformers"
fi
many=(--prompt "$prompt" --tokens "$tokens")
# A token of transformers' offload takes seconds.
few=(--prompt "$prompt" --tokens 8)
if wanted "$parts" one; then
    time_tandem one
    time_transformers one env CUDA_VISIBLE_DEVICES=0 python3 "${peer[@]}" gpu "$shape" "${many[@]}"
    time_vllm one
fi
if wanted "$parts" two; then
    time_tandem two --ranks 2
    time_transformers two python3 -m torch.distributed.run --standalone --nproc-per-node 2 "${peer[@]}" tp "$shape" "${many[@]}"
    time_vllm two --ranks 2
fi
if wanted "$parts" offload; then
    time_tandem offload --gpu-memory "${budget}GiB"
    time_transformers offload env CUDA_VISIBLE_DEVICES=0 python3 "${peer[@]}" offload "$shape" --gpu-memory "$budget" "${few[@]}"
    time_vllm offload --offload-to "$budget"
fi
! grep -q '"tpot_s": null' "$out/results.jsonl"
