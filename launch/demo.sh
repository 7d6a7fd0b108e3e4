#!/bin/bash
# Answers a question with a real model on two CPU ranks:
#
#   launch/demo.sh [QUESTION]
#
# On a fresh Debian or Ubuntu machine with Rust this installs what is missing (a C compiler,
# Python), makes the demo model in models/smollm2, and builds tandem. What is there is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

question=${1:-What is the capital of France?}
need_rust
launch/demo_model.sh models/smollm2
cargo build --release --locked >&2 || fail "the build failed"
exec "${CARGO_TARGET_DIR:-target}/release/tandem" generate --model models/smollm2 \
    --chat --prompt "$question" --temperature 0 --ranks 2 --device cpu
