"""The words of healing: its methods, and what is chosen within them."""

from typing import Literal

Method = Literal["refit", "fold", "scale", "lora", "distill"]
Objective = Literal["least-squares", "cosine"]  # what a map makes small: distances to the base's states, or angles
Tune = Literal["all", "attention", "mlp"]  # whose projections are trained
FITTED: tuple[Method, ...] = ("refit", "fold", "scale")
TRAINED: tuple[Method, ...] = ("lora", "distill")
