"""From sentences to vectors around a model: tokens, batches of similar lengths, and the order in which they came."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

BATCH = 32


class Sentences:
    def __init__(self, spec):
        directory = Path(spec["model"])
        self.sentences = spec["sentences"]
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        config = directory / "sentence_bert_config.json"
        longest = json.loads(config.read_text()).get("max_seq_length") if config.exists() else None
        self.tokenizer.no_truncation() if longest is None else self.tokenizer.enable_truncation(longest)

    def embed(self, model):
        """`model` turns padded tokens [batch, length] and their lengths into vectors [batch, d]."""
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(self.sentences)]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        vectors = [None] * len(tokens)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            lengths = np.array([len(tokens[row]) for row in rows])
            ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
            for padded, row in zip(ids, rows):
                padded[: len(tokens[row])] = tokens[row]
            for row, vector in zip(rows, model(ids, lengths)):
                vectors[row] = vector
        return np.stack(vectors)
