#!/bin/bash
# tandem under launchers: a real one-node Slurm, with and without MPI, and torchrun's variables.
#
#   tests/slurm_tests.sh TANDEM TANDEM_MPI MODEL
#
# TANDEM and TANDEM_MPI are the two builds (without and with the feature `mpi`), MODEL the demo
# model. Every answer is compared with tests/golden/smollm2/golden.json. Runs as root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

[[ $# -eq 3 ]] || fail "usage: tests/slurm_tests.sh TANDEM TANDEM_MPI MODEL"
tandem=$(realpath "$1")
tandem_mpi=$(realpath "$2")
model=$(realpath "$3")
numbers="1, 2, 4, 8, 16, 32, 64, 128," # the golden prompt of that name
generate=(generate --model "$model" --prompt "$numbers" --max-tokens 64 --temperature 0
    --device cpu --json --logprobs)
work=$(mktemp -d)
n_passed=0
slurm_started=

finish() {
    local status=$?
    trap - EXIT
    [[ -z $slurm_started ]] || tests/slurm.sh stop "$work/slurm" >&2 || true
    if [[ $status -eq 0 ]]; then rm -rf "$work"; else echo "left for a look: $work" >&2; fi
    exit "$status"
}
trap finish EXIT

# passes NAME SECONDS COMMAND...: COMMAND ends well in time; its output is left in $work/NAME.
passes() {
    local name=$1 seconds=$2 status=0
    shift 2
    # A test that hangs is a test that failed.
    timeout --kill-after=5 "$seconds" "$@" >"$work/$name.out" 2>"$work/$name.err" </dev/null || status=$?
    if [[ $status -ne 0 ]]; then
        echo "FAILED $name: exit status $status (124: still running after $seconds s)" >&2
        tail -n 40 "$work/$name.out" "$work/$name.err" >&2
        exit 1
    fi
}

# matches NAME RANKS: the JSON in $work/NAME.out is the golden answer, from that many ranks.
matches() {
    if ! python3 - "$work/$1.out" "$2" <<'PYTHON'; then
import json, sys

lines = open(sys.argv[1], encoding="utf-8").read().splitlines()
assert len(lines) == 1, f"{len(lines)} lines on stdout instead of one"
answer = json.loads(lines[0])
golden = json.load(open("tests/golden/smollm2/golden.json", encoding="utf-8"))["prompts"]["numbers"]
for key in ("prompt_token_ids", "token_ids", "text"):
    assert answer[key] == golden[key], f"{key}: {answer[key]!r} instead of {golden[key]!r}"
worst = max(abs(a - b) for a, b in zip(answer["logprobs"], golden["logprobs"], strict=True))
assert worst < 1e-3, f"a log-probability is {worst} off"
ranks = [rank["rank"] for rank in answer["ranks"]]
assert ranks == list(range(int(sys.argv[2]))), f"ranks {ranks} instead of {sys.argv[2]}"
PYTHON
        echo "FAILED $1: not the expected answer" >&2
        tail -n 40 "$work/$1.err" >&2
        exit 1
    fi
    passed "$1"
}

passed() {
    n_passed=$((n_passed + 1))
    echo "ok $1"
}

srun_world_sizes() {
    local n
    for n in 1 2 3 4; do
        passes "srun-$n" 120 srun -n "$n" "$tandem" "${generate[@]}"
        matches "srun-$n" "$n"
    done
}

srun_mpi() {
    local n
    for n in 2 3; do
        passes "srun-pmix-$n" 120 srun --mpi=pmix -n "$n" "$tandem_mpi" "${generate[@]}"
        matches "srun-pmix-$n" "$n"
    done
}

# One process, whatever the size of the allocation: not a hang that waits for the others.
sbatch_without_srun() {
    passes sbatch 120 sbatch --wait --ntasks=2 --output="$work/batch.out" --error="$work/batch.err" \
        --wrap="$(printf '%q ' "$tandem" "${generate[@]}")"
    cp "$work/batch.out" "$work/sbatch.out"
    cp "$work/batch.err" "$work/sbatch.err"
    matches sbatch 1
}

sbatch_with_srun() {
    passes sbatch-srun 120 sbatch --wait --ntasks=2 --output="$work/batch2.out" --error="$work/batch2.err" \
        --wrap="srun $(printf '%q ' "$tandem" "${generate[@]}")"
    cp "$work/batch2.out" "$work/sbatch-srun.out"
    cp "$work/batch2.err" "$work/sbatch-srun.err"
    matches sbatch-srun 2
}

# The script as it is, but for the GPUs that this machine has not.
sbatch_split() {
    printf '%s\n' "$numbers" >"$work/prompts.txt"
    passes split 120 env TANDEM="$tandem" sbatch --wait --gpus=0 --cpus-per-task=1 --time=5 \
        --output="$work/split.answers" --error="$work/split.log" launch/split.sbatch "$model" "$work/prompts.txt" \
        --device cpu --max-tokens 64 --temperature 0 --logprobs
    cp "$work/split.answers" "$work/split.out"
    cp "$work/split.log" "$work/split.err"
    matches split 2
}

# One step whose tasks start the ranks of every run: 1 and 2 of the 3 that there are. A fourth is a row that failed, and the end.
srun_bench() {
    local status=0
    timeout --kill-after=5 120 srun -n 3 "$tandem" bench scaling --model tests/golden/models/qwen2-tied --device cpu \
        --ranks 1,2,4 --prompt-tokens 20 --max-tokens 8 --json "$work/bench.json" \
        >"$work/bench.out" 2>"$work/bench.err" </dev/null || status=$?
    [[ $status -eq 1 ]] || { cat "$work/bench.err" >&2; fail "FAILED bench: exit status $status"; }
    if ! python3 - "$work/bench.json" <<'PYTHON'; then
import json, sys

rows = json.load(open(sys.argv[1], encoding="utf-8"))["rows"]
got = [(row["size"]["ranks"], len((row["measured"] or {}).get("ranks", []))) for row in rows]
assert got == [(1, 1), (2, 2), (4, 0)], got
assert "the launcher started 3" in rows[2]["error"], rows[2]
PYTHON
        echo "FAILED bench: not the expected report" >&2
        tail -n 40 "$work/bench.out" "$work/bench.err" >&2
        exit 1
    fi
    passed bench
}

# What torchrun would set for each of two processes on one node.
torchrun_variables() {
    local port rank1
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    local shared=(WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 "MASTER_PORT=$port")
    timeout --kill-after=5 120 env "${shared[@]}" RANK=1 LOCAL_RANK=1 "$tandem" "${generate[@]}" \
        >"$work/torchrun-1.out" 2>"$work/torchrun-1.err" </dev/null &
    rank1=$!
    passes torchrun 120 env "${shared[@]}" RANK=0 LOCAL_RANK=0 "$tandem" "${generate[@]}"
    wait "$rank1" || { cat "$work/torchrun-1.err" >&2; fail "FAILED torchrun: rank 1 failed"; }
    [[ ! -s $work/torchrun-1.out ]] || fail "FAILED torchrun: rank 1 wrote to stdout"
    matches torchrun 2
}

# Rank 1 is killed in mid-generation: the step ends within 10 seconds, not well, and says why.
srun_killed_rank() {
    local step status=0 start
    cat >"$work/task.sh" <<'TASK'
echo $$ >"$1/task.$SLURM_PROCID.pid"
shift
exec "$@"
TASK
    timeout --kill-after=5 120 srun --unbuffered -n 2 bash "$work/task.sh" "$work" "$tandem" generate --model "$model" \
        --prompt "$numbers" --max-tokens 4000 --ignore-eos --temperature 0 --device cpu \
        >"$work/killed.out" 2>"$work/killed.err" </dev/null &
    step=$!
    # The answer is streamed: once text appears, both ranks are at work.
    for ((i = 0; i < 600; i++)); do
        [[ ! -s $work/killed.out ]] || break
        sleep 0.1
    done
    [[ -s $work/killed.out ]] || { cat "$work/killed.err" >&2; fail "FAILED killed-rank: no answer began"; }
    start=$SECONDS
    kill -9 "$(cat "$work/task.1.pid")"
    wait "$step" || status=$?
    [[ $status -ne 0 && $status -ne 124 ]] || fail "FAILED killed-rank: exit status $status"
    [[ $((SECONDS - start)) -le 10 ]] || fail "FAILED killed-rank: the end took $((SECONDS - start)) s"
    [[ $(grep -c 'rank 1' "$work/killed.err") -ge 1 ]] ||
        { cat "$work/killed.err" >&2; fail "FAILED killed-rank: nothing on stderr names rank 1"; }
    passed killed-rank
}

# A rank that never comes is named within the time given. (Without the option, srun itself would
# wait for the task that sleeps.)
srun_missing_rank() {
    local status=0 start=$SECONDS
    # shellcheck disable=SC2016 # the variable is the task's
    timeout --kill-after=5 60 srun --kill-on-bad-exit -n 2 bash -c '[[ $SLURM_PROCID == 0 ]] || exec sleep 300; exec "$@"' - \
        "$tandem" "${generate[@]}" --rendezvous-timeout 5 \
        >"$work/missing.out" 2>"$work/missing.err" </dev/null || status=$?
    [[ $status -ne 0 && $status -ne 124 ]] || fail "FAILED missing-rank: exit status $status"
    [[ $((SECONDS - start)) -le 30 ]] || fail "FAILED missing-rank: the end took $((SECONDS - start)) s"
    grep -q 'rank 1 never arrived' "$work/missing.err" ||
        { cat "$work/missing.err" >&2; fail "FAILED missing-rank: the missing rank is not named"; }
    [[ ! -s $work/missing.out ]] || fail "FAILED missing-rank: something on stdout"
    passed missing-rank
}

slurm_started=yes
conf=$(tests/slurm.sh start "$work/slurm") || fail "no Slurm"
eval "$conf"
srun_world_sizes
srun_mpi
sbatch_without_srun
sbatch_with_srun
sbatch_split
srun_bench
torchrun_variables
srun_killed_rank
srun_missing_rank
echo "launcher tests: $n_passed passed"
