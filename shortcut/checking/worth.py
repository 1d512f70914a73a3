"""What base, shortened and healed model are worth side by side: questions answered rightly, and tokens per second."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut.checking.choices import Choice, Chosen, answer_choices
from shortcut.checking.speed import Speed, measure_speed
from shortcut.live import load_model, load_tokenizer

PROMPT = 256  # tokens at most


@dataclass(frozen=True)
class Worth:
    """answers: of base, shortened and healed model to the same questions; speeds: of base and healed one.

    Empty where they were not measured. The shortened model is as fast as the healed one: it has the same shape.
    """

    answers: tuple[Chosen, ...] = ()
    speeds: tuple[Speed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        shares = [{"accuracy": each.accuracy, "interval": list(each.interval)} for each in self.answers]
        names = ("base", "cut", "healed")
        return {
            "questions": {"count": len(self.answers[0].right), **dict(zip(names, shares, strict=True))}
            if shares
            else None,
            "speed": dict(zip(("base", "healed"), map(vars, self.speeds), strict=True)) if self.speeds else None,
        }

    @property
    def rows(self) -> list[list[object]]:
        """For people: what was measured, and its values for the three."""
        rows: list[list[object]] = []
        if self.answers:
            right = [f"{each.accuracy:.1%}" for each in self.answers]
            rows.append([f"right of {len(self.answers[0].right)} questions", *right])
        for name, form in (("prefill", ".0f"), ("decode", ".1f")) if self.speeds else ():
            base, healed = (format(getattr(speed, name), form) for speed in self.speeds)
            rows.append([f"{'prompt' if name == 'prefill' else 'new'} tokens/s", base, healed, healed])
        return rows


def measure_worth(
    folders: Sequence[Path], questions: Sequence[Choice], *, timed: bool, batch_size: int, quiet: bool, **loading: Any
) -> Worth:
    """Ask base, shortened and healed model the questions, and time the first and the last, which are in memory then.

    loading: as for `load_model`.
    """
    answers = []
    for name, folder in zip(("base", "cut", "healed"), folders, strict=True) if questions else ():
        tokenizer = load_tokenizer(folder, trust_remote_code=loading["trust_remote_code"])
        how: dict[str, Any] = {"batch_size": batch_size, "label": f"questions, {name}", "quiet": quiet}
        answers.append(answer_choices(load_model(folder, **loading), tokenizer, questions, **how))
    if not timed:
        return Worth(tuple(answers))
    models = [load_model(folder, **loading) for folder in (folders[0], folders[-1])]
    limit = getattr(models[0].config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * PROMPT
    return Worth(tuple(answers), tuple(measure_speed(models, prompt=min(PROMPT, limit // 2))))
