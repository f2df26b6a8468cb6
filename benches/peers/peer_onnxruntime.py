"""ONNX Runtime with its fused Transformer operators, those its optimiser makes of an exported BERT; inputs and outputs are bound."""

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

VERSION = ort.__version__
MICROSOFT = "com.microsoft"


def configure(threads):
    ort.set_default_logger_severity(3)


def array(out):
    return out.numpy()


class Graph:
    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op, inputs, domain="", **attributes):
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], domain=domain, **attributes))
        return out


def encoder_layer(graph, tensors, i, x, n_heads):
    get = lambda name: tensors[f"{i}.{name}"]
    constant = lambda name, value: graph.constant(f"{i}.{name}", np.ascontiguousarray(value))
    linear = lambda name: constant(f"{name}.weight", get(f"{name}.weight").T)
    plain = lambda name: constant(name, get(name))
    weight = constant("qkv.weight", np.concatenate([get(f"{p}.weight") for p in "qkv"]).T)
    bias = constant("qkv.bias", np.concatenate([get(f"{p}.bias") for p in "qkv"]))

    def close(branch, residual, name, norm):
        product = graph.add("MatMul", [branch, linear(name)])
        inputs = [product, residual, plain(f"{norm}.gain"), plain(f"{norm}.bias"), plain(f"{name}.bias")]
        return graph.add("SkipLayerNormalization", inputs, MICROSOFT, epsilon=1e-12)

    mixed = graph.add("Attention", [x, weight, bias], MICROSOFT, num_heads=n_heads)
    x = close(mixed, x, "out", "norm0")
    hidden = graph.add("MatMul", [x, linear("up")])
    hidden = graph.add("BiasGelu", [hidden, plain("up.bias")], MICROSOFT)
    return close(hidden, x, "down", "norm1")


def build(spec, tensors):
    """The graph, its inputs, and its output's name."""
    graph, op, x = Graph(), spec["op"], tensors["x"]
    inputs = {"x": x}
    if op == "layers":
        inputs["x"] = x.reshape(spec["batch"], spec["seq_len"], -1)
        out = "x"
        for i in range(spec["layers"]):
            out = encoder_layer(graph, tensors, i, out, spec["n_heads"])
    elif op == "gemm":
        out = graph.add("MatMul", ["x", graph.constant("weight", tensors["weight"].T.copy())])
    elif op == "attention":
        names = {"x": "x", "k": "k", "v": "v"}
        inputs = {name: tensors[t].reshape(spec["batch"], spec["seq_len"], -1) for name, t in names.items()}
        out = graph.add("MultiHeadAttention", list(names), MICROSOFT, num_heads=spec["n_heads"])
    elif op == "softmax":
        out = graph.add("Softmax", ["x"], axis=1)
    elif op == "layer_norm":
        affine = [graph.constant(name, tensors[name]) for name in ("gain", "bias")]
        out = graph.add("LayerNormalization", ["x", *affine], axis=1, epsilon=1e-5)
    else:
        out = graph.add("Gelu", ["x"], approximate={"gelu_erf": "none", "gelu_tanh": "tanh"}[op])
    return graph, inputs, out


def prepare(spec, tensors, threads):
    graph, inputs, out = build(spec, tensors)
    typed = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    values = [typed(name, value.shape) for name, value in inputs.items()]
    proto = helper.make_graph(graph.nodes, "peer", values, [typed(out, None)], graph.constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    bound = [ort.OrtValue.ortvalue_from_numpy(value) for value in inputs.values()]
    for name, value in zip(inputs, bound):
        binding.bind_ortvalue_input(name, value)
    shape = session.run(None, inputs)[0].shape
    result = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
    binding.bind_ortvalue_output(out, result)

    def run():
        session.run_with_iobinding(binding)
        return result

    return run
