"""Makes golden cases: random models and inputs, run through implementations that share nothing with this library.

    python3 -m venv venv && venv/bin/pip install -r tests/golden/requirements.txt
    venv/bin/python tests/golden/generate.py --system all --seed 1 --count 20 --output /tmp/cases
    laneformer verify /tmp/cases

A case follows from its system and its seed alone (and from `--small`, which keeps its files small). A seed whose case would
have a near tie between two choices makes none. `--system onnx` converts ONNX's operator tests instead.
"""

import argparse
import pathlib
import shutil
import sys

import torch

from generator import huggingface, onnx_operators, operations, written
from generator.case import Case
from generator.draw import Draw

SYSTEMS = {
    "vanilla": written.vanilla,
    "bert": huggingface.bert,
    "bart": huggingface.bart,
    "gpt1": huggingface.gpt1,
    "gpt2": huggingface.gpt2,
    "longformer": huggingface.longformer,
    "transformer-xl": written.transformer_xl,
    "xlnet": huggingface.xlnet,
    "videobert": huggingface.videobert,
    "clip": huggingface.clip,
    "detr": huggingface.detr,
    "lavit": written.lavit,
    "graph": written.graph,
    "fusion": written.fusion,
    "norms": written.norms,
    "op": operations.op,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=[*SYSTEMS, "all", "onnx"], default="all")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="seeds per system")
    parser.add_argument("--small", action="store_true", help="short sequences and narrow layers")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.system == "onnx":
        return convert_onnx(arguments.output)
    for system in SYSTEMS if arguments.system == "all" else [arguments.system]:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            make(system, seed, arguments.small, arguments.output)


def make(system, seed, small, output):
    case = Case(system, Draw(system, seed, small))
    torch.manual_seed(seed)
    if SYSTEMS[system](case) is False:
        print(f"{system} {seed}: a near tie, no case", file=sys.stderr)
        return
    words = " ".join(case.variant)
    case.description = f"{words.capitalize()} (generated, seed {seed}{', small' if small else ''})"
    directory = output / "-".join([system, *case.variant, f"s{seed}"])
    shutil.rmtree(directory, ignore_errors=True)
    case.write(directory)


def convert_onnx(output):
    for name, test, config, inputs, y in onnx_operators.cases():
        case = Case("op", None)
        case.config, case.description = config, f"{test} of the ONNX operator tests"
        case.reference = f"onnx {onnx_operators.onnx.__version__} operator tests"
        for input_name, array in inputs.items():
            case.input(input_name, array)
        largest = float(abs(y).max(where=abs(y) < torch.inf, initial=0.0))
        spec = {"rows": None, "torch_f32_max_abs": onnx_operators.YARDSTICK, "ref_max_abs": float(f"{largest:.4g}")}
        case.outputs["out.y"] = y, spec
        case.write(output / f"op-onnx-{name}")


if __name__ == "__main__":
    main()
