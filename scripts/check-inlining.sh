#!/usr/bin/env bash
# Looks for calls to SIMD intrinsics in a release binary. Kernels are closures inlined into a target-feature frame; one that
# is not inlined calls its intrinsics as functions, correctly and many times slower.
set -euo pipefail
binary=${1:-target/release/laneformer}
calls=$(objdump -d --no-show-raw-insn "$binary" | grep -E 'call +[0-9a-f]+ <.*_mm(256|512)_' || true)
if [ -n "$calls" ]; then
    printf '%s\n' "$calls" | sed -E 's/.*<(.*)>.*/\1/' | sort | uniq -c | sort -rn | head -20
    echo "$binary calls intrinsics as functions: mark the closures around them #[inline(always)]" >&2
    exit 1
fi
echo "$binary: every intrinsic is inlined"
