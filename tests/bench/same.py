"""Do checkpoints hold the same tensors, name by name and bit by bit? Arguments: their folders. Exit code 1 if not."""

import sys
from pathlib import Path

from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.tensors import same_bytes


def main() -> None:
    first, *others = (read_checkpoint(Path(name)) for name in sys.argv[1:])
    for other in others:
        if first.tensors.keys() != other.tensors.keys():
            sys.exit(f"{other.name} has other tensors: {sorted(first.tensors.keys() ^ other.tensors.keys())[:5]}")
        for name, tensor in first.tensors.items():
            twin = other.tensors[name]
            if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape) or not same_bytes(tensor, twin):
                sys.exit(f"{other.name} has another {name}")


if __name__ == "__main__":
    main()
