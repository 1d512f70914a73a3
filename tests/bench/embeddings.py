"""How far a shortened embedding model ranks pairs of sentences as its base does.

python -m tests.bench.embeddings BASE SHORT ...: for every SHORT, Spearman's correlation between its cosines and the
base's, over 1,000 pairs of sentences of a text that no command learns from: half of them neighbours, half far apart.
Models are run by sentence-transformers, as their users run them.
"""

import random
import re
import sys
from typing import Any

import torch
from torch import Tensor

from shortcut.material.documents import Source, read_documents
from tests.bench.rounds import emit

PAIRS, SHORTEST = 1000, 20  # characters of a sentence at least


def pairs() -> list[tuple[str, str]]:
    """Always the same pairs of sentences."""
    text = " ".join(str(next(iter(read_documents(Source("heldout"), 0)))).split())
    sentences = [each for each in re.split(r"(?<=[.!?]) ", text) if len(each) >= SHORTEST]
    rng = random.Random(0)
    firsts = rng.choices(range(len(sentences) - 1), k=PAIRS)
    seconds = [place + 1 if number % 2 else rng.randrange(len(sentences)) for number, place in enumerate(firsts)]
    return [(sentences[one], sentences[two]) for one, two in zip(firsts, seconds, strict=True)]


def cosines(folder: str, given: list[tuple[str, str]]) -> Tensor:
    """The cosine between the embeddings of each pair, by the model in a folder: (pairs,)."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(folder, device="cpu")
    one, two = (model.encode(list(side), convert_to_tensor=True) for side in zip(*given, strict=True))
    return torch.cosine_similarity(one, two, dim=-1)


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    base, *others = sys.argv[1:]
    given = pairs()
    expected = cosines(base, given)
    for folder in others:
        emit(
            "embeddings",
            f"{PAIRS} pairs of sentences",
            model=folder,
            spearman=spearman(expected, cosines(folder, given)),
        )


if __name__ == "__main__":
    main()
