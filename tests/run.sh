#!/bin/bash
# Runs all tests, from a clean checkout on Debian or Ubuntu with Rust: fetches what they read,
# installs what is missing, and ends with one line that counts them.
#
#   tests/run.sh
#   tests/run.sh --quick    formatting, lints, and the tests that need no network, no root, no Python and no emulated GPU:
#                           minutes, while you work
#
# The launcher tests start a Slurm of their own, for which they need root or sudo.
# TANDEM_FUZZ_SECONDS (20) is how long each fuzz target runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

assets=$PWD/models # git-ignored; launch/demo.sh keeps its model here too
torch=$assets/torch
target=${CARGO_TARGET_DIR:-target}
log=$(mktemp)
mpi_build=$(mktemp -d)
trap 'rm -rf "$log" "$mpi_build"' EXIT

say() { echo "== $*" >&2; }

quick() {
    need_rust
    cargo fmt --check
    cargo clippy --release --locked --all-targets -- -D warnings
    cargo test --release --locked --lib --bins -- --skip gpu::
    cargo test --release --locked --test it
}
case ${1:-} in
    "") ;;
    --quick) quick && exit ;;
    *) fail "usage: tests/run.sh [--quick]" ;;
esac

install_tools() {
    need_rust
    has c++ || apt_install g++
    has npm || apt_install npm
    has mpicc || apt_install libopenmpi-dev
    # rsmpi reads MPI's headers with libclang.
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || apt_install libclang-dev
}

# Python with torch, which brings NVRTC with it.
install_torch() {
    [[ -x $torch/bin/python && -n $(nvrtc_folder) ]] && return
    python3 -m venv --clear "$torch"
    "$torch/bin/pip" install -q torch==2.11.0 numpy
}
nvrtc_folder() { find "$torch" -name 'libnvrtc.so.*' -printf '%h\n' -quit; }

# Sums what `cargo test` counted.
n_passed_by_cargo() { awk '/^test result: ok\./ { n += $4 } END { print n + 0 }' "$log"; }

as_root() { if [[ $(id -u) -eq 0 ]]; then "$@"; else sudo "$@"; fi; }

install_tools
# Some gigabytes: they come while the tests are built.
install_torch &
installing=$!
say "test data in $assets"
launch/demo_model.sh "$assets/smollm2"
tests/assets.sh "$assets"

say "cargo test"
cargo test --release --locked --no-fail-fast 2>&1 | tee "$log"
TANDEM_TEST_ASSETS=$assets cargo test --release --locked --no-fail-fast -- --ignored assets_ 2>&1 | tee -a "$log"

say "GPU kernels, compiled by NVRTC for every architecture"
wait "$installing"
TANDEM_NVRTC=$(nvrtc_folder) cargo test --release --locked --lib nvrtc_ -- --ignored 2>&1 | tee -a "$log"

say "GPU kernels, emulated, against torch on random shapes"
"$torch/bin/python" tests/kernels/check.py --rounds 6

say "launchers"
cargo build --release --locked --features mpi
cp "$target/release/tandem" "$mpi_build/tandem"
cargo build --release --locked
as_root tests/slurm_tests.sh "$target/release/tandem" "$mpi_build/tandem" "$assets/smollm2" | tee -a "$log"

say "random faults"
python3 tests/faults.py "$target/release/tandem" 40 | tee -a "$log"

say "fuzzing"
tests/fuzz/run.sh "${TANDEM_FUZZ_SECONDS:-20}"

n_faults=$(sed -n 's/^faults: \([0-9]*\) held$/\1/p' "$log")
n_cargo=$(n_passed_by_cargo)
n_launchers=$(sed -n 's/^launcher tests: \([0-9]*\) passed$/\1/p' "$log")
echo "all passed: $((n_cargo + n_launchers)) tests ($n_cargo of cargo test, $n_launchers under launchers), $n_faults random faults, and the fuzz run, in $SECONDS s"
