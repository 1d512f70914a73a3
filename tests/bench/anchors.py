"""What others do to a model without training where one span of blocks is gone, from the equations of their papers.

Each is a linear map of the stream in front of the gap, or of what the last projection in front adds to it; all see the
same rows. None of their code is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shortcut.healing.projections import find_projection, is_transposed, weights_of
from shortcut.healing.streams import Streams, inputs_of
from shortcut.live.batch import Batch
from shortcut.live.blocks import hidden_input
from shortcut.live.decoder import PROBE, Decoder

COSINE_STEPS, COSINE_RATE, COSINE_ROWS = 2000, 1e-3, 1024
GHOST_RIDGE = 1e-6


@dataclass(frozen=True)
class Gap:
    """Of all real tokens, in float64: the stream in front of a gap, what its last projection added, and the stream
    that the base has behind: (tokens, width) each. front, name: the block in front and that projection."""

    front: int
    name: str
    weights: Tensor
    stream: Tensor
    added: Tensor
    base: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, decoder: Decoder, span: range, batches: list[Batch]) -> "Gap":
        front = span.start - 1
        probe = Streams.start(decoder, Batch(batches[0].ids[:1, :PROBE], batches[0].mask[:1, :PROBE]))
        name = find_projection(decoder, front, probe)
        weights, rows = weights_of(decoder, front, name), []
        for batch in batches:
            calls = decoder.calls(batch)
            hidden = hidden_input(*calls[0])
            for number in range(front):
                hidden = decoder.run(number, hidden, calls[number])
            inputs: dict[str, Tensor] = {}
            with inputs_of(decoder.blocks[front], [name], inputs):
                stream = decoder.run(front, hidden, calls[front])
            base = stream
            for number in span:
                base = decoder.run(number, base, calls[number])
            added = inputs[name][batch.mask].double() @ weights
            rows.append((stream[batch.mask].double(), added, base[batch.mask].double()))
        return cls(front, name, weights, *(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def merged(self, decoder: Decoder, change: Tensor) -> dict[int, dict[str, Tensor]]:
        """By block and name, the weights of the projection whose output goes through a map, (width, width)."""
        weights = (self.weights @ change).float()
        projection = decoder.blocks[self.front].get_submodule(self.name)
        found = {} if projection.bias is None else {f"{self.name}.bias": weights[-1]}
        weights = weights if projection.bias is None else weights[:-1]
        return {self.front: {f"{self.name}.weight": weights if is_transposed(projection) else weights.T, **found}}


def least_squares(gap: Gap) -> Tensor:
    """ReplaceMe (arXiv:2505.02819), least squares: T of min ‖(x - M) + M T - y‖², without a ridge."""
    return torch.linalg.lstsq(gap.added, gap.base - (gap.stream - gap.added), driver="gelsd").solution


def cosine(gap: Gap) -> Tensor:
    """ReplaceMe, cosine: T of min mean(1 - cos((x - M) + M T, y)), by Adam from the identity."""
    added, rest, base = (each.float() for each in (gap.added, gap.stream - gap.added, gap.base))
    change = torch.eye(added.shape[1]).to(added).requires_grad_()
    adam = torch.optim.Adam([change], lr=COSINE_RATE)
    for step in range(COSINE_STEPS):
        rows = torch.randint(len(added), (COSINE_ROWS,), generator=torch.Generator().manual_seed(step))
        found = rest[rows] + added[rows] @ change
        loss = 1 - torch.nn.functional.cosine_similarity(found, base[rows], dim=-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return change.detach().double()


def linear_patch(gap: Gap) -> Tensor:
    """LinearPatch (arXiv:2505.24680): H diag(s) H', s the channels' mean sizes behind the gap over those in front."""
    turned = hadamard(gap.stream.shape[1])
    before, after = ((each @ turned).abs().mean(0) for each in (gap.stream, gap.base))
    return turned * (after / before) @ turned.T


def ghosted(gap: Gap) -> Tensor:
    """Ghosted Layers (arXiv:2605.15491): 1 + (X'X + εI)⁻¹ X'(y - x), unconstrained, in float64."""
    unit = torch.eye(gap.stream.shape[1], dtype=torch.float64)
    gram = gap.stream.T @ gap.stream + GHOST_RIDGE * unit
    return unit + torch.linalg.solve(gram, gap.stream.T @ (gap.base - gap.stream))


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of entries ±1/√size: (size, size). Raises ValueError where none is made so."""
    return _signs(size) / size**0.5


def _signs(size: int) -> Tensor:
    """By Paley's construction from a prime, or Sylvester's doubling of a smaller one."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 2:
        raise ValueError("no Hadamard matrix of that size")
    unit, pair = torch.eye(size, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        return unit + _bordered(size - 1, -1.0)
    if size % 8 == 4 and _is_prime(size // 2 - 1):
        turn = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1, 1.0), pair) + torch.kron(unit[: size // 2, : size // 2], turn)
    return torch.kron(pair, _signs(size // 2))


def _bordered(prime: int, sign: float) -> Tensor:
    """Whether i - j is a square modulo a prime, as ±1 and 0 on the diagonal, with a border of ones and of signs."""
    squares = {number * number % prime for number in range(1, prime)}
    row = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))], dtype=torch.float64)
    places = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = row[(places[:, None] - places[None]) % prime]
    matrix[1:, 0], matrix[0, 0] = sign, 0.0
    return matrix


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
