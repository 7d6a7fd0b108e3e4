#!/bin/bash
# Everything that needs a GPU, in one go; on two GPUs the whole of it takes about a quarter of an hour.
#
#   cargo test --release --lib --no-run       (build both anywhere, also on a machine without a GPU)
#   cargo build --release
#   tests/gpu.sh [OPTIONS] LIBTEST TANDEM [OUT_DIR]
#
#   --parts a,b      these parts alone, in this order
#   --seconds S      begin no part that S (540) leave no time for; what was not run comes last, as a command
#   --smollm2 DIR    the demo model: for slurm, and for the golden prompts in numerics
#   --debs DIR       Slurm's packages, where it is not installed: see gpu_slurm.sh
#   --mpi TANDEM     built with the feature `mpi`, for slurm: see gpu_slurm.sh
#
# The parts, and what each needs besides a GPU (two of them where the name says 2, and in golden, faults and slurm):
#
#   doctor         what `tandem doctor --measure` finds
#   golden         golden models' tokens on 1 and 2 ranks            python3 with safetensors
#   gpu_tests      LIBTEST's ignored gpu_ tests
#   scaling        qwen2.5-7b on 1 and 2 GPUs, three contexts
#   latency2       qwen2.5-72b on 2 GPUs                             73 GiB free on each
#   compare        split, offloaded, both                            16 GiB of host memory
#   numerics       logits beside transformers'                       python3 with torch, transformers, safetensors
#   offloaded      the same under budgets                            as numerics
#   faults         what must fail cleanly; tokens; device memory     root
#   slurm          jobs and mpirun                                   root, --smollm2; Slurm or --debs
#   kernels_check  every kernel against torch                        python3 with torch
#   memcheck       kernels, a resident and an offloaded run          compute-sanitizer (COMPUTE_SANITIZER names another)
#   racecheck      kernels                                           the same
#   kernels_bench  every kernel's time beside its limit              python3 with torch
#   many           4 and 8 GPUs: scaling of 7B, 32B and 72B in batches of 1, 8 and 64, logits on 3, 4 and 8 ranks, 72B in
#                  20 GiB of each of 4; not among the parts that run unasked; give it --seconds 2000
#
# The end of each part is shown, the whole is in OUT_DIR/PART.log. Exit status 1 when a part fails.
# shellcheck disable=SC2317,SC2329 # the parts are called by name
set -uo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$self")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh

parts=doctor,golden,gpu_tests,scaling,latency2,compare,numerics,offloaded,faults,slurm,kernels_check,memcheck,racecheck,kernels_bench
total=540 smollm2='' debs='' mpi='' given=()
usage="usage: tests/gpu.sh [--parts a,b] [--seconds S] [--smollm2 DIR] [--debs DIR] [--mpi TANDEM] LIBTEST TANDEM [OUT_DIR]"
while [[ ${1:-} == --* ]]; do
    [[ $# -ge 2 ]] || fail "$usage"
    case $1 in
        --parts) parts=$2 ;;
        --seconds) total=$2 ;;
        --smollm2) smollm2=$(realpath "$2") ;;
        --debs) debs=$(realpath "$2") ;;
        --mpi) mpi=$(realpath "$2") ;;
        *) fail "$usage" ;;
    esac
    [[ $1 == --parts || $1 == --seconds ]] || given+=("$1" "$(realpath "$2")")
    shift 2
done
[[ $# -eq 2 || $# -eq 3 ]] || fail "$usage"
libtest=$(realpath "$1")
tandem=$(realpath "$2")
mkdir -p "${3:=$(mktemp -d)}"
out=$(realpath "$3")
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
device=${TANDEM_TEST_DEVICE:-cuda} # cpu tries the parts that need no GPU
random=("$tandem" generate --device "$device" --weights random --temperature 0 --ignore-eos)

# Seconds a part may take, and lines of its end that are shown.
declare -A limit=(
    [doctor]=40 [golden]=75 [gpu_tests]=150 [scaling]=120 [latency2]=150 [compare]=120 [numerics]=290 [offloaded]=120
    [faults]=200 [slurm]=150 [kernels_check]=100 [memcheck]=150 [racecheck]=120 [kernels_bench]=200 [many]=2000
)
declare -A lines=([doctor]=40 [golden]=24 [numerics]=130 [faults]=40 [kernels_check]=40 [kernels_bench]=80 [many]=150)

doctor() { "$tandem" doctor --measure; }
gpu_tests() { "$libtest" gpu_ --ignored --test-threads 1 --nocapture; }
faults() { tests/gpu_faults.sh "$tandem" "$out/faults"; }
kernels_check() { python3 tests/kernels/check.py --device cuda --rounds 4 --real; }
kernels_bench() { python3 tests/kernels/bench.py; }

# One line for each model and number of ranks.
golden() {
    local model n
    for model in tests/golden/models/*/; do
        for n in 1 2; do
            echo "$(basename "$model") on $n: $("$tandem" generate --device "$device" --ranks "$n" --model "$model" --json --temperature 0 --max-tokens 32 \
                --prompt 'The harbour was quiet at dawn; 3 boats left it.' 2>>"$out/golden.err" |
                python3 tests/golden/models/same_tokens.py "$model" 2>&1 | tail -n 1 | sed 's/^[^ ]*: //')"
        done
    done | tee "$out/golden.txt"
    ! grep -vqE ': (all [0-9]+ tokens equal|equal up to)' "$out/golden.txt"
}

# bench NAME ARGUMENTS...: `tandem bench` with what it measured in files beside the log.
bench() {
    local name=$1
    shift
    "$tandem" bench "$@" --device "$device" --time-limit 60 --json "$out/$name.json" --svg "$out/$name.svg"
}
scaling() { bench scaling scaling --model qwen2.5-7b --ranks 1,2 --prompt-tokens 1024,4096,16384; }
latency2() { bench latency2 latency --model qwen2.5-72b --ranks 2 --prompt-tokens 1024,4096,16384; }
compare() { bench compare compare --model qwen2.5-7b --gpu-memory 5GiB; }

# compared NAME ARGUMENTS...: the time there is decides how many shapes are compared.
compared() {
    local name=$1
    shift
    python3 tests/numerics.py "$tandem" "$out/$name" --device "$device" --max-seconds $((total - 40)) "$@"
}
numerics() { compared numerics ${smollm2:+--smollm2 "$smollm2"}; }
# From next to nothing resident to next to everything, on one rank.
offloaded() { compared offloaded --shapes qwen2.5-7b,qwen3-8b --prompts 17,5000 --decode 24 --gpu-memory 1700MiB,2500MiB,4500MiB; }

many() {
    local n_gpus ranks='' n shape failed=0
    n_gpus=$(nvidia-smi -L | grep -c '^GPU')
    for n in 1 2 4 8; do [[ $n -gt $n_gpus ]] || ranks+=${ranks:+,}$n; done
    for shape in 7b 32b 72b; do
        bench "many-$shape" scaling --model "qwen2.5-$shape" --ranks "$ranks" --prompt-tokens 1024,4096 --batch 1,8,64 || failed=1
    done
    ranks=3,4
    [[ $n_gpus -lt 8 ]] || ranks+=,8
    compared many-numerics --shapes qwen2.5-7b,qwen2.5-0.5b,qwen2.5-72b --ranks "$ranks" || failed=1
    "${random[@]}" --model qwen2.5-72b --ranks 4 --gpu-memory 20GiB --prompt-tokens 1024 --max-tokens 33 --json || failed=1
    return "$failed"
}

slurm() {
    [[ -n $smollm2 ]] || fail "slurm needs --smollm2 DIR"
    tests/gpu_slurm.sh "${debs:-/nonexistent}" "$tandem" "$smollm2" "$out/slurm" ${mpi:+"$mpi"}
}

# checked TOOL COMMAND...: the command's own end, and then the tool's word; either may fail.
checked() {
    local tool=$1
    shift
    # Every tensor has memory of its own, so that a step outside it is one.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 --print-limit 20 "$@"
}
memcheck() {
    local failed=0
    checked memcheck python3 tests/kernels/check.py --device cuda --rounds 4 || failed=1
    checked memcheck "$tandem" generate --device cuda --model tests/golden/models/qwen2-tied --temperature 0 --max-tokens 8 \
        --prompt 'The harbour was quiet at dawn; 3 boats left it.' || failed=1
    checked memcheck "${random[@]}" --model qwen2.5-0.5b --gpu-memory 1300MiB --prompt-tokens 64 --max-tokens 4 --json || failed=1
    return "$failed"
}
racecheck() { checked racecheck python3 tests/kernels/check.py --device cuda --rounds 4; }

# A part has a process of its own, where a time limit ends all that it started.
if [[ -n ${TANDEM_GPU_PART:-} ]]; then
    "$TANDEM_GPU_PART"
    exit
fi

for part in ${parts//,/ }; do
    [[ -n ${limit[$part]:-} ]] || fail "no part is called $part: see the head of tests/gpu.sh"
done
failed=() not_run=()
for part in ${parts//,/ }; do
    left=$((total - SECONDS))
    seconds=$((left < limit[$part] ? left : limit[$part]))
    # Numerics makes do with less; half of another part is worth nothing.
    least=$((limit[$part] / 2))
    [[ $part != numerics ]] || least=80
    if [[ $left -lt $least || ($part == slurm && -z $smollm2) ]]; then
        not_run+=("$part")
        continue
    fi
    echo "== $part"
    start=$SECONDS status=0
    TANDEM_GPU_PART=$part timeout --kill-after=10 "$seconds" bash "$self" --seconds "$seconds" "${given[@]}" \
        "$libtest" "$tandem" "$out" >"$out/$part.log" 2>&1 </dev/null || status=$?
    tail -n "${lines[$part]:-25}" "$out/$part.log" | cut -c1-200
    [[ $status -eq 0 ]] || { failed+=("$part") && echo "FAILED: $part, exit status $status"; }
    echo "-- $part: $((SECONDS - start)) s"
done
[[ ${#not_run[@]} -eq 0 ]] || echo "not run: tests/gpu.sh --parts $(IFS=,; echo "${not_run[*]}") ${given[*]} $libtest $tandem $out"
echo "${#failed[@]} parts failed: ${failed[*]}; whole logs in $out"
exit $((${#failed[@]} > 0))
