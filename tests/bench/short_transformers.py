"""A rival of `shortcut score`: short-transformers, in an environment of its own. Argument: the folder of a checkpoint.

Reads lines of JSON: first the token ids of every sequence, then names of its metrics. For each name, it analyses all
spans by it and prints, as JSON, the seconds that took and the scores.
"""

import json
import logging
import sys
import time
from typing import Any

import torch
from short_transformers import ShortTransformer, dist
from transformers import AutoConfig, AutoModelForCausalLM, BatchEncoding

from tests.bench.rounds import THREADS


def main() -> None:
    logging.disable()  # it logs to stdout
    torch.set_num_threads(THREADS)
    config = AutoConfig.from_pretrained(sys.argv[1])
    # transformers 5 writes the rotary base where transformers 4 does not look for it: it would take another one.
    config.rope_theta = config.rope_parameters["rope_theta"]
    model = ShortTransformer.from_model(
        AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config, torch_dtype=torch.float32)
    )
    rows = [{"content": ids} for ids in json.loads(sys.stdin.readline())]
    for name in sys.stdin:
        model.set_metric(getattr(dist, json.loads(name)))
        start = time.perf_counter()
        scores = model.analyse_layers(rows, tokenizer=tokenise, limit=len(rows))
        print(json.dumps([time.perf_counter() - start, scores.tolist()]), flush=True)


def tokenise(ids: list[int], **_: Any) -> BatchEncoding:
    """What stands in for a tokenizer: the tokens are given."""
    return BatchEncoding({"input_ids": torch.tensor([ids])})


if __name__ == "__main__":
    main()
