"""ONNX's own operator tests as cases of one operation each, where that operation is one of ours and the data is float32."""

import warnings

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases

# The expected values are themselves of float32.
YARDSTICK = 2.5e-6
ELEMENTWISE = {"Exp": "exp", "Tanh": "tanh", "Erf": "erf", "Relu": "relu", "Swish": "silu"}


def cases():
    """Name, configuration, inputs and outputs of every test that can be put in our terms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = collect_testcases(None)
    for test in tests:
        if len(test.model.graph.node) != 1:
            continue
        node, (given, expected) = test.model.graph.node[0], test.data_sets[0]
        convert = globals().get(f"convert_{node.op_type.lower()}", convert_elementwise if node.op_type in ELEMENTWISE else None)
        if convert is None or any(x.dtype not in (np.float32, np.int64, np.bool_) for x in given):
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        values = iter(given)
        inputs = [next(values) if name else None for name in node.input]
        case = convert(node, attributes, inputs + [None] * (8 - len(inputs)), expected[0])
        if case:
            yield test.name.removeprefix("test_").replace("_", "-"), test.name, *case


def convert_elementwise(node, attributes, inputs, y):
    if attributes.get("alpha", 1.0) == 1.0:
        x = np.atleast_1d(inputs[0])
        return {"op": ELEMENTWISE[node.op_type]}, {"x": x.reshape(-1, x.shape[-1])}, y.reshape(-1, x.shape[-1])


def convert_gelu(node, attributes, inputs, y):
    form = "gelu_tanh" if attributes.get("approximate") == b"tanh" else "gelu_erf"
    x = inputs[0]
    return {"op": form}, {"x": x.reshape(-1, x.shape[-1])}, y.reshape(-1, x.shape[-1])


def convert_softmax(node, attributes, inputs, y):
    x, y = (np.moveaxis(x, attributes.get("axis", -1), -1) for x in (inputs[0], y))
    return {"op": "softmax"}, {"x": x.reshape(-1, x.shape[-1])}, y.reshape(-1, y.shape[-1])


def convert_layernormalization(node, attributes, inputs, y, op="layernorm"):
    x, gain, bias = inputs[:3]
    axis = attributes.get("axis", -1) % x.ndim
    shape = -1, int(np.prod(x.shape[axis:]))
    columns = {"gain": np.broadcast_to(gain, x.shape[axis:]).ravel()}
    if bias is not None:
        columns["bias"] = np.broadcast_to(bias, x.shape[axis:]).ravel()
    return {"op": op, "eps": attributes.get("epsilon", 1e-5)}, {"x": x.reshape(shape), **columns}, y.reshape(shape)


def convert_rmsnormalization(node, attributes, inputs, y):
    return convert_layernormalization(node, attributes, inputs, y, "rmsnorm")


def convert_batchnormalization(node, attributes, inputs, y):
    def rows(x):
        return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])

    names = "gain", "bias", "running_mean", "running_var"
    config = {"op": "batchnorm", "eps": attributes.get("epsilon", 1e-5), "momentum": 0.1}
    config["training"] = bool(attributes.get("training_mode", 0))
    return config, {"x": rows(inputs[0]), **dict(zip(names, inputs[1:5]))}, rows(y)


def convert_gemm(node, attributes, inputs, y):
    a, b, c = inputs[:3]
    a = a.T if attributes.get("transA") else a
    w = (b if attributes.get("transB") else b.T) * np.float32(attributes.get("alpha", 1.0))
    given = {"x": a, "w": w}
    if c is not None:
        c = np.float32(attributes.get("beta", 1.0)) * c
        is_row = c.ndim < 2 or c.shape[0] == 1
        given |= {"bias": np.broadcast_to(c, (1, y.shape[1])).ravel()} if is_row else {"residual": np.broadcast_to(c, y.shape)}
    return {"op": "linear"}, given, y


def convert_attention(node, attributes, inputs, y):
    q, k, v, mask, past_k, past_v, kv_len, _ = inputs
    n, n_kv = attributes.get("q_num_heads"), attributes.get("kv_num_heads")

    def heads(x, n):  # [B, T, H D] as it is, or [B, H, T, D].
        return x.reshape(*x.shape[:2], n, -1) if x.ndim == 3 else x.transpose(0, 2, 1, 3)

    given = {"q": heads(q, n), "k": heads(k, n_kv), "v": heads(v, n_kv)}
    batch, queries, _, width = given["q"].shape
    past = 0
    if past_k is not None:
        given |= {"past_k": past_k.transpose(0, 2, 1, 3), "past_v": past_v.transpose(0, 2, 1, 3)}
        past = past_k.shape[2]
    offset = np.full(batch, past)
    if kv_len is not None:
        given["kv_len"] = kv_len
        offset = kv_len - queries
    given["offset"] = offset
    if mask is not None:
        keys, is_bits = past + given["k"].shape[1], mask.dtype == np.bool_
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        mask = np.pad(mask, missing, constant_values=False if is_bits else -np.inf)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = np.broadcast_to(mask, (*mask.shape[:2], queries, keys))
        given |= {"mask": mask.astype(np.uint8)} if is_bits else {"bias": mask}
    config = {
        "op": "attention", "scale": attributes.get("scale", width**-0.5), "softcap": attributes.get("softcap", 0.0),
        "causal": bool(attributes.get("is_causal", 0)),
        "window": [attributes.get(f"{side}_window_size", -1) for side in ("left", "right")],
    }
    return config, given, heads(y, n)
