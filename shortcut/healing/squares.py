"""Least squares towards what is there already, from sums that are gathered batch by batch.

Products of a batch are made in float32, which is several times as fast on any hardware, and summed in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shortcut.common.processes import add_up
from shortcut.healing.projections import scales_of, weights_of
from shortcut.healing.streams import UNCHANGED, Changes, Streams, inputs_of, noting, output_of
from shortcut.live.decoder import Decoder
from shortcut.records.actions import Action


class Squares:
    """The sums by which H D comes as close to R as it can, over all rows that are added.

    gram: H'H, (inputs, inputs); cross: H'R, (inputs, outputs). Of several processes each adds its own rows.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, missing: Tensor, base: Tensor) -> None:
        """Add rows of H and of R, each as a part of the length of the base's state there.

        The few tokens whose states are a hundred times as long as others would decide almost alone otherwise.
        """
        lengths = base.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        inputs, missing = inputs.float() / lengths, missing.float() / lengths
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ missing

    def solve(self, ridges: Sequence[float]) -> dict[float, Tensor]:
        """By ridge, the D that minimises ‖H D - R‖² + ridge m ‖D‖², m the mean square of H's columns."""
        gram, cross = add_up(self.gram), add_up(self.cross)
        unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return {ridge: torch.linalg.solve(gram + ridge * unit, cross) for ridge in ridges}

    def through(self, weights: Tensor) -> "Squares":
        """The sums of H W in the place of H. weights: (inputs, outputs), float64."""
        sums = Squares(weights.shape[1], self.cross.shape[1], weights.device)
        sums.gram, sums.cross = weights.T @ self.gram @ weights, weights.T @ self.cross
        return sums


def gather(
    decoder: Decoder,
    block: int,
    action: Action,
    names: Sequence[str],
    fitting: Sequence[Streams],
    changes: Changes = UNCHANGED,
    norm: str | None = None,
) -> Squares:
    """The sums from what goes into projections of a block, side by side, to what its output lacks of the base's stream.

    action: what is left of the block, whose weights have these changes; norm: by its name, what their output goes
    through, as if it multiplied each state by what it does now.
    """
    module, weights = decoder.blocks[block], [weights_of(decoder, block, name) for name in names]
    sums = Squares(sum(map(len, weights)), weights[0].shape[1], weights[0].device)
    for streams in fitting:
        inputs: dict[str, Tensor] = {}
        normed: list[tuple[Tensor, Tensor]] = []
        with inputs_of(module, names, inputs), output_of(module, norm or "", noting(normed)):
            short = streams.behind(decoder, block, action, changes)
        missing, mask = streams.base.to(short.device) - short, streams.batch.mask.to(short.device)
        rows = torch.cat([inputs[name].reshape(*mask.shape, -1) for name in names], dim=-1)
        if norm is not None:
            scales, gains = scales_of(module.get_submodule(norm), *normed[0])
            rows, missing = rows * scales.reshape(*mask.shape, 1), missing / gains
        sums.add(rows[mask], missing[mask], streams.base.to(short.device)[mask])
    return sums
