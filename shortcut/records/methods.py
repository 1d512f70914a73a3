"""The words of healing: its methods, and what is chosen within them."""

from typing import Literal

Method = Literal["scale", "fold", "lora", "distill"]
Objective = Literal["least-squares", "cosine"]  # what a map makes small: distances to the base's states, or angles
Tune = Literal["all", "attention", "mlp"]  # whose projections are trained
FITTED: tuple[Method, ...] = ("scale", "fold")
TRAINED: tuple[Method, ...] = ("lora", "distill")
