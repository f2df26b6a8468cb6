"""Systems whose reference is a model of transformers."""

import contextlib
import copy
import unittest.mock

import numpy as np
import torch
import transformers
from torch.nn import functional

from .case import Parameters, fill

ACTIVATIONS = ("gelu", "relu", "gelu_new", "quick_gelu", "silu")
TOP_GAP = 0.02


@contextlib.contextmanager
def precision(dtype):
    """Some models compute softmax and sinusoids in float32 whatever their dtype; here they follow it."""
    softmax = functional.softmax
    follow = unittest.mock.patch.object(functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
    sinusoids = unittest.mock.patch.object(torch.Tensor, "float", lambda x: x.to(dtype))
    with follow, sinusoids:
        yield


def model_of(case, model_class, config_class, names=lambda name: True, **more):
    """The model of the case's configuration."""
    config = config_class(**copy.deepcopy(case.config), **more)
    config._attn_implementation = "eager"
    model = fill(case, model_class(config), names)
    case.reference = f"transformers {transformers.__version__} {model_class.__name__}, eager attention, float64"
    if case.draw.chance(0.3):
        case.defaults = config_class()
    return lambda dtype: copy.deepcopy(model).to(dtype)


def encoder_config(draw, length, **more):
    n, width = draw.heads()
    return {
        "vocab_size": draw.between(12, 60), "hidden_size": n * width,
        "num_hidden_layers": draw.between(1, 2 if draw.small else 3), "num_attention_heads": n,
        "intermediate_size": draw.ff(), "hidden_act": draw.pick(*ACTIVATIONS),
        "max_position_embeddings": length + draw.between(0, 3), "type_vocab_size": draw.pick(1, 2, 3),
        "layer_norm_eps": draw.pick(1e-12, 1e-5, 1e-3),
    } | more


def bert(case):
    draw = case.draw
    batch, length = draw.batch(), draw.length()
    mask, kind = draw.mask(batch, length, may_be_empty=True)
    case.config = encoder_config(draw, length)
    if not mask[:, 0].all():
        case.run["no_pooler"] = True
    if draw.chance(0.3):
        case.run["hidden_states"] = True
    case.variant = [kind, case.config["hidden_act"].replace("_", "-")]
    model = model_of(case, transformers.BertModel, transformers.BertConfig)
    ids = case.input("input_ids", draw.ids(case.config["vocab_size"], batch, length))
    real = case.input("attention_mask", mask)
    types = case.input("token_type_ids", draw.ids(case.config["type_vocab_size"], batch, length))

    def reference(dtype):
        y = model(dtype)(ids, attention_mask=real, token_type_ids=types, output_hidden_states=True)
        outputs = {"last_hidden_state": y.last_hidden_state}
        if not case.run.get("no_pooler"):
            outputs["pooler_output"] = y.pooler_output
        if case.run.get("hidden_states"):
            outputs |= {f"hidden_states.{i}": x for i, x in enumerate(y.hidden_states)}
        return outputs

    names = ["last_hidden_state"] + [f"hidden_states.{i}" for i in range(case.config["num_hidden_layers"] + 1)]
    case.expect(reference, dict.fromkeys(names, "in.attention_mask"))


def bart(case):
    draw = case.draw
    batch, source, target = draw.batch(), draw.length(), draw.length(80)
    n, width = draw.heads()
    cached = draw.chance(0.4)
    target = min(target, 20) if cached else target
    steps = draw.between(1, 8) if cached else 0
    divisors = [i for i in range(1, 9) if n * width % i == 0]
    mask, kind = draw.mask(batch, source)
    case.config = {
        "activation_function": draw.pick(*ACTIVATIONS), "scale_embedding": draw.chance(), "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": draw.pick(2, 3), "forced_eos_token_id": 2,
        "vocab_size": draw.between(12, 50), "d_model": n * width, "encoder_layers": draw.between(1, 2),
        "decoder_layers": draw.between(1, 2), "encoder_attention_heads": n,
        "decoder_attention_heads": draw.pick(*divisors), "encoder_ffn_dim": draw.ff(), "decoder_ffn_dim": draw.ff(),
        "max_position_embeddings": max(source, target, steps) + draw.between(0, 3),
    }
    case.variant = [kind] + ["cached"] * cached
    start = case.config["decoder_start_token_id"]
    model = model_of(case, transformers.BartForConditionalGeneration, transformers.BartConfig)
    ids = case.input("input_ids", draw.ids(case.config["vocab_size"], batch, source))
    real = case.input("attention_mask", mask)
    forced = case.input("decoder_input_ids", draw.ids(case.config["vocab_size"], batch, target))

    def logits(model, decoder_ids):
        return model(ids, attention_mask=real, decoder_input_ids=decoder_ids, use_cache=False).logits

    if cached:
        case.run = {"cached": True, "greedy_steps": steps}
        chosen, exact = torch.full((batch, 1), start), model(torch.float64)
        for _ in range(steps):
            last = logits(exact, chosen)[:, -1]
            best = last.topk(2).values
            if (best[:, 0] - best[:, 1]).min() < TOP_GAP:
                return False
            chosen = torch.cat([chosen, last.argmax(-1, keepdim=True)], 1)
        case.exact("greedy_ids", chosen[:, 1:].numpy())

    def reference(dtype):
        at = model(dtype)
        y = at(ids, attention_mask=real, decoder_input_ids=forced, output_hidden_states=True, use_cache=False)
        outputs = {"encoder_last_hidden_state": y.encoder_last_hidden_state, "logits": y.logits}
        outputs["last_hidden_state"] = y.decoder_hidden_states[-1]
        if cached:
            outputs["greedy_logits"] = logits(at, chosen[:, :-1])
        return outputs

    case.expect(reference, {"encoder_last_hidden_state": "in.attention_mask"})


def gpt(case, version):
    draw = case.draw
    batch, length = draw.batch(), draw.length(600)
    n, width = draw.heads()
    mask, kind = draw.mask(batch, length, may_be_empty=True)
    case.config = {
        "layer_norm_epsilon": draw.pick(1e-5, 1e-3, 1e-8), "vocab_size": draw.between(12, 60),
        "n_positions": length + draw.between(0, 5), "n_embd": n * width, "n_layer": draw.between(1, 3), "n_head": n,
    }
    inputs = {"attention_mask": case.input("attention_mask", mask)}
    case.variant = [kind]
    if version == 1:
        case.config["afn"] = draw.pick("gelu", "relu", "silu", "swish")
        classes = transformers.OpenAIGPTLMHeadModel, transformers.OpenAIGPTConfig
    else:
        case.config |= {
            "activation_function": draw.pick("gelu_new", *ACTIVATIONS, "gelu_pytorch_tanh"),
            "scale_attn_by_inverse_layer_idx": draw.chance(), "scale_attn_weights": not draw.chance(0.2),
            "n_inner": draw.pick(None, draw.ff()),
        }
        places = draw.pick(
            np.tile(np.arange(length), (batch, 1)),
            np.maximum(np.cumsum(mask, 1, dtype=np.int64) - 1, 0),
            draw.ids(case.config["n_positions"], batch, length),
        )
        inputs["position_ids"] = case.input("position_ids", places)
        if draw.chance():
            case.variant.append("chunks")
            cuts = sorted(set(draw.ids(length + 1, draw.between(1, 6)).tolist()) - {0, length})
            ends = [*cuts, length]
            case.run["chunks"] = [end - start for start, end in zip([0, *cuts], ends)]
        classes = transformers.GPT2LMHeadModel, transformers.GPT2Config
    model = model_of(case, *classes)
    ids = case.input("input_ids", draw.ids(case.config["vocab_size"], batch, length))

    def reference(dtype):
        more = {} if version == 1 else {"use_cache": False}
        y = model(dtype)(ids, output_hidden_states=True, **inputs, **more)
        return {"last_hidden_state": y.hidden_states[-1], "logits": y.logits}

    case.expect(reference, "in.attention_mask")


def gpt1(case):
    gpt(case, 1)


def gpt2(case):
    gpt(case, 2)


def longformer(case):
    draw = case.draw
    batch, length = draw.batch(), draw.length(600)
    mask, kind = draw.mask(batch, length, may_be_empty=True)
    pad = draw.pick(0, 1, 3)
    case.config = encoder_config(draw, length + pad + 2, pad_token_id=pad, bos_token_id=0, eos_token_id=2, sep_token_id=2)
    # The longest is a multiple of the others, as this implementation wants it.
    window, times = 2 * draw.pick(2, draw.between(2, 6), draw.between(8, 40)), draw.between(1, 3)
    windows = [window * draw.pick(1, times) for _ in range(case.config["num_hidden_layers"])]
    case.config["attention_window"] = windows if draw.chance(0.8) else windows[0]
    case.variant = [kind, f"window{windows[0]}"]
    if not mask[:, 0].all():
        case.run["no_pooler"] = True
    wide = draw.bits(draw.pick(0.0, 0.1, 0.5, 1.0), batch, length)
    wide[:, 0] |= draw.chance()
    vocab = case.config["vocab_size"]
    ids = draw.ids(vocab, batch, length)
    if draw.chance():  # Then padding is of its own token only.
        ids = np.where(mask == 0, pad, np.where(ids == pad, vocab - 1, ids))
    model = model_of(case, transformers.LongformerModel, transformers.LongformerConfig)
    case.reference = case.reference.replace("eager attention", "softmax in float64")
    ids, real = case.input("input_ids", ids), case.input("attention_mask", mask)
    wide = case.input("global_attention_mask", wide)
    types = case.input("token_type_ids", draw.ids(case.config["type_vocab_size"], batch, length))

    def reference(dtype):
        with precision(dtype):
            y = model(dtype)(ids, attention_mask=real.long(), global_attention_mask=wide.long(), token_type_ids=types)
        outputs = {"last_hidden_state": y.last_hidden_state}
        return outputs if case.run else outputs | {"pooler_output": y.pooler_output}

    case.expect(reference, {"last_hidden_state": "in.attention_mask"})


def xlnet(case):
    draw = case.draw
    batch, length, memory = draw.batch(), draw.length(), draw.pick(0, 0, draw.length(), draw.length(20))
    n, width = draw.heads(multiple=2)
    case.config = {
        "ff_activation": draw.pick(*ACTIVATIONS), "attn_type": draw.pick("bi", "bi", "uni"),
        "clamp_len": draw.pick(-1, 0, draw.between(1, 20)), "same_length": draw.chance(), "bi_data": False,
        "layer_norm_eps": draw.pick(1e-12, 1e-5),
        "mem_len": draw.pick(None, 0, draw.between(1, 8), draw.between(1, 400)), "reuse_len": None,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "vocab_size": draw.between(12, 50), "d_model": n * width, "n_head": n, "d_inner": draw.ff(),
        "n_layer": draw.between(1, 2 if draw.small else 3),
    }
    n_layer, d = case.config["n_layer"], n * width
    case.variant = [case.config["attn_type"]] + ["same-length"] * case.config["same_length"]
    model = model_of(case, transformers.XLNetLMHeadModel, transformers.XLNetConfig)
    case.reference = case.reference.replace("eager attention", "sinusoids in float64")
    ids = case.input("input_ids", draw.ids(case.config["vocab_size"], batch, length))
    masks, rows, real = {}, None, None
    if draw.chance():
        real, kind = draw.mask(batch, length)
        masks["attention_mask"], rows = case.input("attention_mask", real), "in.attention_mask"
        case.variant.append(kind)
    types = None
    if draw.chance():
        types = case.input("token_type_ids", draw.ids(draw.pick(2, 4), batch, length))
    mems = [case.input(f"mems.{i}", draw.normal(batch, memory, d, std=0.7)) for i in range(n_layer if memory else 0)]
    # What a target sees, memory first; one that sees nothing has no meaning.
    visible = np.ones((batch, length, memory + length), bool)
    if case.config["attn_type"] == "uni":
        visible &= np.tri(length, memory + length, memory, dtype=bool)
        visible &= ~np.tri(length, memory + length, -1, dtype=bool) | (not case.config["same_length"])
    visible[:, :, memory:] &= True if real is None else real[:, None, :].astype(bool)
    if draw.chance():
        hidden = draw.bits(draw.pick(0.2, 0.6), batch, length, length) | (np.eye(length, dtype=np.uint8) * draw.pick(0, 1))
        masks["perm_mask"] = case.input("perm_mask", hidden)
        visible[:, :, memory:] &= hidden == 0
        case.variant.append("perm")
    targets = [np.flatnonzero(visible[b].any(-1)) for b in range(batch)]
    count = min(len(places) for places in targets)
    if draw.chance(0.4) and count > 0:
        count = draw.between(1, min(count, 70))
        mapping = np.zeros((batch, count, length), np.uint8)
        for b, places in enumerate(targets):
            mapping[b, range(count), draw.rng.permutation(places)[:count]] = 1
        masks["target_mapping"] = case.input("target_mapping", mapping)
        case.variant.append("targets")
    two_streams = "target_mapping" in masks
    mem_len = case.config["mem_len"] or None
    if rows:
        kept = np.concatenate([np.ones((batch, memory), np.int64), real], 1)
        case.exact("mems_mask", kept[:, -mem_len:] if mem_len else kept)

    def run(at, dtype, of):
        """The outputs of some sequences."""
        more = {name: mask[of].to(dtype) for name, mask in masks.items()}
        if mems:
            more["mems"] = [mem[of].to(dtype).transpose(0, 1) for mem in mems]
        of_types = None if types is None else types[of]
        with precision(dtype):
            y = at(ids[of], token_type_ids=of_types, use_mems=True, output_hidden_states=True, **more)
        outputs = {"logits": y.logits, "last_hidden_state": y.hidden_states[-1]}
        if two_streams:
            outputs["content_hidden_state"] = y.hidden_states[-2]
        return outputs | {f"mems.{i}": mem.transpose(0, 1) for i, mem in enumerate(y.mems)}

    def reference(dtype):
        # One by one: in one direction this implementation refuses masks of more than one sequence.
        outputs = [run(model(dtype), dtype, slice(b, b + 1)) for b in range(batch)]
        return {name: torch.cat([each[name] for each in outputs]) for name in outputs[0]}

    if rows:
        plain = ["content_hidden_state"] if two_streams else ["last_hidden_state", "logits"]
        rows = dict.fromkeys(plain, rows) | {f"mems.{i}": "out.mems_mask" for i in range(n_layer)}
    case.expect(reference, rows)


def videobert(case):
    draw = case.draw
    batch, text, clips = draw.batch(), draw.length(120) + 2, 0 if draw.chance(0.05) else draw.length(200)
    length = text + clips + 1
    special = dict(zip(("cls_token_id", "sep_token_id", "mask_token_id", "joint_token_id"), range(4)))
    case.config = encoder_config(draw, length, type_vocab_size=2)
    case.config |= special | {"num_centroids": draw.between(2, 90), "video_feature_dim": draw.between(2, 70)}
    words, n, f = (case.config[name] for name in ("vocab_size", "num_centroids", "video_feature_dim"))
    d, eps = case.config["hidden_size"], case.config["layer_norm_eps"]
    text_mask, kind = draw.mask(batch, text)
    clip_mask, kind_of_clips = np.ones((batch, 0), np.uint8), "no-clips"
    if clips:
        clip_mask, kind_of_clips = draw.mask(batch, clips, may_be_empty=True)
    case.variant = [kind, kind_of_clips]
    ids = case.input("input_ids", draw.ids(words, batch, text, low=4))
    # A feature lies near a centroid, so that the nearest is not in doubt.
    centroids = case.weights["centroids"] = draw.normal(n, f, std=2.0)
    features = centroids[draw.ids(n, batch, clips)] + draw.normal(batch, clips, f, std=0.1)
    distances = ((features[:, :, None].astype(np.float64) - centroids) ** 2).sum(-1)
    nearest, (first, second) = distances.argmin(-1), np.sort(distances, -1)[..., :2].transpose(2, 0, 1)
    if (second - first).min(initial=np.inf) < TOP_GAP:
        return False
    case.exact("video_ids", nearest)
    case.input("video_features", features)
    masked = case.input("video_masked", draw.bits(draw.pick(0.0, 0.3, 1.0), batch, clips))
    ends = np.ones((batch, 1), np.uint8)
    real = case.input("attention_mask", np.concatenate([text_mask, clip_mask, ends], 1))
    config = {k: v for k, v in case.config.items() if k not in special}
    model = transformers.BertConfig(**config)
    model._attn_implementation = "eager"
    model = fill(case, torch.nn.ModuleDict({"bert": transformers.BertModel(model)}))
    case.reference = f"transformers {transformers.__version__} BertModel(inputs_embeds) with heads written out, float64"
    types = torch.from_numpy((np.arange(length) >= text).astype(np.int64)).tile(batch, 1)

    def reference(dtype):
        w, at = Parameters(case, dtype), copy.deepcopy(model).to(dtype)["bert"]
        word, video = at.embeddings.word_embeddings.weight, w("video_embeddings.weight", n, d)
        seen = torch.where(masked.bool()[..., None], word[special["mask_token_id"]], video[torch.from_numpy(nearest)])
        last = word[special["sep_token_id"]].expand(batch, 1, d)
        x = torch.cat([word[ids], seen, last], 1)
        y = at(inputs_embeds=x, attention_mask=real, token_type_ids=types)
        g = functional.gelu(w.linear("cls.predictions.transform.dense", y.last_hidden_state, d))
        g = w.layer_norm("cls.predictions.transform.LayerNorm", g, eps)
        return {
            "last_hidden_state": y.last_hidden_state, "pooler_output": y.pooler_output,
            "logits": g @ torch.cat([word, video]).T + w("cls.predictions.bias", words + n),
            "alignment_logits": w.linear("cls.seq_relationship", y.pooler_output, 2),
        }

    case.expect(reference, {"last_hidden_state": "in.attention_mask", "logits": "in.attention_mask"})


def clip(case):
    draw = case.draw
    images, texts, length = draw.batch(), draw.batch(), draw.length(120)
    projection = draw.between(2, 60)

    def tower():
        n, width = draw.heads()
        return {
            "hidden_size": n * width, "intermediate_size": draw.ff(), "num_hidden_layers": draw.between(1, 2),
            "num_attention_heads": n, "hidden_act": draw.pick("quick_gelu", *ACTIVATIONS),
            "layer_norm_eps": draw.pick(1e-5, 1e-3), "projection_dim": projection,
        }

    vocab, patch = draw.between(12, 50), draw.between(1, 8)
    by_largest = draw.chance(0.3)
    eos = 2 if by_largest else vocab - 1
    text = {"vocab_size": vocab, "max_position_embeddings": length + draw.between(0, 3), "eos_token_id": eos}
    text |= {"bos_token_id": 0, "pad_token_id": draw.pick(0, 1, eos)}
    grid = draw.between(1, 4 if draw.small else 17)
    vision = {"image_size": patch * grid + draw.between(0, patch - 1), "patch_size": patch, "num_channels": draw.pick(1, 3, 4)}
    case.config = {"text_config": tower() | text, "vision_config": tower() | vision, "projection_dim": projection}
    case.variant = ["largest-id"] if by_largest else ["eos"]
    mask, rows = None, None
    ids = draw.ids(vocab - 1, texts, length)
    ids[ids == eos] = 0
    kinds = ("none", "right", "left", "middle", "mixed")
    real, kind = draw.mask(texts, length, kinds) if draw.chance() else (np.ones((texts, length), np.uint8), "")
    for b in range(texts):
        ends = np.flatnonzero(real[b])
        end = draw.pick(ends[-1], ends[draw.between(0, len(ends) - 1)])
        ids[b, end] = vocab - 1
        ids[b, end + 1 :] = np.where(real[b, end + 1 :] == 0, text["pad_token_id"] if not by_largest else 0, ids[b, end + 1 :])
    if kind:
        mask, rows = case.input("attention_mask", real), "in.attention_mask"
        case.variant.append(kind)
    model = model_of(case, transformers.CLIPModel, transformers.CLIPConfig)
    case.reference = case.reference.replace("eager", "softmax in float64, eager")
    ids = case.input("input_ids", ids)
    side, channels = vision["image_size"], vision["num_channels"]
    pixels = case.input("pixel_values", draw.normal(images, channels, side, side))

    def reference(dtype):
        with precision(dtype):
            y = model(dtype)(ids, pixels.to(dtype), attention_mask=mask)
        return {
            "vision_last_hidden_state": y.vision_model_output.last_hidden_state,
            "text_last_hidden_state": y.text_model_output.last_hidden_state, "image_embeds": y.image_embeds,
            "text_embeds": y.text_embeds, "logits_per_image": y.logits_per_image,
            "probs": y.logits_per_image.softmax(-1),
        }

    case.expect(reference, {"text_last_hidden_state": rows})


def detr(case):
    draw = case.draw
    batch, height, width = draw.batch(), draw.between(5, 90), draw.between(5, 90)
    n, head = draw.heads(multiple=4)
    stages = draw.between(1, 2 if draw.small else 4)
    kind = draw.pick("basic", "bottleneck")
    sizes = [4 * draw.between(1, 4 if draw.small else 9) for _ in range(stages)]
    backbone = {
        "num_channels": draw.pick(1, 3), "hidden_act": draw.pick("relu", "gelu", "silu"),
        "downsample_in_first_stage": draw.chance(0.3), "downsample_in_bottleneck": draw.chance(),
        "embedding_size": draw.pick(sizes[0], draw.between(2, 12)), "hidden_sizes": sizes,
        "depths": [draw.between(1, 3) for _ in range(stages)], "layer_type": kind,
    }
    case.config = {
        "d_model": n * head, "encoder_layers": draw.between(1, 2), "encoder_attention_heads": n,
        "encoder_ffn_dim": draw.ff(), "activation_function": draw.pick(*ACTIVATIONS),
        "position_embedding_type": "sine",
    }
    case.variant = [kind, f"stages{stages}"]
    resnet = transformers.ResNetConfig(**backbone, out_features=[f"stage{stages}"])
    parts = ("backbone.", "input_projection.", "encoder.")
    more = {"decoder_layers": 1, "decoder_attention_heads": n, "num_queries": 1, "use_timm_backbone": False}
    keep = lambda name: name.startswith(parts)  # noqa: E731
    model = model_of(case, transformers.DetrModel, transformers.DetrConfig, keep, backbone_config=resnet, **more)
    case.config["backbone_config"] = backbone
    case.reference = case.reference.replace("DetrModel", "DetrModel (backbone, projection, encoder)")
    pixels = case.input("pixel_values", draw.normal(batch, backbone["num_channels"], height, width))
    inside = None
    if draw.chance(0.6):
        corners = np.zeros((batch, height, width), np.uint8)
        for image in corners:  # The usual top left corner, or any rectangle, or anything.
            top, left = draw.pick((0, 0), (draw.between(0, height // 2), draw.between(0, width // 2)))
            image[top : top + draw.between(height // 2, height), left : left + draw.between(width // 2, width)] = 1
        if draw.chance(0.2):
            corners = draw.bits(0.7, batch, height, width)
        inside = case.input("pixel_mask", corners)
        case.variant.append("mask")
    mask = None

    def reference(dtype):
        nonlocal mask
        at = model(dtype)
        whole = torch.ones(batch, height, width) if inside is None else inside.to(torch.float32)
        feature_map, token_mask = at.backbone(pixels.to(dtype), whole)[-1]
        mask = token_mask.flatten(1)
        positions = at.position_embedding(feature_map.shape, pixels.device, dtype, mask=token_mask)
        positions = positions.flatten(2).transpose(1, 2)
        x = at.input_projection(feature_map).flatten(2).transpose(1, 2)
        x = at.encoder(inputs_embeds=x, attention_mask=mask, spatial_position_embeddings=positions).last_hidden_state
        names = "feature_map", "position_embeddings", "encoder_last_hidden_state"
        return dict(zip(names, (feature_map, positions, x)))

    with torch.no_grad():
        reference(torch.float32)
    case.exact("token_mask", mask.numpy())
    tokens = dict.fromkeys(("position_embeddings", "encoder_last_hidden_state"), "out.token_mask")
    case.expect(reference, tokens)
