"""The model of docs/performance.md: the time of a layer from the times of its parts.

    (laneformer bench --threads 1 --json; laneformer bench --threads 2 --json) > run.jsonl
    python benches/peers/schedule_model.py run.jsonl

The lines of `laneformer compare --json` do as well.

Every rate comes from the run: the products from the rows gemm/f32/m1024*, scores and exponentials from the softmax row, gelu and norm from theirs.
What is added for other core counts is the number of tiles of a phase, which `Split` in src/split.rs decides, and the waits between phases.
"""

import json
import sys
from math import ceil

PANEL, MAX_ROWS, FEW, BLOCK = 64, 96, 24, 64
PADDING = 16

# Microseconds from the last tile of a phase to the first of the next: a line that travels to every core.
BARRIER_US = 0.3


def split(rows, cols, max_rows, members):
    """`Split::new`: rows and columns of a tile."""
    tiles = ceil(ceil(rows / max_rows) / members) * members
    by_rows = ceil(rows / tiles)
    if by_rows >= FEW or rows > members * FEW:
        return by_rows, cols
    return min(rows, max_rows), per_tile(ceil(cols / PANEL), [0, 1], members) * PANEL


def per_tile(units, starts, members):
    """`per_tile`: panels or heads of a tile of blocks of rows that begin at `starts`, so that the largest share is small."""
    rows = [end - start for start, end in zip(starts, starts[1:])]

    def largest_share(per_tile):
        sizes = [min(per_tile, units - done) * n for done in range(0, units, per_tile) for n in rows]
        tiles = len(sizes)
        return max(sum(sizes[m * tiles // members : (m + 1) * tiles // members]) for m in range(members))

    most = min(units, max(1, ceil(units * len(rows) / (2 * members))))
    even = 17 / 16 * units * starts[-1] / members
    return min(range(most, 0, -1), key=lambda per_tile: max(even, largest_share(per_tile)))


def ffn_rows(d, f):
    scratch = PANEL + min(512, f) + PADDING + d + PADDING
    return max(6, min(MAX_ROWS, 704 * 1024 // 4 // (d + scratch)))


class Rates:
    """GFLOP/s of one core's products and nanoseconds per element of the rest, of one thread."""

    def __init__(self, lines):
        one = {line["name"]: line for line in lines if line["threads"] == 1}
        rate = lambda name: one[name]["flops"] / one[name]["ns"]
        element = lambda name: one[name]["ns"] / one[name]["elements"]
        self.peak = max(line["peak_gflops"] for line in one.values())
        self.wide = rate("gemm/f32/m1024n3072k768")
        self.deep = rate("gemm/f32/m1024n768k3072")
        # Fewer rows than a register tile takes: the panel's loads are the bound.
        self.few = {m: rate(f"gemm/f32/m{m}n3072k768") for m in (8, 16)}
        self.softmax = element("softmax/f32/384x512")
        self.gelu = element("gelu_erf/f32/64x3072")
        self.norm = element("layernorm/f32/256x768")

    def product(self, rows, deep=False):
        rate = self.deep if deep else self.wide
        return min(rate, self.few[16]) if rows <= 16 else rate


class Phase:
    def __init__(self, name, flops, weights, down, across, ns):
        self.name, self.flops, self.weights = name, flops, weights
        self.tiles, self.down, self.ns = down * across, down, ns

    def time(self, members):
        """Nanoseconds: the busiest member's tiles, then the wait."""
        rounds = ceil(self.tiles / members)
        wait = 0 if members == 1 else BARRIER_US * 1e3 * max(1, members / 4)
        return self.ns * rounds / self.tiles + wait


def phases(dims, batch, seq_len, members, rates):
    """A post-norm layer as `layer.rs` runs it; `ns` is one core's time for all of a phase."""
    d, heads, f = dims
    t = batch * seq_len
    result = []

    def product(name, flops, weights, rows, cols, max_rows, deep=False, extra=0.0):
        r, c = split(rows, cols, max_rows, members)
        down, across = ceil(rows / r), ceil(cols / c)
        ns = flops / rates.product(r, deep) + extra
        result.append(Phase(name, flops, weights * down, down, across, ns))
        return across == 1

    down = ceil(t / BLOCK)
    # Heads of whole panels: two of MiniLM's.
    groups = d // PANEL
    starts = [min(t, i * BLOCK) for i in range(down + 1)]
    parts = 1 if members == 1 else ceil(groups / per_tile(groups, starts, members))
    qkv = 6 * t * d * d
    result.append(Phase("qkv", qkv, 12 * d * d * down, down, parts, qkv / rates.product(min(t, BLOCK))))

    blocks = batch * ceil(seq_len / BLOCK)
    rows = t / blocks
    heads_per_tile = max(1, min(ceil(heads / members), int((1 << 14) / (rows * min(seq_len, 1 << 14)))))
    scores = 4 * t * seq_len * d
    ns = scores / (0.94 * rates.wide) + t * seq_len * heads * rates.softmax
    result.append(Phase("attention", scores, 0, blocks, ceil(heads / heads_per_tile), ns))

    norm = 2 * t * d * rates.norm / 2
    whole = product("out", 2 * t * d * d, 4 * d * d, t, d, MAX_ROWS, extra=norm)
    if not whole:
        result.append(Phase("norm", 0, 0, members, 1, norm))
    most = ffn_rows(d, f)
    gelu = t * f * max(0.0, rates.gelu - 0.03)  # The loads and stores of the row operation are the product's own.
    r, _ = split(t, d, most, members)
    if split(t, d, most, members)[1] >= d:
        down = ceil(t / r)
        ns = 2 * t * d * f / rates.product(r) + 2 * t * d * f / rates.product(r, True) + gelu + norm
        result.append(Phase("ffn", 4 * t * d * f, 8 * d * f * down, down, 1, ns))
    else:
        product("up", 2 * t * d * f, 4 * d * f, t, f, MAX_ROWS, extra=gelu)
        if not product("down", 2 * t * d * f, 4 * d * f, t, d, MAX_ROWS, deep=True):
            result.append(Phase("norm", 0, 0, members, 1, norm))
    return result


DIMS = {"bert-base": (768, 12, 3072), "minilm": (384, 12, 1536)}
CORES = (8, 16, 64)


def read(path):
    """Lines of `compare`, or of `bench` with its names changed."""
    lines = [json.loads(line) for line in open(path)]
    for line in lines:
        line.setdefault("ns", line.get("median_ns"))
        if line.get("ns_per_element"):
            line["elements"] = line["ns"] / line["ns_per_element"]
    return lines


def main():
    lines = read(sys.argv[1])
    rates = Rates(lines)
    print(f"peak {rates.peak:.0f} GFLOP/s, products {rates.wide:.0f} and {rates.deep:.0f}")
    layers = [line for line in lines if line["name"].startswith("layer/")]
    names = list(dict.fromkeys(line["name"] for line in layers))
    measured = {(line["name"], line["threads"]): line for line in layers}
    threads = sorted({line["threads"] for line in layers})
    head = [f"{n} thread{'s' * (n > 1)}: predicted | measured | ratio" for n in threads]
    print("| layer |", " | ".join(head), "|\n|---|" + "---:|" * 3 * len(threads))
    for name in names:
        _, _, model, shape = name.split("/")
        batch, seq_len = map(int, shape[1:].split("s"))
        cells = []
        for n in threads:
            line = measured[name, n]
            time = sum(p.time(n) for p in phases(DIMS[model], batch, seq_len, n, rates))
            cells.append(f"{time / 1e6:.3f} | {line['ns'] / 1e6:.3f} ms | {line['ns'] / time:.2f}")
        print("|", name, "|", " | ".join(cells), "|")
    print("\n| layer |", " | ".join(f"{n} cores | GB/s" for n in CORES), "|\n|---|" + "---:|---:|" * len(CORES))
    for name in names:
        _, _, model, shape = name.split("/")
        batch, seq_len = map(int, shape[1:].split("s"))
        cells = []
        for n in CORES:
            steps = phases(DIMS[model], batch, seq_len, n, rates)
            time = sum(p.time(n) for p in steps)
            flops = sum(p.flops for p in steps)
            weights = sum(p.weights for p in steps)
            cells.append(f"{time / 1e6:.3f} ms, {100 * flops / time / rates.peak / n:.0f} % | {weights / time:.0f}")
        print("|", name, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
