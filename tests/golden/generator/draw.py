"""Random choices. Everything about a case follows from its system and its seed."""

import zlib

import numpy as np

MASKS = ("none", "right", "left", "middle", "random", "mixed")


class Draw:
    def __init__(self, system, seed, small):
        self.rng = np.random.default_rng([seed, zlib.crc32(system.encode())])
        self.small = small

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability=0.5):
        return bool(self.rng.random() < probability)

    def between(self, low, high):
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def batch(self):
        return self.between(1, 2 if self.small else 4)

    def length(self, longest=300):
        """Mostly short; now and then more than a tile of queries (64) or a chunk or two of keys (256)."""
        spans = [(1, 8), (1, 20), (9, 40), (60, 70), (120, 140), (250, 300), (510, 600)]
        low, high = spans[self.rng.integers(2 if self.small else len(spans))]
        return min(self.between(low, high), longest)

    def heads(self, multiple=1, even_head=1):
        """The number of heads and their width, whose product is a multiple of `multiple`."""
        while True:
            n = self.pick(1, 2, 3, 4, 5, 6, 7, 8)
            width = self.pick(self.between(1, 24), self.between(8, 48), self.between(30, 80), 16, 64)
            n = min(n, 3) if self.small else n
            width = min(width, 13) if self.small else width
            if n * width % multiple == 0 and 2 <= n * width <= 240 and width % even_head == 0:
                return n, width

    def ff(self):
        return self.between(1, 40) if self.small else self.pick(self.between(1, 100), self.between(100, 600))

    def normal(self, *shape, std=1.0):
        return (self.rng.standard_normal(shape) * std).astype(np.float32)

    def ids(self, below, *shape, low=0):
        return self.rng.integers(low, below, shape)

    def bits(self, probability, *shape):
        return (self.rng.random(shape) < probability).astype(np.uint8)

    def mask(self, batch, length, kinds=MASKS, may_be_empty=False):
        """Real tokens [batch, length] and what kind of mask it is. Unless they may, no sequence is all padding."""
        kind = self.pick(*kinds)
        mask = np.ones((batch, length), np.uint8)
        for row in mask:
            of_row = self.pick(*MASKS[:5]) if kind == "mixed" else kind
            cut = self.between(0, length - 1)
            if of_row == "right":
                row[length - cut :] = 0
            elif of_row == "left":
                row[:cut] = 0
            elif of_row == "middle":
                row[length // 3 : max(length // 3 + cut // 2, length // 3)] = 0
            elif of_row == "random":
                row[:] = self.bits(self.pick(0.2, 0.5, 0.9), length)
            if not row.any():
                row[self.between(0, length - 1)] = 1
        if may_be_empty and batch > 1 and kind != "none" and self.chance(0.2):
            mask[self.between(0, batch - 1)] = 0
            kind += "-empty"
        return mask, kind


def initial(draw, name, shape):
    """A weight as trained models have them: its spread follows from its name and its fan-in."""
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        return (0.5 + draw.rng.random(shape)).astype(np.float32)
    if last == "logit_scale":
        return np.array(draw.rng.uniform(0.0, 3.0), np.float32)
    is_norm = any(part in name for part in ("norm", "Norm", "ln_", "_ln", "coord_in", "logit_fc.2"))
    if len(shape) == 1:
        if is_norm and last in ("weight", "gain"):
            return (1.0 + draw.normal(*shape, std=0.2)).astype(np.float32)
        return draw.normal(*shape, std=0.3 if last == "running_mean" else 0.15)
    if any(part in name for part in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed", "final_logits_bias")):
        return draw.normal(*shape, std=0.3)
    if len(shape) < 4 and any(part in name for part in ("emb", "wte", "wpe", "bottleneck", "centroids")):
        is_scaled = any(part in name for part in ("word_emb.emb_layers", "src_embed", "tgt_embed"))  # By sqrt(d).
        return draw.normal(*shape, std=0.2 if is_scaled else 0.5)
    if any(part in name for part in ("c_attn", "c_proj", "c_fc")) or (len(shape) == 3 and last != "o"):
        fan_in = shape[0]
    else:
        fan_in = int(np.prod(shape[1:]))
    is_query_or_key = any(part in name for part in ("q_", "k_", "query", "key", "in_proj", "c_attn", "qkv", "rel_attn"))
    return draw.normal(*shape, std=(1.4 if is_query_or_key else 1.0) / fan_in**0.5)
