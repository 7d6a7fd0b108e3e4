#!/bin/bash
# What goes wrong on GPUs, on purpose: every fault is one clear line and exit status 1, and all ranks end within 10 seconds.
# Then what must not go wrong: two runs of a plan give the same tokens, and device memory stays within the plan.
#
#   tests/gpu_faults.sh TANDEM [OUT_DIR]      (on a machine with two GPUs, from anywhere; root, for the missing NCCL)
#
# Needs python3. Takes about three minutes; a table comes last. TANDEM_FAULTS names some parts alone (kill memory ordinal
# nccl same peak budget cgroup). TANDEM_7B names a checkpoint of the 7B model, for reading it under a control group's limit.
# shellcheck disable=SC2317 # the parts are called by name
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
tandem=$(realpath "${1:?usage: tests/gpu_faults.sh TANDEM [OUT_DIR]}")
mkdir -p "${2:=$(mktemp -d)}"
out=$(realpath "$2")
device=${TANDEM_TEST_DEVICE:-cuda} # cpu tries the parts that need no GPU
n_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || n_gpus=0
limit=10
failed=0
table=()

# row OK NAME TEXT: a line of the table; OK is empty for a failure.
row() {
    local word=ok
    [[ -n $1 ]] || { word=FAILED && failed=$((failed + 1)); }
    table+=("$(printf '%-6s %-22s %s' "$word" "$2" "$3" | cut -c1-250)")
}

# The lines of a failure: what `-v` and warnings say does not count.
errors_in() { grep '^tandem: ' "$1" | grep -Ev '^tandem: (\[rank [0-9]+/|warning: )'; }

# judge NAME STATUS SECONDS REGEX: stderr of NAME holds one error that matches, and nothing that looks like a crash.
judge() {
    local errors ok=yes why=
    errors=$(errors_in "$out/$1.err")
    [[ $2 -eq 1 ]] || { ok= && why+="exit status $2; "; }
    [[ $(grep -c . <<<"$errors") -eq 1 ]] || { ok= && why+="$(grep -c . <<<"$errors") error lines; "; }
    grep -Eq "$4" <<<"$errors" || { ok= && why+="no match for /$4/; "; }
    if grep -Eq "panicked|RUST_BACKTRACE|core dumped" "$out/$1.err"; then ok= && why+="a panic; "; fi
    [[ $(printf '%.0f' "$3") -le $limit ]] || { ok= && why+="took too long; "; }
    row "$ok" "$1" "$(printf '%4.1f s  %s%s' "$3" "$why" "$(head -1 <<<"$errors")")"
}

seconds_since() { python3 -c 'import sys, time; print(round(time.time() - float(sys.argv[1]), 2))' "$1"; }

# fault NAME REGEX COMMAND...: a run that has to fail by itself.
fault() {
    local name=$1 regex=$2 start=$EPOCHREALTIME status=0
    shift 2
    timeout --kill-after=5 40 "$@" >"$out/$name.out" 2>"$out/$name.err" </dev/null || status=$?
    judge "$name" "$status" "$(seconds_since "$start")" "$regex"
}

# A shape that is up in a second and, with enough tokens, busy for many.
shape=qwen2.5-0.5b many=30000
[[ $device == cuda ]] || { shape=smollm2-135m && many=8000; }
run=("$tandem" generate --device "$device" --model "$shape" --weights random --ignore-eos --json)

# A process that nobody has waited for has no command line left.
alive() { grep -q . "/proc/$1/cmdline" 2>/dev/null; }

# killed NAME VICTIM REGEX: SIGKILL for rank VICTIM of two in mid-generation; the other must end by itself.
killed() {
    local name=$1 rank0 rank1 pid start status=0 i
    "${run[@]}" --ranks 2 --prompt-tokens 16 --max-tokens "$many" -vv >"$out/$name.out" 2>"$out/$name.err" </dev/null &
    rank0=$!
    # Steps are logged at -vv; should they no longer be, decoding has begun after this time all the same.
    for ((i = 0; i < 100; i++)); do
        [[ $(grep -c 'step' "$out/$name.err") -lt 20 ]] || break
        sleep 0.1
    done
    rank1=$(tr -d ' ' <"/proc/$rank0/task/$rank0/children" 2>/dev/null)
    if [[ -z $rank1 ]]; then
        row "" "$name" "was not running any more: $(errors_in "$out/$name.err" | head -1)"
        return
    fi
    [[ $2 == 1 ]] && pid=$rank1 || pid=$rank0
    start=$EPOCHREALTIME
    kill -9 "$pid"
    for ((i = 0; i < 300; i++)); do
        alive "$rank0" || alive "$rank1" || break
        sleep 0.1
    done
    local took left=
    took=$(seconds_since "$start")
    for pid in "$rank0" "$rank1"; do
        ! alive "$pid" || { left="something was still running; " && kill -9 "$pid"; }
    done
    wait "$rank0" 2>/dev/null || status=$?
    if [[ $2 == 1 ]]; then
        judge "$name" "$status" "$took" "$3"
    else
        # Nobody is left to say anything; what counts is that rank 1 is gone.
        local ok=yes
        [[ -z $left && $(printf '%.0f' "$took") -le $limit ]] || ok=
        row "$ok" "$name" "$(printf '%4.1f s  %sno rank is left' "$took" "$left")"
    fi
}

part_kill() {
    killed rank-1-killed 1 'rank 1'
    killed rank-0-killed 0 ''
}

# held ORDINAL LEAVE_MIB: another process takes the GPU's memory; its id is in $holder.
held() {
    coproc HOLDER { exec python3 tests/gpu_device.py hold "$1" "$2"; }
    holder=$HOLDER_PID
    local said
    read -r -t 30 said <&"${HOLDER[0]}" || said=nothing
    echo "GPU $1: $said MiB free" >>"$out/holders.log"
    [[ $said == held* ]]
}

released() {
    kill "$holder" 2>/dev/null
    wait "$holder" 2>/dev/null
}

part_memory() {
    local big=("$tandem" generate --device cuda --model qwen2.5-7b --weights random --temperature 0 --prompt-tokens 64
        --max-tokens 4 --json)
    held 0 300 || row "" memory "could not fill GPU 0"
    fault memory-300MiB '[Mm]emory|MiB|GiB' "${big[@]}"
    released
    if [[ $n_gpus -ge 2 ]]; then
        held 1 300 || row "" memory "could not fill GPU 1"
        fault memory-300MiB-of-GPU-1 'rank 1|[Mm]emory' "${big[@]}" --ranks 2
        released
    fi
    # With some room left the model may fit by way of the host's memory; otherwise this, too, is one line.
    held 0 3000 || row "" memory "could not fill GPU 0"
    local status=0 start=$EPOCHREALTIME
    timeout --kill-after=5 60 "${big[@]}" >"$out/memory-3GB.out" 2>"$out/memory-3GB.err" </dev/null || status=$?
    if [[ $status -eq 0 && -s $out/memory-3GB.out ]]; then
        row yes memory-3GB "$(printf '%4.1f s  answered, with less on the GPU' "$(seconds_since "$start")")"
    else
        judge memory-3GB "$status" "$(seconds_since "$start")" '[Mm]emory|MiB|GiB'
    fi
    released
}

part_ordinal() {
    local small=("${run[@]}" --prompt-tokens 16 --max-tokens 4)
    fault too-many-ranks "GPU" "${small[@]}" --ranks $((n_gpus + 1))
    CUDA_VISIBLE_DEVICES=0 fault two-ranks-one-GPU "GPU" "${small[@]}" --ranks 2
    CUDA_VISIBLE_DEVICES='' fault no-GPU-visible "GPU|device" "${small[@]}"
    CUDA_VISIBLE_DEVICES=7 fault "GPU-7-of-$n_gpus" "GPU|device" "${small[@]}"
}

# Prefix of a command that is to find no file named libnccl*: in a mount namespace of its own, the folders that hold one
# get a layer in which it is removed. Exit status 99 where that is not permitted.
# shellcheck disable=SC2016 # expanded by the inner shell
without_nccl=(unshare -m bash -c '
    mount --make-rprivate / && layers=$(mktemp -d) && mount -t tmpfs none "$layers" || exit 99
    n=0
    while read -r folder; do
        n=$((n + 1))
        mkdir "$layers/up$n" "$layers/work$n" &&
            mount -t overlay -o "lowerdir=$folder,upperdir=$layers/up$n,workdir=$layers/work$n" none "$folder" &&
            rm -f "$folder"/libnccl.so* || exit 99
    done <"$0"
    exec "$@"' "$out/nccl-folders")

part_nccl() {
    local two=("${run[@]}" --prompt-tokens 16 --max-tokens 4 --ranks 2) files file
    mapfile -t files < <(find / -xdev -name 'libnccl.so*' 2>/dev/null)
    for file in "${files[@]}"; do dirname "$file"; done | sort -u >"$out/nccl-folders"
    if [[ ${#files[@]} -eq 0 ]]; then
        row "" NCCL-missing "found no libnccl.so* to hide"
    elif "${without_nccl[@]}" true 2>"$out/unshare.log"; then
        fault NCCL-missing "NCCL" "${without_nccl[@]}" "${two[@]}"
    else
        # No namespaces here: the files go aside for a moment.
        back() { for file in "${files[@]}"; do [[ ! -e $file.aside ]] || mv "$file.aside" "$file"; done; }
        trap back EXIT
        for file in "${files[@]}"; do mv "$file" "$file.aside"; done
        fault NCCL-missing "NCCL" "${two[@]}"
        back
        trap - EXIT
    fi
}

tokens_of() { python3 -c 'import json, sys; print(*json.load(open(sys.argv[1]))["token_ids"])' "$1" 2>&1; }

# The answer alone is compared: times differ.
same() {
    local name=$1 i
    shift
    for i in 1 2; do
        timeout --kill-after=5 60 "$@" >"$out/$name.$i" 2>"$out/$name.$i.err" </dev/null || {
            row "" "$name" "$(errors_in "$out/$name.$i.err" | head -1)"
            return
        }
    done
    local ok=
    [[ $(tokens_of "$out/$name.1") == "$(tokens_of "$out/$name.2")" ]] && ok=yes
    row "$ok" "$name" "two runs, $(tokens_of "$out/$name.1" | tr ' ' '\n' | sort -u | grep -c .) different tokens"
}

part_same() {
    # Untied weights: a model whose head is its embedding repeats the last token for ever when they are random.
    local long=("${run[@]/$shape/qwen2.5-7b}" --prompt-tokens 600 --max-tokens 200) n
    [[ $device == cuda ]] || long=("${run[@]}" --prompt-tokens 40 --max-tokens 20)
    for n in 1 2; do
        [[ $device == cpu || $n -le $n_gpus ]] || continue
        same "same-greedy-$n" "${long[@]}" --ranks "$n" --temperature 0
        same "same-sampled-$n" "${long[@]}" --ranks "$n" --temperature 1.3 --seed 11
    done
}

part_peak() {
    local n prompt=4000 answer=96 line
    echo "an idle CUDA context takes $(timeout 30 python3 tests/gpu_device.py context 2>&1) MiB" >"$out/context.log"
    for ((n = 1; n <= (n_gpus < 2 ? n_gpus : 2); n++)); do
        "$tandem" plan --model qwen2.5-7b --ranks "$n" --device cuda --context $((prompt + answer)) --json >"$out/plan-$n.json"
        timeout --kill-after=5 60 python3 tests/gpu_device.py peak "$n" -- "$tandem" generate --device cuda \
            --model qwen2.5-7b --weights random --temperature 0 --ignore-eos --json --ranks "$n" \
            --prompt-tokens "$prompt" --max-tokens "$answer" >"$out/peak-$n.json" 2>"$out/peak-$n.err" </dev/null
        while read -r line; do
            row "$([[ $line == ok* ]] && echo yes)" "peak-of-$n" "${line#* }"
        done < <(python3 - "$out/peak-$n.json" "$out/plan-$n.json" 2>&1 <<'PYTHON'
import json, sys

peak, plan = (json.load(open(path)) for path in sys.argv[1:])
ran = json.loads(peak["stdout"])
for rank, (before, most) in enumerate(zip(peak["before"], peak["most"])):
    used = (most - before) / 2**20
    planned = plan["ranks"][rank]["bytes"]["total"] / 2**20
    of_run = ran["ranks"][rank]["bytes"]["total"] / 2**20
    within = abs(used / planned - 1) <= 0.03
    print("ok" if within else "no", f"rank {rank}: {used:.0f} MiB used; `plan` said {planned:.0f} (ratio {used / planned:.3f}), "
          f"the run itself {of_run:.0f} ({used / of_run:.3f})")
PYTHON
        )
    done
    row yes context "$(cat "$out/context.log")"
}

# budget NAME RANKS BUDGET MODEL SECONDS: the most memory of each kind that a run takes under a budget, beside its bounds, and
# the time a token beside what `plan` predicts with the rates that the run itself measured.
budget() {
    local name=budget-$1 n=$2 size=$3 model=$4 line
    timeout --kill-after=5 "$5" python3 tests/gpu_device.py peak "$n" -- "$tandem" generate --device cuda --model "$model" --weights random \
        --temperature 0 --ignore-eos --json --ranks "$n" --gpu-memory "$size" --prompt-tokens 4000 --max-tokens 25 \
        >"$out/$name.json" 2>"$out/$name.err" </dev/null
    while read -r line; do
        row "$([[ $line == ok* ]] && echo yes)" "$name" "${line#* }"
    done < <(python3 - "$out/$name.json" "$size" 2>&1 <<'PYTHON'
import json, sys

peak, budget = json.load(open(sys.argv[1])), int(sys.argv[2].removesuffix("GiB")) * 2**30
ran = json.loads(peak["stdout"])
for rank, (before, most) in enumerate(zip(peak["before"], peak["most"])):
    used = most - before
    print("ok" if used <= budget else "no", f"rank {rank}: {used / 2**30:.3f} GiB used of {budget / 2**30:.0f} ({used / budget:.3f})")
pinned = sum(rank["tiers"]["weights_pinned"] for rank in ran["ranks"])
bound = pinned + 2**30 * len(ran["ranks"])
print("ok" if peak["host"] <= bound else "no",
      f"host: {peak['host'] / 2**30:.2f} GiB held, {pinned / 2**30:.2f} of them offloaded weights")
t = ran["timings"]
print("ok", f"load {t['load_s']:.1f} s, first token {t['ttft_s'] * 1e3:.0f} ms, {t['tpot_s'] * 1e3:.1f} ms a token, "
      f"predicted {ran['predicted']}")
PYTHON
    )
}

part_budget() {
    budget 7B 1 5GiB qwen2.5-7b 60
    [[ $n_gpus -lt 2 ]] || budget 7B-on-2 2 5GiB qwen2.5-7b 60
    [[ $n_gpus -lt 2 ]] || budget 32B-on-2 2 9GiB qwen2.5-32b 90
    # 72B and some room; gigabytes rather than GiB do for the comparison.
    [[ $(awk '/MemAvailable/ { print int($2 / 1e6) }' /proc/meminfo) -lt 140 ]] || budget 72B 1 36GiB qwen2.5-72b 150
}

# With less memory in its control group than the offloaded weights take: refused with the numbers, or read from files each
# step; never killed.
part_cgroup() {
    local group=/sys/fs/cgroup/tandem-test-$$ limit_mib=6144 start status=0
    [[ -e /sys/fs/cgroup/cgroup.controllers ]] || group=/sys/fs/cgroup/memory/tandem-test-$$
    if ! mkdir "$group" 2>"$out/cgroup.err"; then
        row "" cgroup "no control group could be made: $(cat "$out/cgroup.err")"
        return
    fi
    echo $((limit_mib << 20)) 2>/dev/null >"$group/memory.max" || echo $((limit_mib << 20)) >"$group/memory.limit_in_bytes"
    # shellcheck disable=SC2016 # expanded by the inner shell
    local within=(bash -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$group")
    fault cgroup-refused '[Mm]emory|MiB|GiB' "${within[@]}" "$tandem" generate --device cuda --model qwen2.5-7b --weights random \
        --gpu-memory 5GiB --prompt-tokens 64 --max-tokens 4 --json
    if [[ -d ${TANDEM_7B:-} ]]; then
        start=$EPOCHREALTIME
        timeout --kill-after=5 200 "${within[@]}" "$tandem" generate --device cuda --model "$TANDEM_7B" --gpu-memory 5GiB --prompts - \
            --max-tokens 4 <<<'{"prompt_token_ids": [1, 2, 3]}' >"$out/cgroup-file.out" 2>"$out/cgroup-file.err" || status=$?
        row "$([[ $status -eq 0 ]] && echo yes)" cgroup-file-tier "$(printf '%4.1f s  exit status %s' "$(seconds_since "$start")" "$status"): $(
            grep -E '^(load|tandem:)' "$out/cgroup-file.err" | tail -1)"
    fi
    rmdir "$group"
}

for part in ${TANDEM_FAULTS:-kill memory ordinal nccl same peak budget cgroup}; do
    if [[ $device == cuda || $part == kill || $part == same ]]; then
        "part_$part"
    fi
done
printf '%s\n' "${table[@]}" | tee "$out/faults.txt"
echo "$failed failed; whole output in $out"
exit $((failed > 0))
