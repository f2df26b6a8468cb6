#!/usr/bin/env bash
# Runs the fuzz targets: fuzz.sh run TARGET [SECONDS] looks for memory errors too, fuzz.sh try gives each a few inputs, always the same.
# cargo-fuzz wants flags that only a nightly compiler takes; where there is none, the stable one is told to take them.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
if rustup toolchain list 2>/dev/null | grep -q '^nightly'; then
    fuzz=(cargo +nightly fuzz)
else
    export RUSTC_BOOTSTRAP=1
    fuzz=(cargo fuzz)
fi

case ${1:-} in
try)
    "${fuzz[@]}" build --sanitizer none
    found=$(mktemp -d) # not the corpus that longer runs have gathered
    trap 'rm -r "$found"' EXIT
    for target in fuzz/fuzz_targets/*.rs; do
        target=$(basename "$target" .rs)
        mkdir "$found/$target"
        "${fuzz[@]}" run --sanitizer none "$target" "$found/$target" -- -runs=200 -seed=1 -max_len=100 -len_control=0
    done
    ;;
run) "${fuzz[@]}" run "${2:?a target: $(ls fuzz/fuzz_targets)}" -- -max_total_time="${3:-60}" -len_control=0 ;;
*)
    echo "usage: fuzz.sh try | fuzz.sh run TARGET [SECONDS]" >&2
    exit 2
    ;;
esac
