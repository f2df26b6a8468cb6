"""OpenVINO on the CPU in f32, compiled for latency; its own fusions of the plain graph."""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

VERSION = ov.__version__.split("-")[0]


def configure(threads):
    pass


def array(out):
    return out.data


def constant(value):
    return ops.constant(np.ascontiguousarray(value))


def linear(x, weight, bias=None):
    y = ops.matmul(x, constant(weight), False, True)
    return y if bias is None else ops.add(y, constant(bias))


def layer_norm(x, gain, bias, eps):
    axes = constant(np.array([-1], dtype=np.int64))
    y = ops.mvn(x, axes, True, eps, "inside_sqrt")
    return ops.add(ops.multiply(y, constant(gain)), constant(bias))


def attend(q, k, v, spec):
    shape = constant(np.array([spec["batch"], spec["seq_len"], spec["n_heads"], -1], dtype=np.int64))
    swap = constant(np.array([0, 2, 1, 3], dtype=np.int64))
    q, k, v = (ops.transpose(ops.reshape(x, shape, False), swap) for x in (q, k, v))
    y = ops.transpose(ops.scaled_dot_product_attention(q, k, v), swap)
    merged = constant(np.array([spec["batch"], spec["seq_len"], -1], dtype=np.int64))
    return ops.reshape(y, merged, False)


def encoder_layer(x, tensors, i, spec):
    get = lambda name: tensors[f"{i}.{name}"]
    affine = lambda name: (get(f"{name}.weight"), get(f"{name}.bias"))
    norm = lambda x, n: layer_norm(x, get(f"norm{n}.gain"), get(f"norm{n}.bias"), 1e-12)
    q, k, v = (linear(x, *affine(part)) for part in "qkv")
    x = norm(ops.add(x, linear(attend(q, k, v, spec), *affine("out"))), 0)
    hidden = ops.gelu(linear(x, *affine("up")), "erf")
    return norm(ops.add(x, linear(hidden, *affine("down"))), 1)


def build(spec, tensors):
    """The inputs' values by parameter, and the output."""
    op, value = spec["op"], tensors["x"]
    values = [value]
    if op in ("layers", "attention"):
        names = ["x", "k", "v"] if op == "attention" else ["x"]
        values = [tensors[name].reshape(spec["batch"], spec["seq_len"], -1) for name in names]
    inputs = [ops.parameter(list(v.shape), np.float32) for v in values]
    x = inputs[0]
    if op == "layers":
        for i in range(spec["layers"]):
            x = encoder_layer(x, tensors, i, spec)
    elif op == "gemm":
        x = linear(x, tensors["weight"])
    elif op == "attention":
        x = attend(*inputs, spec)
    elif op == "softmax":
        x = ops.softmax(x, 1)
    elif op == "layer_norm":
        x = layer_norm(x, tensors["gain"], tensors["bias"], 1e-5)
    else:
        x = ops.gelu(x, {"gelu_erf": "erf", "gelu_tanh": "tanh"}[op])
    return inputs, values, x


def prepare(spec, tensors, threads):
    inputs, values, out = build(spec, tensors)
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = ov.Core().compile_model(ov.Model([out], inputs), "CPU", config)
    request = compiled.create_infer_request()
    for i, value in enumerate(values):
        request.set_input_tensor(i, ov.Tensor(np.ascontiguousarray(value), shared_memory=True))
    result = request.get_output_tensor(0)

    def run():
        request.infer()
        return result

    # The inputs' memory is lent, not copied.
    run.lent = values
    return run
