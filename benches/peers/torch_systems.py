"""The systems of `laneformer compare` in PyTorch: the models of transformers with the weights that are handed over, and Transformer-XL."""

import math

import torch
import torch.nn.functional as F
import transformers as hf


def load(cls, config, tensors, left_out=(), attention=None, **options):
    """A model with these weights; only those whose names begin with one of `left_out` may be missing."""
    weights = {name: torch.from_numpy(tensors[name]) for name in tensors.shapes if not name.startswith("input.")}
    attention = attention or ("sdpa" if cls._supports_sdpa else "eager")
    model, info = cls.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation=attention, output_loading_info=True, **options
    )
    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(left_out))]
    if missing or info["mismatched_keys"]:
        raise ValueError(f"weights: missing {sorted(missing)[:4]}, of other shapes {list(info['mismatched_keys'])[:4]}")
    return model.eval()


def values(tensors, name):
    return torch.from_numpy(tensors[f"input.{name}"])


def tokens(tensors, name="ids"):
    return values(tensors, name).long()


def bert(config, tensors, spec):
    model = load(hf.BertModel, hf.BertConfig(**config), tensors, add_pooling_layer=False)
    ids = tokens(tensors)
    return lambda: model(ids).last_hidden_state


def gpt_prefill(config, tensors, spec):
    model = load(hf.GPT2LMHeadModel, hf.GPT2Config(**config), tensors)
    ids = tokens(tensors)
    return lambda: model(ids, use_cache=True, logits_to_keep=1).logits


def gpt_decode(config, tensors, spec):
    model = load(hf.GPT2LMHeadModel, hf.GPT2Config(**config), tensors)
    ids = tokens(tensors)
    before, token = ids[:, :-1], ids[:, -1:]
    with torch.inference_mode():
        cache = model(before, use_cache=True, logits_to_keep=1).past_key_values

    def body():
        logits = model(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return body


def longformer(config, tensors, spec):
    model = load(hf.LongformerModel, hf.LongformerConfig(**config), tensors, add_pooling_layer=False)
    ids = tokens(tensors)
    is_global = torch.zeros_like(ids)
    is_global[:, : spec["context"]] = 1
    is_real = torch.ones_like(ids)
    return lambda: model(ids, attention_mask=is_real, global_attention_mask=is_global).last_hidden_state


def xlnet(config, tensors, spec):
    model = load(hf.XLNetModel, hf.XLNetConfig(**config), tensors)
    ids = tokens(tensors)
    segments = (torch.arange(ids.shape[1]) >= ids.shape[1] // 2).long().expand_as(ids)
    return lambda: model(ids, token_type_ids=segments).last_hidden_state


def clip(config, tensors, spec):
    vision = hf.CLIPVisionConfig(**config["vision_config"], projection_dim=config["projection_dim"])
    model = load(hf.CLIPVisionModelWithProjection, vision, tensors)
    pixels = values(tensors, "pixels")
    return lambda: F.normalize(model(pixels).image_embeds, dim=-1)


def detr_model(config, tensors):
    backbone = hf.ResNetConfig(**config["backbone_config"], out_features=["stage4"])
    config = hf.DetrConfig(
        **{**config, "backbone_config": backbone}, use_timm_backbone=False, use_pretrained_backbone=False, decoder_layers=1
    )
    # The decoder is not run, and the backbone has no attention of any kind.
    attention = {"": "sdpa", "backbone_config": "eager"}
    return load(hf.DetrModel, config, tensors, ["decoder.", "query_position_embeddings."], attention)


def detr_positions(model, features, mask):
    positions = model.position_embedding(shape=features.shape, device=features.device, dtype=features.dtype, mask=mask)
    return positions.flatten(2).transpose(1, 2)


def detr_encoder(config, tensors, spec):
    model = detr_model(config, tensors)
    features = values(tensors, "pixels")
    mask = torch.ones((features.shape[0], *features.shape[2:]), dtype=torch.bool)
    with torch.inference_mode():
        positions = detr_positions(model, features, mask)
    return lambda: detr_encode(model, features, positions)


def detr_encode(model, features, positions):
    x = model.input_projection(features).flatten(2).transpose(1, 2)
    return model.encoder(inputs_embeds=x, spatial_position_embeddings=positions).last_hidden_state


def detr(config, tensors, spec):
    model = detr_model(config, tensors)
    pixels = values(tensors, "pixels")
    pixel_mask = torch.ones((pixels.shape[0], *pixels.shape[2:]))

    def body():
        features, mask = model.backbone(pixels, pixel_mask)[-1]
        return detr_encode(model, features, detr_positions(model, features, mask))

    return body


def bart(config, tensors, spec):
    model = load(hf.BartForConditionalGeneration, hf.BartConfig(**config), tensors)
    source, target = tokens(tensors, "source"), tokens(tensors)
    return lambda: model(source, decoder_input_ids=target, use_cache=False).logits


class TransformerXl:
    """One segment behind a memory, as its authors compute it: in every layer the memory's rows and all positions are projected again."""

    def __init__(self, config, tensors):
        self.config = config
        self.get = lambda name: torch.from_numpy(tensors[name])
        self.table = self.get("word_emb.emb_layers.0.weight")
        self.biases = [self.get(name).unsqueeze(1) for name in ("r_w_bias", "r_r_bias")]
        self.layers = [self.layer(f"layers.{i}") for i in range(config["n_layer"])]

    def layer(self, at):
        names = {"qkv": "dec_attn.qkv_net", "r": "dec_attn.r_net", "out": "dec_attn.o_net", "norm0": "dec_attn.layer_norm",
                 "up": "pos_ff.CoreNet.0", "down": "pos_ff.CoreNet.3", "norm1": "pos_ff.layer_norm"}
        weights = {key: [self.get(f"{at}.{name}.weight")] for key, name in names.items()}
        for key in ("norm0", "up", "down", "norm1"):
            weights[key].append(self.get(f"{at}.{names[key]}.bias"))
        return weights

    def heads(self, x):
        return x.view(x.shape[0], self.config["n_head"], self.config["d_head"]).transpose(0, 1)

    def attend(self, layer, x, memory, distances, hidden):
        q, k, v = F.linear(torch.cat([memory, x]), *layer["qkv"]).chunk(3, dim=-1)
        q, k, v = self.heads(q[-len(x) :]), self.heads(k), self.heads(v)
        r = self.heads(F.linear(distances, *layer["r"]))
        by_content = (q + self.biases[0]) @ k.transpose(1, 2)
        scores = by_content + shifted((q + self.biases[1]) @ r.transpose(1, 2))
        scores = (scores / math.sqrt(self.config["d_head"])).masked_fill(hidden, -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ v
        return F.linear(mixed.transpose(0, 1).reshape(len(x), -1), *layer["out"])

    def __call__(self, ids, memories):
        config, d = self.config, self.config["d_model"]
        x = F.embedding(ids, self.table) * math.sqrt(d)
        queries, keys = len(ids), len(ids) + len(memories[0])
        farthest_first = torch.arange(keys - 1, -1, -1.0).clamp(max=config["clamp_len"])
        angles = torch.outer(farthest_first, 10000 ** (-torch.arange(0, d, 2.0) / d))
        distances = torch.cat([angles.sin(), angles.cos()], dim=-1)
        # Every token sees as many keys as the memory holds, itself included.
        distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
        hidden = (distance < 0) | (distance >= config["mem_len"])
        for layer, memory in zip(self.layers, memories):
            x = F.layer_norm(x + self.attend(layer, x, memory, distances, hidden), (d,), *layer["norm0"], 1e-5)
            inner = F.relu(F.linear(x, *layer["up"]))
            x = F.layer_norm(x + F.linear(inner, *layer["down"]), (d,), *layer["norm1"], 1e-5)
        return x


def shifted(scores):
    """Column j of row i from distances to places, [heads, queries, keys]: row i moves right by its distance to the last row."""
    heads, queries, keys = scores.shape
    padded = F.pad(scores, (1, 0)).view(heads, keys + 1, queries)
    return padded[:, 1:].reshape(heads, queries, keys)


def transformer_xl(config, tensors, spec):
    model = TransformerXl(config, tensors)
    ids = tokens(tensors)[0]
    memories = [values(tensors, f"mems.{i}")[0] for i in range(config["n_layer"])]
    return lambda: model(ids, memories)


SYSTEMS = {
    "bert": bert,
    "gpt_prefill": gpt_prefill,
    "gpt_decode": gpt_decode,
    "longformer": longformer,
    "transformer_xl": transformer_xl,
    "xlnet": xlnet,
    "clip": clip,
    "detr_encoder": detr_encoder,
    "detr": detr,
    "bart": bart,
}


def prepare(spec, tensors):
    return SYSTEMS[spec["system"]](spec["config"], tensors, spec)
