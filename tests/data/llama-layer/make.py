"""One decoder layer of transformers' Llama with random weights, in float64: writes layer.safetensors beside this file.

Run with torch 2.15, transformers 5.23 and safetensors 0.8. Weights, inputs and outputs are stored as float32; weights and inputs are so
before the layer runs, so the outputs are rounded once. Whatever the type of the model, transformers computes norms, softmax and rotary
angles in float32: here its module sees float64 under that name, and gets cosines and sines that are made by its formula in float64.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama


class Wide:
    """torch, with float64 in place of float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


TOKENS, DIM, BASE, FACTOR = 70, 12, 500.0, 4.0

torch.manual_seed(1)
config = LlamaConfig(
    hidden_size=32,
    intermediate_size=44,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=DIM,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
layer = modeling_llama.LlamaDecoderLayer(config, 0).double().eval()
modeling_llama.torch = Wide()
for name, weight in layer.named_parameters():
    scale = weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.3
    weight.data = (torch.randn_like(weight) * scale + (weight.dim() == 1)).float().double()
# Larger scores than random weights give, so that attention has something to choose.
layer.self_attn.q_proj.weight.data *= 2.0

x = torch.randn(1, TOKENS, 32).float()
places = torch.arange(TOKENS)
# With gaps, and out of order.
positions = (places * 7) % 101
mask = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def run(positions, factor=1.0):
    frequencies = BASE ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM) / factor
    angles = positions.double()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    with torch.no_grad():
        y = layer(x.double(), attention_mask=mask, position_embeddings=(angles.cos(), angles.sin()))
    return y[0].float()


tensors = {name: weight.float().contiguous() for name, weight in layer.named_parameters()}
tensors |= {
    "x": x[0].contiguous(),
    "y": run(places),
    "y_linear": run(places, FACTOR),
    "positions": positions,
    "y_positions": run(positions),
}
save_file(tensors, Path(__file__).with_name("layer.safetensors"))
print({name: list(tensor.shape) for name, tensor in tensors.items()})
