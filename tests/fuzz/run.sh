#!/bin/sh
# Fuzzes each target for SECONDS (20 by default) with libFuzzer; needs the stable toolchain and a C++ compiler.
#
#   tests/fuzz/run.sh [SECONDS] [TARGET...]
#
# A crashing input is kept in tests/fuzz/artifacts; show it again with
#   tests/fuzz/run.sh 0 TARGET   after copying it to tests/fuzz/seeds/TARGET
set -eu
cd "$(dirname "$0")"
seconds=${1:-20}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- safetensors_header config

# What `cargo fuzz` sets, less the sanitizers: those need a nightly compiler, and the code under test is safe Rust.
# With --target, the flags do not reach build scripts.
host=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module --cfg fuzzing"
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
    coverage="$coverage -Cllvm-args=-sanitizer-coverage-$flag"
done
CARGO_TARGET_DIR=target RUSTFLAGS="$coverage" cargo build --release --bins --target "$host" >&2

for target in "$@"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    echo "fuzz $target for $seconds s" >&2
    # -runs=0 tries the seeds and the corpus only.
    limit="-max_total_time=$seconds"
    [ "$seconds" -gt 0 ] || limit="-runs=0"
    "target/$host/release/$target" "$limit" -timeout=5 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 \
        -verbosity=0 -artifact_prefix="artifacts/$target/" "corpus/$target" "seeds/$target"
done
