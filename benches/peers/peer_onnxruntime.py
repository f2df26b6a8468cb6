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


def encoder_layer(graph, tensors, i, x, n_heads, *mask):
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

    mixed = graph.add("Attention", [x, weight, bias, *mask], MICROSOFT, num_heads=n_heads)
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


typed = helper.make_tensor_value_info


def start(graph, inputs, out, threads):
    """A session; `inputs` are names with types and shapes."""
    out = typed(out, TensorProto.FLOAT, None)
    proto = helper.make_graph(graph.nodes, "peer", inputs, [out], graph.constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def prepare(spec, tensors, threads):
    graph, inputs, out = build(spec, tensors)
    values = [typed(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    session = start(graph, values, out, threads)
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


# Names of a layer's tensors in a BERT of Hugging Face.
NAMES = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "out": "attention.output.dense",
    "norm0": "attention.output.LayerNorm", "up": "intermediate.dense", "down": "output.dense", "norm1": "output.LayerNorm",
}


class Bert:
    """The tensors of a BERT under the names that `encoder_layer` asks for."""

    def __init__(self, path):
        from safetensors.numpy import load_file

        self.tensors = load_file(path)

    def __getitem__(self, name):
        layer, part, what = name.split(".")
        what = {"gain": "weight"}.get(what, what)
        return self.tensors[f"encoder.layer.{layer}.{NAMES[part]}.{what}"]


def prepare_sentences(spec, tensors, threads):
    import json
    from pathlib import Path

    from sentences import Sentences

    directory = Path(spec["model"])
    config = json.loads((directory / "config.json").read_text())
    bert, graph = Bert(directory / "model.safetensors"), Graph()
    embedding = lambda name: graph.constant(name, bert.tensors[f"embeddings.{name}"])
    tables = [embedding(f"{name}_embeddings.weight") for name in ("word", "position", "token_type")]
    norm = [embedding(f"LayerNorm.{name}") for name in ("weight", "bias")]
    inputs = ["ids", "types", *tables, *norm, "mask"]
    eps = config["layer_norm_eps"]
    nodes = ["x", "lengths"]
    embed_node = helper.make_node("EmbedLayerNormalization", inputs, nodes, domain=MICROSOFT, epsilon=eps)
    graph.nodes.append(embed_node)
    out = "x"
    for i in range(config["num_hidden_layers"]):
        out = encoder_layer(graph, bert, i, out, config["num_attention_heads"], "lengths")
    shapes = [typed(name, TensorProto.INT32, ["batch", "tokens"]) for name in ("ids", "types", "mask")]
    session = start(graph, shapes, out, threads)

    def embed(ids, lengths):
        is_real = np.arange(ids.shape[1]) < lengths[:, None]
        feed = {"ids": ids.astype(np.int32), "types": np.zeros(ids.shape, np.int32), "mask": is_real.astype(np.int32)}
        (hidden,) = session.run(None, feed)
        mean = np.einsum("bsd,bs->bd", hidden, is_real.astype(np.float32))
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    sentences = Sentences(spec)
    return lambda: Result(sentences.embed(embed))


class Result:
    """An array as `array` wants it."""

    def __init__(self, value):
        self.numpy = lambda: value
