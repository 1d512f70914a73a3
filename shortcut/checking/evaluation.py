"""What was measured of a model, and of the base beside it: figures with their intervals, and what flipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shortcut.checking.questions import find_flips
from shortcut.common.text import format_table


@dataclass(frozen=True)
class Figure:
    """One thing measured of one model, and its 95 % interval where one is known.

    share: whether the value is a share, from 0 to 1. right: of how many questions, and which were answered rightly.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    share: bool = False
    right: tuple[bool, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the single questions."""
        interval = None if self.interval is None else list(self.interval)
        return {"value": self.value, "interval": interval, "share": self.share}

    @property
    def cells(self) -> list[str]:
        """The value and its interval, for people."""
        return [self._text(self.value), "" if self.interval is None else " - ".join(map(self._text, self.interval))]

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.share else f"{value:.2f}"


@dataclass(frozen=True)
class Evaluation:
    """The figures of a model, and behind it those of its base where there is one.

    text: what the perplexity was measured on, with window and BOS policy; settings: all that is needed to repeat it.
    """

    models: tuple[str, ...]
    figures: tuple[tuple[Figure, ...], ...]
    text: str
    settings: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The base that the model was measured beside."""
        return self.models[1] if len(self.models) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json: a row for every figure.

        gained, lost: the questions, by place from 0, that only the model or only the base answers rightly; p: of
        McNemar's exact test.
        """
        rows = []
        for figure, *base in zip(*self.figures, strict=True):
            row: dict[str, Any] = {"name": figure.name, "model": figure.to_dict()}
            row |= {"base": base[0].to_dict()} if base else {}
            if base and figure.right:
                flips = find_flips(base[0].right, figure.right)
                row |= {"gained": flips.gained, "lost": flips.lost, "p": flips.p}
            rows.append(row)
        return {"model": self.models[0], "base": self.base, "figures": rows, "settings": dict(self.settings)}

    def __str__(self) -> str:
        if self.base is None:
            lines = [f"model {self.models[0]}"]
            lines += ["", format_table(["", "model", "95 %"], [[each.name, *each.cells] for each in self.figures[0]])]
        else:
            head = ["", "base", "95 %", "model", "95 %", "gained", "lost", "p"]
            lines = [f"base  {self.base}", f"model {self.models[0]}"]
            lines += ["", format_table(head, [_row(*pair) for pair in zip(*self.figures, strict=True)])]
        return "\n".join([*lines, "", f"perplexity on {self.text}"])


def _row(figure: Figure, base: Figure) -> list[object]:
    flips = find_flips(base.right, figure.right)
    counted = [len(flips.gained), len(flips.lost), f"{flips.p:.2g}"] if figure.right else ["", "", ""]
    return [figure.name, *base.cells, *figure.cells, *counted]
