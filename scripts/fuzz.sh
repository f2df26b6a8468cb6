#!/usr/bin/env bash
# Builds or runs the fuzz targets: fuzz.sh build | fuzz.sh run TARGET [SECONDS]
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
build) "${fuzz[@]}" build --sanitizer none ;;
run) "${fuzz[@]}" run "${2:?a target: $(ls fuzz/fuzz_targets)}" -- -max_total_time="${3:-60}" ;;
*)
    echo "usage: fuzz.sh build | fuzz.sh run TARGET [SECONDS]" >&2
    exit 2
    ;;
esac
