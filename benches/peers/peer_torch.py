"""PyTorch, eager, in inference mode: its fused attention, and one product for queries, keys and values."""

import torch
import torch.nn.functional as F

VERSION = torch.__version__


def configure(threads):
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


def array(out):
    return out.numpy()


def heads_apart(x, batch, seq_len, n_heads):
    return x.view(batch, seq_len, n_heads, -1).transpose(1, 2)


def attend(q, k, v, batch, seq_len, n_heads):
    q, k, v = (heads_apart(x, batch, seq_len, n_heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * seq_len, -1)


class EncoderLayer:
    def __init__(self, tensors, i):
        get = lambda name: torch.from_numpy(tensors[f"{i}.{name}"])
        self.qkv_w = torch.cat([get(f"{part}.weight") for part in "qkv"])
        self.qkv_b = torch.cat([get(f"{part}.bias") for part in "qkv"])
        self.out = get("out.weight"), get("out.bias")
        self.up = get("up.weight"), get("up.bias")
        self.down = get("down.weight"), get("down.bias")
        self.norms = [(get(f"norm{n}.gain"), get(f"norm{n}.bias")) for n in range(2)]

    def __call__(self, x, spec):
        d = x.shape[1]
        q, k, v = F.linear(x, self.qkv_w, self.qkv_b).split(d, dim=1)
        mixed = attend(q, k, v, spec["batch"], spec["seq_len"], spec["n_heads"])
        x = F.layer_norm(x + F.linear(mixed, *self.out), (d,), *self.norms[0], 1e-12)
        hidden = F.gelu(F.linear(x, *self.up))
        return F.layer_norm(x + F.linear(hidden, *self.down), (d,), *self.norms[1], 1e-12)


def prepare(spec, tensors, threads):
    get = lambda name: torch.from_numpy(tensors[name])
    op, x = spec["op"], get("x")
    if op == "layers":
        layers = [EncoderLayer(tensors, i) for i in range(spec["layers"])]

        def body():
            y = x
            for layer in layers:
                y = layer(y, spec)
            return y

    elif op == "gemm":
        weight = get("weight")
        body = lambda: F.linear(x, weight)
    elif op == "attention":
        k, v = get("k"), get("v")
        body = lambda: attend(x, k, v, spec["batch"], spec["seq_len"], spec["n_heads"])
    elif op == "softmax":
        body = lambda: torch.softmax(x, dim=1)
    elif op == "layer_norm":
        gain, bias = get("gain"), get("bias")
        body = lambda: F.layer_norm(x, (spec["cols"],), gain, bias, 1e-5)
    else:
        approximate = {"gelu_erf": "none", "gelu_tanh": "tanh"}[op]
        body = lambda: F.gelu(x, approximate=approximate)
    return inference(body)


def prepare_system(spec, tensors, threads):
    import torch_systems

    return inference(torch_systems.prepare(spec, tensors))


def prepare_sentences(spec, tensors, threads):
    from transformers import BertModel

    from sentences import Sentences

    model = BertModel.from_pretrained(spec["model"], attn_implementation="sdpa", add_pooling_layer=False).eval()

    def embed(ids, lengths):
        ids, lengths = torch.from_numpy(ids), torch.from_numpy(lengths)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = model(ids, attention_mask=is_real.long()).last_hidden_state
        mean = (hidden * is_real[..., None]).sum(dim=1) / lengths[:, None]
        return F.normalize(mean, dim=-1).numpy()

    sentences = Sentences(spec)
    return inference(lambda: torch.from_numpy(sentences.embed(embed)))


def inference(body):
    def run():
        with torch.inference_mode():
            return body()

    return run
