"""The stacks of blocks that a model may have."""

from typing import Literal, get_args

Stack = Literal["decoder", "encoder", "vision", "audio"]
STACKS: tuple[Stack, ...] = get_args(Stack)
