#!/bin/bash
# tandem as its users run it: a real one-node Slurm that hands out this machine's GPUs, and mpirun beside it.
#
#   tests/gpu_slurm.sh DEBS TANDEM MODEL OUT_DIR [TANDEM_MPI]      (as root, on a machine that may be changed: a container)
#
# TANDEM_MPI is built where there is Open MPI of the same series (libopenmpi-dev), libclang-dev and no newer glibc, with
#
#   cargo build --release --locked --features mpi --bin tandem && strip -o tandem-mpi target/release/tandem
#
# DEBS is a folder of .deb files that are unpacked, not installed, where Slurm is missing (no network needed): slurmctld,
# slurmd, slurm-client, slurm-wlm-basic-plugins, munge, and lib*.deb for whatever they miss (libdbus-1-3 among them). MODEL is the demo model. Every
# answer is compared with tests/golden/smollm2/golden.json. A table comes last.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh

[[ $# -eq 4 || $# -eq 5 ]] || fail "usage: tests/gpu_slurm.sh DEBS TANDEM MODEL OUT_DIR [TANDEM_MPI]"
[[ $(id -u) -eq 0 ]] || fail "slurmd starts tasks as their users: run this as root"
debs=$(realpath "$1")
tandem=$(realpath "$2")
model=$(realpath "$3")
mkdir -p "$4" && out=$(realpath "$4")
tandem_mpi=$(realpath "${5:-/nonexistent}" 2>/dev/null)
device=${TANDEM_TEST_DEVICE:-cuda} # cpu tries the script on a machine without GPUs
limit=60
[[ $device == cuda ]] || limit=300
plugins=/usr/lib/x86_64-linux-gnu/slurm-wlm
failed=0
table=()

# row OK NAME TEXT: a line of the table; OK is empty for a failure.
row() {
    local word=ok
    [[ -n $1 ]] || { word=FAILED && failed=$((failed + 1)); }
    table+=("$(printf '%-6s %-24s %s' "$word" "$2" "$3" | cut -c1-300)")
}

# Every shared library that Slurm and munge need and the loader does not find.
missing_libraries() {
    ldd /usr/sbin/{munged,slurmctld,slurmd,slurmstepd} /usr/bin/{srun,sbatch,sinfo,scontrol} \
        "$plugins"/{auth_munge,cred_munge,select_cons_tres,gres_gpu,gpu_generic,mpi_pmix_v4,cgroup_v1,cgroup_v2}.so \
        /usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so 2>/dev/null |
        awk '/not found/ { print $1 }' | sort -u
}

# unpack: Slurm's programs where their packages would put them, and of the libraries those alone that are missing.
unpack() {
    local deb name file round
    for deb in "$debs"/{slurm,munge}*.deb; do dpkg -x "$deb" "$out/slurm-root" || fail "$deb cannot be unpacked"; done
    # Never dpkg -x to /: it would put a folder in the place of the link that /lib is.
    cp -a "$out/slurm-root/usr/." /usr/
    for deb in "$debs"/lib*.deb; do dpkg -x "$deb" "$out/libs"; done
    # What the packages' scripts would do.
    for name in slurmctld slurmd slurmstepd; do
        [[ -e /usr/sbin/$name ]] || ln -s "$name-wlm" "/usr/sbin/$name"
    done
    # Slurm's plugin opens PMIx under this name, and wants the version that it was built with.
    file=$(find "$out/libs" -name 'libpmix.so.2.*' -type f | head -1)
    [[ -z $file ]] || install -D "$file" /usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so
    # A library may need others: as many rounds as it takes.
    for round in 1 2 3 4; do
        for name in $(missing_libraries); do
            file=$(find "$out/libs" -name "$name" | head -1)
            if [[ -n $file ]]; then cp -L "$file" /usr/local/lib/; else echo "round $round: no $name in $debs" >&2; fi
        done
        ldconfig
    done
    [[ -z $(missing_libraries) ]] || fail "still missing: $(missing_libraries | tr '\n' ' ')"
}

# Answers of a batch (stdin) against float32's: equal, or equal up to a token whose two best logits are so close that bf16
# does not tell them apart: transformers' own bf16 run moves the gap between them by up to 0.35 in 99 of 100 of these places
# (tests/numerics.py says so).
# shellcheck disable=SC2016
check='
import json, sys
ranks = int(sys.argv[1])
golden = json.load(open("tests/golden/smollm2/golden.json"))["prompts"]
answers = [json.loads(line) for line in sys.stdin]
assert len(answers) == len(golden), f"{len(answers)} answers for {len(golden)} prompts"
equal, close = 0, []
for a in answers:
    want = golden[a["name"]]
    i = next((i for i, (x, y) in enumerate(zip(a["token_ids"], want["token_ids"])) if x != y), None)
    if i is None and a["text"] == want["text"]:
        equal += 1
    else:
        assert i is not None and want["gaps"][i] <= 0.35, "%s: token %s: %r" % (a["name"], i, a["text"][:60])
        close.append("%s at %d (%.3f)" % (a["name"], i, want["gaps"][i]))
got = [r["device"] for r in answers[0]["ranks"]]
assert len(got) == ranks, f"{len(got)} ranks"
assert all(("GPU" in d) == (sys.argv[2] == "cuda") for d in got), got
print(f"{equal} of {len(golden)} equal" + "".join(f", close call: {c}" for c in close) + "; " + ", ".join(got))
'

# answers NAME RANKS COMMAND...: COMMAND is everything up to `generate`.
answers() {
    local name=$1 ranks=$2 status=0 start=$EPOCHREALTIME text
    shift 2
    timeout --foreground --kill-after=5 "$limit" "$@" generate --device "$device" --model "$model" --prompts "$out/prompts.jsonl" \
        --max-tokens 64 --temperature 0 >"$out/$name.out" 2>"$out/$name.err" </dev/null || status=$?
    if [[ $status -ne 0 ]]; then
        row "" "$name" "exit status $status: $(grep -m1 -E '^tandem: |error' "$out/$name.err")"
        return
    fi
    if text=$(python3 -c "$check" "$ranks" "$device" <"$out/$name.out" 2>&1 | tail -n 1) && [[ $text == *equal* ]]; then
        row yes "$name" "$(python3 -c 'import sys, time; print(f"{time.time() - float(sys.argv[1]):.1f} s")' "$start"), $text"
    else
        row "" "$name" "$text"
    fi
    # What a run has to say about its GPUs, e.g. that they are isolated from each other.
    table+=("$(grep -E '^tandem: .*(warning|peer|IPC|isolated)' "$out/$name.err" | sed 's/^/         /' | cut -c1-300 | head -3)")
}

# shellcheck disable=SC2317 # called by the trap
finish() {
    [[ -e $out/slurm/slurm.conf ]] || return
    # A step that outlives the daemons would ask for them for ever.
    scancel --signal=KILL --full --user=root 2>/dev/null
    for _ in {1..20}; do [[ -n $(squeue -h 2>/dev/null) ]] && sleep 0.5; done
    tests/slurm.sh stop "$out/slurm" >&2
}

if ! { has slurmctld && has slurmd && has srun && has munged; }; then unpack; fi
python3 - >"$out/prompts.jsonl" <<'PYTHON'
import json

for name, prompt in json.load(open("tests/golden/smollm2/golden.json"))["prompts"].items():
    print(json.dumps({"name": name, "prompt_token_ids": prompt["prompt_token_ids"]}))
PYTHON
gpus=${TANDEM_SLURM_GPUS:-$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | sort -V | tr '\n' ' ')}
[[ -n $gpus ]] || fail "no /dev/nvidia0"
trap finish EXIT
# With `timeout --foreground` above, a limit on this script ends what it waits for as well, so that it can clean up.
trap 'exit 143' TERM INT
conf=$(TANDEM_SLURM_GPUS=$gpus tests/slurm.sh start "$out/slurm") || fail "no Slurm"
eval "$conf"
sinfo -h -o 'node %n: %G, %T' | tee "$out/node"

# Which GPUs each task sees: all of them, or one of its own.
# shellcheck disable=SC2016
sees() {
    local flags=$1 want=$2 seen
    seen=$(timeout 30 srun --quiet -n 2 "$flags" bash -c 'echo "task $SLURM_PROCID sees ${CUDA_VISIBLE_DEVICES:-nothing}"' 2>&1 |
        sort | tr '\n' ';')
    row "$([[ $seen =~ ^$want$ ]] && echo yes)" "srun $flags" "$seen"
}
sees --gpus=2 'task 0 sees 0,1;task 1 sees 0,1;'
sees --gpus-per-task=1 'task 0 sees (0;task 1 sees 1|1;task 1 sees 0);'
answers srun-1 1 srun -n 1 --gpus=1 "$tandem"
answers srun-gpus 2 srun -n 2 --gpus=2 "$tandem"
answers srun-gpus-per-task 2 srun -n 2 --gpus-per-task=1 "$tandem"
# As a batch job, which is how the main job is run.
# shellcheck disable=SC2016
printf '#!/bin/bash\nexec srun "$@"\n' >"$out/job.sh"
# shellcheck disable=SC2317 # called by the shell below
answers_of_job() {
    timeout --foreground "$((limit - 5))" sbatch --wait --ntasks=2 --gpus=2 --output="$out/job.out" --error="$out/job.err" "$out/job.sh" "$@" >&2
    local status=$?
    [[ $status -eq 0 ]] || scancel --signal=KILL --full --user=root 2>/dev/null
    cat "$out/job.out" && cat "$out/job.err" >&2
    return "$status"
}
export out limit
export -f answers_of_job
answers sbatch-srun 2 bash -c 'answers_of_job "$@"' - "$tandem"
if [[ -x $tandem_mpi ]]; then
    if ldd "$tandem_mpi" | grep -q 'libmpi.*not found'; then
        LD_LIBRARY_PATH=$(dirname "$(dirname "$(readlink -f "$(command -v mpirun)")")")/lib:${LD_LIBRARY_PATH:-}
        export LD_LIBRARY_PATH
    fi
    answers mpirun 2 mpirun --allow-run-as-root -n 2 "$tandem_mpi"
    answers srun-pmix 2 srun --mpi=pmix -n 2 --gpus=2 "$tandem_mpi"
fi
printf '%s\n' "${table[@]}" | grep . | tee "$out/slurm.txt"
echo "$failed failed; whole output in $out"
exit $((failed > 0))
