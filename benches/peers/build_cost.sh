#!/bin/sh
# What the library costs to build: seconds of a release build from nothing, and the crates beside it. `laneformer compare --build-cost`
# records what this prints.
set -eu

cargo fetch --quiet
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
start=$(date +%s.%N)
CARGO_TARGET_DIR=$target cargo build --quiet --release --package laneformer
end=$(date +%s.%N)
echo "$start $end" | awk '{ printf "cargo build --release --package laneformer: %.1f s\n", $2 - $1 }'
crates=$(cargo tree --package laneformer --edges normal --prefix none | cut -d ' ' -f 1 | sort -u | grep -vx laneformer)
echo "crates beside it (cargo tree --edges normal): $(echo "$crates" | wc -l), $(echo $crates | sed 's/ /, /g')"
