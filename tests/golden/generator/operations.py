"""Cases of one operation each."""

import numpy as np
import torch
from torch.nn import functional

from .case import ACTIVATIONS

ELEMENTWISE = {
    "exp": torch.exp, "tanh": torch.tanh, "erf": torch.erf, "relu": torch.relu, "gelu_erf": ACTIVATIONS["gelu"],
    "gelu_tanh": ACTIVATIONS["gelu_new"], "quick_gelu": ACTIVATIONS["quick_gelu"], "silu": ACTIVATIONS["silu"],
}


def op(case):
    kinds = [attention] * 6 + [linear] * 2 + [rows] * 2 + [batchnorm, elementwise]
    return case.draw.pick(*kinds)(case)


def attention(case):
    draw = case.draw
    batch, queries, new, past = draw.batch(), draw.length(), draw.length(600), draw.pick(0, 0, draw.length(600))
    n_kv, width, value_width = draw.between(1, 4), draw.between(1, 80), draw.between(1, 80)
    if draw.small:
        n_kv, width, value_width = min(n_kv, 2), min(width, 9), min(value_width, 9)
    n, n_keys = n_kv * draw.pick(1, 1, 2, 3), past + new
    case.config = c = {"op": "attention", "scale": draw.pick(width**-0.5, 0.1, -0.3, 1.0)}
    c |= {"softcap": draw.pick(0.0, 0.0, 0.5, 5.0, 30.0), "causal": draw.chance(0.4)}
    c["window"] = [draw.pick(-1, -1, 0, draw.between(0, 9), draw.between(0, 300)) for _ in range(2)]
    case.variant, case.reference = ["attention"] + ["causal"] * c["causal"], "written out in torch, float64"
    q = draw.normal(batch, queries, n, width, std=draw.pick(0.5, 1.0, 3.0))
    k, v = draw.normal(batch, n_keys, n_kv, width), draw.normal(batch, n_keys, n_kv, value_width)
    i, j, offset = np.arange(queries)[None, :, None], np.arange(n_keys)[None, None, :], np.zeros(batch, np.int64)
    if draw.chance(0.6):
        of_last = np.full(batch, n_keys - queries)
        offset = draw.pick(of_last, draw.ids(n_keys + 1, batch), draw.ids(n_keys + 1, batch, low=-queries))
        case.input("offset", offset)
    p = i + offset[:, None, None]
    left, right = c["window"]
    allowed = np.ones((batch, queries, n_keys), bool)
    allowed &= (j <= p) if c["causal"] else True
    allowed &= (j >= p - left) if left >= 0 else True
    allowed &= (j <= p + right) if right >= 0 else True
    if draw.chance(0.3):
        kv_len = case.input("kv_len", draw.ids(n_keys + 1, batch, low=draw.pick(0, 1))).numpy()
        allowed &= j < kv_len[:, None, None]
        case.variant.append("kv-len")
    allowed = np.repeat(allowed[:, None], n, 1)
    if draw.chance():
        shape = draw.pick(1, batch), draw.pick(1, n), queries, n_keys
        mask = draw.bits(draw.pick(0.03, 0.5, 0.95), *shape)
        mask[:, :, :, : draw.between(0, n_keys) if draw.chance(0.3) else 0] = 0
        allowed &= case.input("mask", mask).numpy().astype(bool)
        case.variant.append("mask")
    bias = None
    if draw.chance(0.4):
        bias = draw.normal(draw.pick(1, batch), draw.pick(1, n), queries, n_keys)
        if draw.chance():
            bias[draw.rng.random(bias.shape) < draw.pick(0.1, 0.9)] = -np.inf
        allowed &= case.input("bias", bias).numpy() > -np.inf
        case.variant.append("bias")
    if draw.chance(0.4):  # What nobody may see is poisoned.
        unseen = ~allowed.reshape(batch, n_kv, -1, n_keys).any(2)
        for b, head, key in np.argwhere(unseen)[:: draw.between(1, 3)]:
            bad = draw.pick(np.nan, np.inf, -np.inf)
            k[b, key, head] = draw.pick(bad, 1.0)
            v[b, key, head] = draw.pick(bad, 1e30)
        case.variant.append("poison")
    if draw.chance(0.1):  # A value that is seen shows where it is seen.
        v[0, draw.between(0, n_keys - 1), 0, 0] = draw.pick(np.nan, np.inf, -np.inf)
        case.variant.append("seen")
    if draw.chance(0.05):
        k[-1, draw.between(0, n_keys - 1), 0, 0] = np.nan
        case.variant.append("seen-key")
    case.input("q", q)
    for name, x in (("k", k), ("v", v)):
        case.input(name, x[:, past:])
        if past:
            case.input(f"past_{name}", x[:, :past])
    if past:
        case.variant.append("past")

    def reference(dtype):
        heads = lambda x: torch.from_numpy(x).to(dtype).transpose(1, 2)  # noqa: E731
        grouped = lambda x: heads(x).repeat_interleave(n // n_kv, 1)  # noqa: E731
        scores = c["scale"] * (heads(q) @ grouped(k).transpose(-1, -2))
        if c["softcap"] > 0:
            scores = c["softcap"] * torch.tanh(scores / c["softcap"])
        if bias is not None:
            scores = scores + torch.from_numpy(bias).to(dtype)
        seen, values = torch.from_numpy(allowed), grouped(v)
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        probabilities = probabilities.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        y = probabilities @ values.nan_to_num(0.0, 0.0, 0.0)
        # Special values take part where they are seen, and only there.
        special = values.masked_fill(values.isfinite(), 0.0)
        for key in special.ne(0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0]:
            part = probabilities[..., key, None] * special[..., key, None, :]
            y = y + torch.where(seen[..., key, None] & special[..., key, None, :].ne(0), part, 0.0)
        return {"y": y.transpose(1, 2)}

    case.expect(reference)


def linear(case):
    draw = case.draw
    m, n, k = draw.length(), draw.pick(draw.between(1, 70), draw.between(1, 400)), draw.pick(draw.length(), draw.between(1, 1300))
    if draw.small:
        n, k = min(n, 40), min(k, 40)
    case.config = {"op": "linear"}
    if draw.chance(0.8):
        case.config["activation"] = draw.pick("none", "relu", "gelu_erf", "gelu_tanh", "quick_gelu", "silu", "tanh")
    act = case.config.get("activation", "none")
    case.variant, case.reference = ["linear", act.replace("_", "-")], "torch, float64"
    x, w = case.input("x", draw.normal(m, k)), case.input("w", draw.normal(n, k, std=k**-0.5))
    bias = case.input("bias", draw.normal(n)) if draw.chance(0.7) else None
    residual = case.input("residual", draw.normal(m, n)) if draw.chance() else None

    def reference(dtype):
        y = functional.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
        y = y if act == "none" else ELEMENTWISE[act](y)
        return {"y": y if residual is None else y + residual.to(dtype)}

    case.expect(reference)


def rows(case):
    draw = case.draw
    name, m, n = draw.pick("softmax", "layernorm", "rmsnorm"), draw.length(), draw.pick(draw.length(), draw.between(1, 2000))
    n = min(n, 40) if draw.small else n
    case.config, case.variant, case.reference = {"op": name}, [name], "torch, float64"
    data = draw.normal(m, n) * draw.pick(0.01, 1.0, 10.0) + draw.pick(0.0, 0.0, 5.0, 100.0)
    if name == "softmax" and draw.chance(0.3):  # Masked by hand, though never a whole row.
        data[:, 1:][draw.rng.random((m, n - 1)) < 0.3] = -np.inf
    x = case.input("x", data)
    if name == "softmax":
        return case.expect(lambda dtype: {"y": x.to(dtype).softmax(-1)})
    case.config["eps"] = draw.pick(1e-5, 1e-12, 0.1)
    gain = case.input("gain", draw.normal(n))
    bias = case.input("bias", draw.normal(n)) if name == "layernorm" and draw.chance() else None

    def reference(dtype):
        y, eps = x.to(dtype), case.config["eps"]
        if name == "layernorm":
            return {"y": functional.layer_norm(y, (n,), gain.to(dtype), None if bias is None else bias.to(dtype), eps)}
        return {"y": gain.to(dtype) * y / (y.square().mean(-1, keepdim=True) + eps).sqrt()}

    case.expect(reference)


def batchnorm(case):
    draw = case.draw
    m, n, trains = draw.length() + 1, draw.length(), draw.chance()
    case.config = {"op": "batchnorm", "eps": draw.pick(1e-5, 1e-3), "training": trains, "momentum": draw.pick(0.1, 0.5, 1.0)}
    case.variant, case.reference = ["batchnorm"] + ["train"] * trains, "torch, float64"
    x = case.input("x", draw.normal(m, n) * draw.normal(n) + draw.normal(n, std=draw.pick(1.0, 20.0)))
    given = {name: draw.normal(n) for name in ("gain", "bias", "running_mean")}
    given["running_var"] = np.abs(draw.normal(n)) + np.float32(0.1)
    given = {name: case.input(name, array) for name, array in given.items()}

    def reference(dtype):
        gain, bias, mean, var = (array.to(dtype).clone() for array in given.values())
        momentum, eps = case.config["momentum"], case.config["eps"]
        y = functional.batch_norm(x.to(dtype), mean, var, gain, bias, trains, momentum, eps)
        return {"y": y} | ({"running_mean": mean, "running_var": var} if trains else {})

    case.expect(reference)


def elementwise(case):
    draw = case.draw
    name = draw.pick(*ELEMENTWISE)
    case.config, case.variant, case.reference = {"op": name}, [name.replace("_", "-")], "torch, float64"
    shape = draw.length(), draw.length()
    data = draw.normal(*shape, std=draw.pick(0.1, 1.0, 5.0, 30.0) if name != "exp" else draw.pick(1.0, 20.0))
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1e-30, 80.0, -80.0, -104.0]
    for value in special if draw.chance() else []:
        data[draw.between(0, shape[0] - 1), draw.between(0, shape[1] - 1)] = value
    x = case.input("x", data)
    case.expect(lambda dtype: {"y": ELEMENTWISE[name](x.to(dtype))})
