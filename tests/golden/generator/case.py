"""A case and its three files, see README.md beside the cases."""

import json

import numpy as np
import torch
from safetensors.numpy import save_file

from .draw import initial


class Case:
    def __init__(self, system, draw):
        self.system, self.draw = system, draw
        self.variant, self.description, self.reference = [], "", ""
        self.defaults = None
        self.config, self.run, self.inputs, self.outputs, self.weights = {}, {}, {}, {}, {}

    def input(self, name, array):
        """Adds `in.<name>` and returns it as a tensor."""
        self.inputs[f"in.{name}"] = np.array(array, order="C")
        return torch.from_numpy(self.inputs[f"in.{name}"])

    def exact(self, name, array):
        """Adds an output of integers."""
        self.outputs[f"out.{name}"] = np.ascontiguousarray(array, np.int64), {"rows": None}

    def expect(self, reference, rows=None):
        """Adds the outputs of `reference`, a function of a dtype, run in float64 and for the yardstick in float32. `rows` names
        the mask of the rows to be compared: of all outputs, or of each in a dictionary."""
        with torch.no_grad():
            exact, single = reference(torch.float64), reference(torch.float32)
        for name, value in exact.items():
            of_output = rows.get(name) if isinstance(rows, dict) else rows
            value, other = value.numpy(), single[name].numpy().astype(np.float64)
            assert value.dtype == np.float64 and single[name].dtype == torch.float32, name
            if of_output:
                mask = self.inputs.get(of_output)
                mask = self.outputs[of_output][0] if mask is None else mask
                padding = (mask == 0).reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
                value, other = np.where(padding, 0.0, value), np.where(padding, 0.0, other)
            finite = np.isfinite(value) & np.isfinite(other)
            error = np.abs(np.where(finite, value, 0.0) - np.where(finite, other, 0.0)).max(initial=0.0)
            largest = np.abs(np.where(finite, value, 0.0)).max(initial=0.0)
            spec = {
                "rows": of_output,
                "torch_f32_max_abs": float(f"{error:.3g}"),
                "ref_max_abs": float(f"{largest:.4g}"),
            }
            self.outputs[f"out.{name}"] = value.astype(np.float32), spec

    def write(self, directory):
        def spec(array, more=()):
            kind = {"float32": "f32", "int64": "i64", "uint8": "u8"}[str(array.dtype)]
            return {"shape": list(array.shape), "dtype": kind, **dict(more)}

        config = self.config
        if self.defaults:  # Then fields other than sizes are left out where they are at their defaults.
            at_default = {k for k, v in config.items() if v == getattr(self.defaults, k, None) and type(v) is not int}
            config = {k: v for k, v in config.items() if k not in at_default}
        directory.mkdir(parents=True, exist_ok=True)
        description = {
            "format": 1,
            "system": self.system,
            "variant": directory.name.removeprefix(f"{self.system}-"),
            "set": "generated",
            "description": self.description,
            "config": config,
            "run": self.run,
            "inputs": {name: spec(array) for name, array in self.inputs.items()},
            "outputs": {name: spec(array, more) for name, (array, more) in self.outputs.items()},
            "reference": self.reference,
        }
        (directory / "case.json").write_text(json.dumps(description, indent=1) + "\n")
        outputs = {name: np.ascontiguousarray(array) for name, (array, _) in self.outputs.items()}
        save_file(self.inputs | outputs, directory / "io.safetensors")
        save_file(self.weights, directory / "weights.safetensors")


class Parameters:
    """The weights of a reference that is written out here; they come into being when they are first asked for."""

    def __init__(self, case, dtype):
        self.case, self.dtype = case, dtype

    def __call__(self, name, *shape):
        weights = self.case.weights
        if name not in weights:
            weights[name] = initial(self.case.draw, name, shape)
        assert weights[name].shape == shape, name
        return torch.from_numpy(weights[name]).to(self.dtype)

    def linear(self, name, x, out, bias=True):
        y = x @ self(f"{name}.weight", out, x.shape[-1]).T
        return y + self(f"{name}.bias", out) if bias else y

    def layer_norm(self, name, x, eps):
        d = x.shape[-1]
        return torch.nn.functional.layer_norm(x, (d,), self(f"{name}.weight", d), self(f"{name}.bias", d), eps)


def fill(case, model, names=lambda name: True):
    """Draws the weights of a module, tied ones once, and keeps those that `names` is true of."""
    persistent = model.state_dict().keys()
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            array = initial(case.draw, name, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(array))
            if names(name):
                case.weights[name] = array
    return model.eval()


def attend(q, k, v, n_heads, allowed=None, bias=None):
    """Attention of [B, T, d]; `allowed` and `bias` broadcast to [B, heads, queries, keys]. Rows without a key are 0."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    probabilities = torch.softmax(scores, -1).nan_to_num(0.0)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def keys(mask):
    """A mask of keys [B, T] as one of scores."""
    return None if mask is None else mask.bool()[:, None, None, :]


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
}
