"""Systems without a model in transformers: `nn.Transformer`, and references written out from the formulas."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .case import ACTIVATIONS, Parameters, attend, fill, keys

NAMES = ("relu", "gelu", "gelu_new", "quick_gelu", "silu")


def vanilla(case):
    draw = case.draw
    batch, source, target = draw.batch(), draw.length(), draw.length()
    sinusoid = draw.pick(None, "interleaved", "halves")
    n, width = draw.heads(multiple=2 if sinusoid else 1)
    d, vocab = n * width, draw.between(12, 50)
    case.config = {
        "layer_norm_eps": draw.pick(1e-5, 1e-12, 1e-3), "d_model": d, "nhead": n, "dim_feedforward": draw.ff(),
        "num_encoder_layers": draw.between(1, 2 if draw.small else 3), "num_decoder_layers": draw.pick(0, 1, 1, 2),
        "activation": draw.pick("relu", "gelu"), "norm_first": draw.chance(), "final_norm": draw.chance(),
    }
    c = case.config
    torch.backends.mha.set_fastpath_enabled(False)
    options = (d, n, c["dim_feedforward"], 0.0, c["activation"], c["layer_norm_eps"], True, c["norm_first"])
    norm = lambda: nn.LayerNorm(d, c["layer_norm_eps"]) if c["final_norm"] else None  # noqa: E731
    layer = nn.TransformerEncoderLayer(*options)
    model = {"encoder": nn.TransformerEncoder(layer, c["num_encoder_layers"], norm(), enable_nested_tensor=False)}
    decodes = c["num_decoder_layers"] > 0
    if decodes:
        model["decoder"] = nn.TransformerDecoder(nn.TransformerDecoderLayer(*options), c["num_decoder_layers"], norm())
    model = fill(case, nn.ModuleDict(model))
    case.reference = f"torch {torch.__version__.split('+')[0]} nn.TransformerEncoder/Decoder, no fast path, float64"
    sides = [("src", source)] + [("tgt", target)] * decodes
    if sinusoid:
        c |= {"vocab_size": vocab, "sinusoid": sinusoid}
        ids = {side: case.input(f"{side}_ids", draw.ids(vocab, batch, length)) for side, length in sides}
    else:
        given = {side: case.input(side, draw.normal(batch, length, d)) for side, length in sides}
    masks, kinds = {}, []
    for side, length in sides:
        mask, kind = draw.mask(batch, length)
        masks[side] = case.input(f"{side}_mask", mask)
        kinds.append(kind)
    case.variant = kinds + ([sinusoid] if sinusoid else []) + ["pre" if c["norm_first"] else "post"]

    def embed(w, side):
        if not sinusoid:
            return given[side].to(w.dtype)
        angles = torch.arange(ids[side].shape[1])[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        waves = torch.stack([angles.sin(), angles.cos()], -1 if sinusoid == "interleaved" else -2).flatten(1)
        return w(f"{side}_embed.weight", vocab, d)[ids[side]] * d**0.5 + waves.to(w.dtype)

    def reference(dtype):
        w, at = Parameters(case, dtype), copy.deepcopy(model).to(dtype)
        padding = {side: mask == 0 for side, mask in masks.items()}
        memory = at["encoder"](embed(w, "src"), src_key_padding_mask=padding["src"])
        if not decodes:
            return {"memory": memory}
        future = ~torch.ones(target, target).tril().bool()
        y = at["decoder"](
            embed(w, "tgt"),
            memory,
            tgt_mask=future,
            tgt_key_padding_mask=padding["tgt"],
            memory_key_padding_mask=padding["src"],
        )
        outputs = {"memory": memory, "last_hidden_state": y}
        return outputs | {"logits": w.linear("generator", y, vocab)} if sinusoid else outputs

    case.expect(reference, {"memory": "in.src_mask", "last_hidden_state": "in.tgt_mask", "logits": "in.tgt_mask"})


def transformer_xl(case):
    draw = case.draw
    batch, n, width, d = draw.batch(), draw.between(1, 5), draw.between(1, 44), 2 * draw.between(2, 50)
    if draw.small:
        width, d = min(width, 9), min(d, 24)
    segments = [draw.length(200) for _ in range(draw.between(1, 4))]
    case.config = c = {
        "vocab_size": draw.between(12, 50), "d_model": d, "n_head": n, "d_head": width, "d_inner": draw.ff(),
        "n_layer": draw.between(1, 3), "mem_len": draw.pick(draw.between(1, 8), draw.between(1, 300)),
        "clamp_len": draw.pick(-1, 0, draw.between(1, 30)), "same_length": draw.chance(), "pre_lnorm": draw.chance(),
        "untie_r": draw.chance(),
    }
    if draw.chance(0.15) and not c["same_length"]:
        c["mem_len"] = 0
    case.variant = [name.replace("_", "-") for name in ("same_length", "pre_lnorm", "untie_r") if c[name]]
    case.run = {"segments": segments}
    case.reference = "index form of kimiyoung/transformer-xl mem_transformer.py (attn_type 0), float64"
    ids = case.input("input_ids", draw.ids(c["vocab_size"], batch, sum(segments)))

    def attention(w, name, x, memory):
        """What the rows of `x` gather, before `o_net`."""
        both, (q_len, m_len) = torch.cat([memory, x], 1), (x.shape[1], memory.shape[1])
        norm = f"{name}.layer_norm"
        both = w.layer_norm(norm, both, 1e-5) if c["pre_lnorm"] else both
        q, k, v = w.linear(f"{name}.qkv_net", both, 3 * n * width, bias=False).unflatten(-1, (3, n, width)).unbind(2)
        q = q[:, m_len:]
        # One row of R per query and key: p = m_len + i - j, negative only where the key is masked.
        i, j = torch.arange(q_len)[:, None], torch.arange(m_len + q_len)
        p = (m_len + i - j).clamp(min=0).to(torch.float64)
        p = p.clamp(max=c["clamp_len"]) if c["clamp_len"] > 0 else p
        angles = p[..., None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        r = w.linear(f"{name}.r_net", torch.cat([angles.sin(), angles.cos()], -1).to(w.dtype), n * width, bias=False)
        r = r.unflatten(-1, (n, width))
        biases = f"{name}." if c["untie_r"] else ""
        u, b = w(f"{biases}r_w_bias", n, width), w(f"{biases}r_r_bias", n, width)
        scores = torch.einsum("bihd,bjhd->bhij", q + u, k) + torch.einsum("bihd,ijhd->bhij", q + b, r)
        allowed = j <= m_len + i
        if c["same_length"]:
            extra = m_len + q_len - c["mem_len"]
            allowed &= j > i - (q_len - extra if extra > 0 else q_len)
        scores = (scores / width**0.5).masked_fill(~allowed, -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)

    def ffn(w, name, x):
        return w.linear(f"{name}.CoreNet.3", w.linear(f"{name}.CoreNet.0", x, c["d_inner"]).relu(), d)

    def reference(dtype):
        w, outputs = Parameters(case, dtype), {}
        table = w("word_emb.emb_layers.0.weight", c["vocab_size"], d)
        mems = [torch.zeros(batch, 0, d, dtype=dtype) for _ in range(c["n_layer"])]
        for s, segment in enumerate(ids.split(segments, 1)):
            x = table[segment] * d**0.5
            for i in range(c["n_layer"]):
                name, ff = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"
                y = w.linear(f"{name}.o_net", attention(w, name, x, mems[i]), d, bias=False)
                both = torch.cat([mems[i], x], 1)
                mems[i] = both[:, max(both.shape[1] - c["mem_len"], 0) :]
                if c["pre_lnorm"]:
                    x = x + y
                    x = x + ffn(w, ff, w.layer_norm(f"{ff}.layer_norm", x, 1e-5))
                else:
                    x = w.layer_norm(f"{name}.layer_norm", x + y, 1e-5)
                    x = w.layer_norm(f"{ff}.layer_norm", x + ffn(w, ff, x), 1e-5)
            outputs[f"segment{s}.last_hidden_state"] = x
            outputs[f"segment{s}.logits"] = x @ table.T + w("crit.out_layers.0.bias", c["vocab_size"])
        return outputs | {f"mems.{i}": mem for i, mem in enumerate(mems)}

    case.expect(reference)


def lavit(case):
    draw = case.draw
    batch, lengths = draw.batch(), {"l": draw.length(100), "a": draw.length(100), "v": draw.length()}
    n, width = draw.heads()
    d = n * width
    stereo, placed = draw.chance(), draw.chance()
    case.config = c = {
        "hidden_act": draw.pick(*NAMES), "layer_norm_eps": draw.pick(1e-12, 1e-5),
        "type_vocab_size": draw.between(1, 3), "visual_coord_dim": 6, "vocab_size": draw.between(12, 50),
        "hidden_size": d, "num_attention_heads": n, "intermediate_size": draw.ff(),
        **{f"{s}_layers": draw.between(0 if s in "av" else 1, 2) for s in "lavx"},
        "max_position_embeddings": lengths["l"] + draw.between(0, 3), "visual_feat_dim": draw.between(1, 60),
        "audio_feat_dim": draw.between(1, 60), "num_answers": draw.between(2, 30),
        "audio_encoder": ("stereo" if stereo else "mono") + ("_st" if placed else ""),
    }
    case.variant = [c["audio_encoder"].replace("_", "-")]
    case.reference = "written out in torch after HS-YN/PanoAVQA lavit.py, float64"
    f, eps, act = c["audio_feat_dim"], c["layer_norm_eps"], ACTIVATIONS[c["hidden_act"]]
    ids = case.input("input_ids", draw.ids(c["vocab_size"], batch, lengths["l"]))
    features = {
        "v_feat": (batch, lengths["v"], c["visual_feat_dim"]), "v_coord": (batch, lengths["v"], 6),
        "a_feat": (batch, 2, lengths["a"], f) if stereo else (batch, lengths["a"], f),
    }
    if placed:
        features["a_coord"] = (batch, lengths["a"], 3)
    features = {name: case.input(name, draw.normal(*shape)) for name, shape in features.items()}
    masks = dict.fromkeys("lav")
    for stream in "lav":
        if draw.chance():
            mask, kind = draw.mask(batch, lengths[stream])
            masks[stream] = case.input(f"{stream}_mask", mask)
            case.variant.append(f"{stream}-{kind}")

    def attention(w, name, x, source, mask):
        q, k, v = (w.linear(f"{name}.self.{p}", y, d) for p, y in (("query", x), ("key", source), ("value", source)))
        y = w.linear(f"{name}.output.dense", attend(q, k, v, n, keys(mask)), d)
        return w.layer_norm(f"{name}.output.LayerNorm", x + y, eps)

    def ffn(w, inner, outer, x):
        y = w.linear(f"{outer}.dense", act(w.linear(f"{inner}.dense", x, c["intermediate_size"])), d)
        return w.layer_norm(f"{outer}.LayerNorm", x + y, eps)

    def stack(w, name, count, x, mask):
        for i in range(count):
            at = f"bert.encoder.{name}.{i}"
            x = attention(w, f"{at}.attention", x, x, mask)
            x = ffn(w, f"{at}.intermediate", f"{at}.output", x)
        return x

    def mean_of(w, name, parts):
        parts = [w.layer_norm(f"{name}.{ln}", w.linear(f"{name}.{fc}", x, d), eps) for fc, ln, x in parts]
        return sum(parts) / len(parts)

    def reference(dtype):
        w, x = Parameters(case, dtype), {name: feature.to(dtype) for name, feature in features.items()}
        tables = (("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "type_vocab_size"))
        word, position, kind = (w(f"bert.embeddings.{t}_embeddings.weight", c[rows], d) for t, rows in tables)
        embedded = word[ids] + position[: lengths["l"]] + kind[0]
        l = stack(w, "layer", c["l_layers"], w.layer_norm("bert.embeddings.LayerNorm", embedded, eps), masks["l"])
        parts = [("feature_fc", "feature_ln", x["v_feat"]), ("coord_fc", "coord_in", x["v_coord"])]
        v = stack(w, "v_layers", c["v_layers"], mean_of(w, "bert.encoder.v_fc", parts), masks["v"])
        if stereo:
            parts = [("left_fc", "left_ln", x["a_feat"][:, 0]), ("righ_fc", "righ_ln", x["a_feat"][:, 1])]
        else:
            parts = [("feat_fc", "feat_ln", x["a_feat"])]
        parts += [("cord_fc", "cord_ln", x["a_coord"])] if placed else []
        a = stack(w, "a_layers", c["a_layers"], mean_of(w, "bert.encoder.a_fc", parts), masks["a"])
        states = {"l": l, "a": a, "v": v}
        for i in range(c["x_layers"]):
            at, reads = f"bert.encoder.x_layers.{i}", ("la", "av", "vl")
            states = {s: attention(w, f"{at}.{s}{r}_attention", states[s], states[r], masks[r]) for s, r in reads}
            states = {s: attention(w, f"{at}.{s}_self_att", y, y, masks[s]) for s, y in states.items()}
            states = {s: ffn(w, f"{at}.{s}_inter", f"{at}.{s}_output", y) for s, y in states.items()}
        poolers = (("pooler", "l"), ("a_pooler", "a"), ("v_pooler", "v"))
        pooled = torch.cat([w.linear(f"bert.{name}.dense", states[s][:, 0], d).tanh() for name, s in poolers], -1)
        head = functional.gelu(w.linear("answer_head.logit_fc.0", pooled, 6 * d))
        head = w.layer_norm("answer_head.logit_fc.2", head, eps)
        return states | {"answer_logits": w.linear("answer_head.logit_fc.3", head, c["num_answers"])}

    case.expect(reference, {s: f"in.{s}_mask" for s in "lav" if masks[s] is not None})


class Layer:
    """A layer of graph, fusion and norms: `self_attn`, `norm1`, `linear1`, `linear2`, `norm2`."""

    def __init__(self, w, config):
        self.w, self.config, self.act = w, config, ACTIVATIONS[config["activation"]]
        self.eps = config.get("layer_norm_eps", config.get("eps"))

    def norm(self, name, x):
        d, w = x.shape[-1], self.w
        match self.config.get("norm", "layernorm"):
            case "layernorm":
                return w.layer_norm(name, x, self.eps)
            case "rmsnorm":
                return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * w(f"{name}.weight", d)
            case "batchnorm":
                mean, var = w(f"{name}.running_mean", d), w(f"{name}.running_var", d)
                return (x - mean) / (var + self.eps).sqrt() * w(f"{name}.weight", d) + w(f"{name}.bias", d)

    def attention(self, name, x, source, **masks):
        d = x.shape[-1]
        q, k, v = (self.w.linear(f"{name}.{p}_proj", y, d) for p, y in (("q", x), ("k", source), ("v", source)))
        return self.w.linear(f"{name}.out_proj", attend(q, k, v, self.config["num_heads"], **masks), d)

    def ffn(self, name, x):
        inner = self.act(self.w.linear(f"{name}.linear1", x, self.config["d_ff"]))
        return self.w.linear(f"{name}.linear2", inner, x.shape[-1])

    def around(self, name, x, f):
        """`f` with its residual and its norms."""
        match self.config["norm_placement"]:
            case "post":
                return self.norm(name, x + f(x))
            case "pre":
                return x + f(self.norm(name, x))
            case "sandwich":
                return x + self.norm(f"{name}_out", f(self.norm(name, x)))
            case "deepnorm":
                return self.norm(name, self.config["alpha"] * x + f(x))

    def layer(self, name, x, **masks):
        x = self.around(f"{name}.norm1", x, lambda x: self.attention(f"{name}.self_attn", x, x, **masks))
        return self.around(f"{name}.norm2", x, lambda x: self.ffn(name, x))

    def cross(self, name, x, source):
        x, mask = x
        source, allowed = source[0], keys(source[1])
        if self.config["norm_placement"] == "pre":
            source = self.norm(f"{name}.norm_kv", source)
        f = lambda x: self.attention(f"{name}.cross_attn", x, source, allowed=allowed)  # noqa: E731
        x = self.around(f"{name}.norm1", x, f)
        return self.around(f"{name}.norm2", x, lambda x: self.ffn(name, x)), mask


def layer_config(draw, placements):
    n, width = draw.heads()
    return {
        "norm_placement": draw.pick(*placements), "d_model": n * width, "num_heads": n, "d_ff": draw.ff(),
        "activation": draw.pick(*NAMES),
    }


def graph(case):
    draw = case.draw
    batch, length = draw.batch(), draw.length(600)
    case.config = c = layer_config(draw, ("post", "pre")) | {"layer_norm_eps": draw.pick(1e-5, 1e-12)}
    case.variant, case.reference = [c["norm_placement"]], "written out in torch, float64"
    x = case.input("x", draw.normal(batch, length, c["d_model"]))
    allowed = torch.ones(1, length, length, dtype=torch.bool)
    if draw.chance():
        case.variant.append("allowed")
        edges = draw.bits(draw.pick(0.02, 0.1, 0.5), draw.pick(1, batch), length, length)
        edges |= np.eye(length, dtype=np.uint8) if draw.chance() else np.uint8(0)
        if draw.chance(0.2):  # A band, so that whole blocks are empty.
            edges &= np.tri(length, length, 9, np.uint8) & (1 - np.tri(length, length, -9, np.uint8))
        allowed = allowed & case.input("allowed", edges).bool()
    if draw.chance():
        case.variant.append("groups")
        groups = draw.between(1, 5)
        ids = draw.ids(groups, batch, length)
        ids = case.input("group_ids", np.sort(ids, 1) if draw.chance() else ids)
        table = case.input("group_table", draw.bits(0.6, groups, groups)).bool()
        allowed = allowed & table[ids[:, :, None], ids[:, None, :]]
    mask, rows = None, None
    if draw.chance():
        mask, kind = draw.mask(batch, length, may_be_empty=True)
        mask, rows = case.input("attention_mask", mask), "in.attention_mask"
        case.variant.append(kind)
        allowed = allowed & mask.bool()[:, None, :]
    bias = case.input("edge_bias", draw.normal(length, length, std=2.0)) if draw.chance() else None

    def reference(dtype):
        layer = Layer(Parameters(case, dtype), c)
        of_edges = None if bias is None else bias.to(dtype)
        return {"y": layer.layer("layer", x.to(dtype), allowed=allowed[:, None], bias=of_edges)}

    case.expect(reference, rows)


def fusion(case):
    draw = case.draw
    kinds = "early_sum", "early_concat", "hier_multi_to_one", "hier_one_to_multi", "cross", "cross_concat", "mbt"
    fusion, batch = draw.pick(*kinds), draw.batch()
    lengths = [draw.length(200), draw.length(200)]
    lengths[1] = lengths[0] if fusion == "early_sum" else lengths[1]
    layers = draw.between(1, 3)
    case.config = c = {"fusion": fusion, "num_layers": layers, "layer_norm_eps": draw.pick(1e-5, 1e-6)}
    c |= layer_config(draw, ("post", "pre"))
    if fusion == "early_sum":
        c |= {"alpha": round(draw.rng.uniform(-1, 2), 3), "beta": round(draw.rng.uniform(-1, 2), 3)}
    if fusion == "mbt":
        c |= {"fusion_layer": draw.between(0, layers), "num_bottlenecks": draw.between(1, 9)}
    case.variant, case.reference = [fusion.replace("_", "-"), c["norm_placement"]], "written out in torch, float64"
    d, is_pre = c["d_model"], c["norm_placement"] == "pre"
    given, masks = [], []
    for name, length in zip("ab", lengths):
        mask, kind = draw.mask(batch, length, may_be_empty="cross" not in fusion)
        given.append(case.input(name, draw.normal(batch, length, d)))
        masks.append(case.input(f"mask_{name}", mask))
        case.variant.append(kind)

    def reference(dtype):
        w = Parameters(case, dtype)
        layer = Layer(w, c)
        a, b = ((x.to(dtype), mask) for x, mask in zip(given, masks))

        def stack(name, stream):
            x, mask = stream
            for i in range(layers):
                x = layer.layer(f"{name}.layers.{i}", x, allowed=keys(mask))
            return layer.norm(f"{name}.norm", x) if is_pre else x, mask

        def together(run, name, a, b):
            x, mask = run(name, (torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)))
            cut = [a[0].shape[1], b[0].shape[1]]
            return list(zip(x.split(cut, 1), mask.split(cut, 1)))

        if fusion == "early_sum":
            return {"z": stack("tf", (c["alpha"] * a[0] + c["beta"] * b[0], a[1]))[0]}
        if fusion == "early_concat":
            m = w("modality_embeddings.weight", 2, d)
            a, b = together(stack, "tf", (a[0] + m[0], a[1]), (b[0] + m[1], b[1]))
        elif fusion == "hier_multi_to_one":
            a, b = together(stack, "tf", stack("tf_a", a), stack("tf_b", b))
        elif fusion == "hier_one_to_multi":
            a, b = together(stack, "tf", a, b)
            a, b = stack("tf_a", a), stack("tf_b", b)
        elif fusion in ("cross", "cross_concat"):
            for i in range(layers):
                a, b = layer.cross(f"cross_a.layers.{i}", a, b), layer.cross(f"cross_b.layers.{i}", b, a)
            a, b = together(stack, "tf", a, b) if fusion == "cross_concat" else (a, b)
        else:
            one = lambda name, s: (layer.layer(name, s[0], allowed=keys(s[1])), s[1])  # noqa: E731
            count = c["num_bottlenecks"]
            tokens = w("bottleneck", 1, count, d).expand(batch, -1, -1), torch.ones(batch, count, dtype=torch.uint8)
            for i in range(layers):
                if i < c["fusion_layer"]:
                    a, b = one(f"encoder_a.layers.{i}", a), one(f"encoder_b.layers.{i}", b)
                    continue
                a, of_a = together(one, f"encoder_a.layers.{i}", a, tokens)
                b, of_b = together(one, f"encoder_b.layers.{i}", b, tokens)
                tokens = (of_a[0] + of_b[0]) / 2, tokens[1]
            a, b = ((layer.norm("encoder_norm", x), mask) for x, mask in (a, b))
            return {"a": a[0], "b": b[0], "bottleneck": tokens[0]}
        return {"a": a[0], "b": b[0]}

    case.expect(reference, {"a": "in.mask_a", "b": "in.mask_b", "z": "in.mask_a"})


def norms(case):
    draw = case.draw
    batch, length = draw.batch(), draw.length()
    mask, kind = draw.mask(batch, length, may_be_empty=True)
    if draw.chance(0.15) and mask.sum() > 1:
        return norms_train(case, mask, kind)
    norm = draw.pick("layernorm", "rmsnorm", "batchnorm")
    case.config = c = {"norm": norm, "num_layers": draw.between(1, 3), "eps": draw.pick(1e-5, 1e-8, 1e-2)}
    c |= layer_config(draw, ("post", "pre", "sandwich", "deepnorm")) | {"final_norm": draw.chance()}
    c["alpha"] = round(draw.rng.uniform(0.5, 3.0), 6)
    if c["norm_placement"] != "deepnorm":
        c.pop("alpha")
    case.variant, case.reference = [c["norm_placement"], norm, kind], "written out in torch, float64"
    x = case.input("x", draw.normal(batch, length, c["d_model"]))
    real = case.input("attention_mask", mask)

    def reference(dtype):
        layer, y = Layer(Parameters(case, dtype), c), x.to(dtype)
        for i in range(c["num_layers"]):
            y = layer.layer(f"layers.{i}", y, allowed=keys(real))
        return {"y": layer.norm("norm", y) if c["final_norm"] else y}

    case.expect(reference, "in.attention_mask")


def norms_train(case, mask, kind):
    draw, d = case.draw, case.draw.between(1, 90)
    case.config = {"d_model": d, "norm": "batchnorm", "eps": draw.pick(1e-5, 1e-3), "momentum": draw.pick(0.1, 0.3, 1.0)}
    case.run, case.variant = {"train": True}, ["batchnorm-train", kind]
    case.reference = "torch nn.BatchNorm1d in training mode on the valid rows, float64"
    x = case.input("x", draw.normal(*mask.shape, d) * draw.normal(d) + draw.normal(d, std=draw.pick(1.0, 30.0)))
    real = case.input("attention_mask", mask)

    def reference(dtype):
        w, rows, y = Parameters(case, dtype), x.to(dtype)[real.bool()], torch.zeros(x.shape, dtype=dtype)
        running = [w(f"norm.running_{of}", d).clone() for of in ("mean", "var")]
        affine = w("norm.weight", d), w("norm.bias", d)
        y[real.bool()] = functional.batch_norm(
            rows, *running, *affine, training=True, momentum=case.config["momentum"], eps=case.config["eps"]
        )
        outputs = {"y": y, "batch_mean": rows.mean(0), "batch_var": rows.var(0, correction=0)}
        return outputs | {"running_mean": running[0], "running_var": running[1]}

    case.expect(reference, {"y": "in.attention_mask"})
