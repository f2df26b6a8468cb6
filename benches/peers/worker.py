"""One peer of `laneformer compare` in a process of its own: worker.py PEER THREADS.

Reads one JSON object per line from standard input and answers each with one line on standard output:

    {"cmd": "setup", "op": "gemm", "m": 1, ..., "dir": "/tmp/x", "tensors": {"x": [1, 768], ...}}
    {"cmd": "round", "runs": 10, "warm": true} -> {"ns": [...]}
    {"cmd": "result", "path": "/tmp/y"}        -> {"len": 768}

Tensors are files of little-endian f32 in `dir`, named as in `tensors`. A system or a text of sentences is an `op` that not every peer has.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

# What a peer's module calls the function that prepares an `op`, if it is another one.
PREPARE = {"system": "prepare_system", "sentences": "prepare_sentences"}

PEERS = {"torch": "peer_torch", "onnxruntime": "peer_onnxruntime", "openvino": "peer_openvino"}


class Operands:
    """The tensors of a workload, mapped from their files."""

    def __init__(self, request):
        import numpy as np

        self.np = np
        self.dir = Path(request["dir"])
        self.shapes = request["tensors"]

    def __getitem__(self, name):
        data = self.np.fromfile(self.dir / name, dtype="<f4")
        return data.reshape(self.shapes[name])


class Worker:
    def __init__(self, peer, threads):
        self.module = importlib.import_module(PEERS[peer])
        self.module.configure(threads)
        self.threads = threads
        self.run = self.out = None

    def setup(self, request):
        self.run = self.out = None  # Frees the last workload before the next is made.
        prepare = getattr(self.module, PREPARE.get(request["op"], "prepare"), None)
        if prepare is None:
            return {"error": "-"}
        self.run = prepare(request, Operands(request), self.threads)
        return {"ok": True}

    def round(self, request):
        run, clock, times = self.run, time.perf_counter_ns, []
        if request["warm"]:  # After somebody else's turn the caches hold what is theirs.
            run()
        for _ in range(request["runs"]):
            self.out = None  # A run finds the memory of the one before it free.
            start = clock()
            out = run()
            times.append(clock() - start)
            self.out, out = out, None
        return {"ns": times}

    def result(self, request):
        import numpy as np

        out = np.ascontiguousarray(self.module.array(self.out), dtype="<f4")
        self.out = None
        out.tofile(request["path"])
        return {"len": out.size}


def main():
    # Whatever a library prints must not be mistaken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        worker = Worker(sys.argv[1], int(sys.argv[2]))
    except ImportError as error:
        return answer({"error": f"not installed: {error}"})
    except Exception as error:
        return answer({"error": f"{type(error).__name__}: {error}"})
    answer({"version": worker.module.VERSION})
    commands = {"setup": worker.setup, "round": worker.round, "result": worker.result}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(commands[request["cmd"]](request))
        except Exception as error:  # The command prints it in this peer's column and goes on.
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
