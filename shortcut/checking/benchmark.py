"""Base, shortened and healed model side by side: questions answered rightly, and tokens per second."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut.checking.questions import Chosen, Question, answer_choices
from shortcut.checking.speed import Speed, measure_speed
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.live.load import LOADING_ERRORS, load_model, load_tokenizer
from shortcut.options.groups import Running

PROMPT, NEW_TOKENS, RUNS = 256, 24, 5  # what is timed: of a prompt so many tokens at most
FORMS = {"questions right": ".1%", "prompt tokens/s": ".0f", "new tokens/s": ".1f"}


@dataclass(frozen=True)
class Benchmark:
    """answers: to the same questions, by model; speeds: of the first and the last model. Empty where not measured."""

    answers: Mapping[str, Chosen]
    speeds: Mapping[str, Speed]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        shares = {
            name: {"share": each.accuracy, "interval": list(each.interval)} for name, each in self.answers.items()
        }
        return {"questions": shares, "speed": {name: vars(speed) for name, speed in self.speeds.items()}}

    def columns(self) -> dict[str, dict[str, float]]:
        """By model, what was measured, by the names of `FORMS`."""
        found: dict[str, dict[str, float]] = {name: {} for name in (*self.answers, *self.speeds)}
        for name, each in self.answers.items():
            found[name]["questions right"] = each.accuracy
        for name, speed in self.speeds.items():
            found[name] |= {"prompt tokens/s": speed.prefill, "new tokens/s": speed.decode}
        return found


def run_benchmark(
    folders: Mapping[str, Path],
    questions: Sequence[Question],
    how: Running,
    *,
    timed: bool,
) -> Benchmark:
    """Ask the models in these folders the questions, by name, and time the first and the last, both in memory then.

    What a model cannot do, such as generate with a cache, or both in memory, is left out,
    and said.
    """
    answers: dict[str, Chosen] = {}
    speeds: dict[str, Speed] = {}
    try:
        for name, folder in folders.items() if questions else ():
            tokenizer = load_tokenizer(folder, trust_remote_code=how.trust_remote_code)
            model, label = load_model(folder, how), f"questions, {name}"
            answers[name] = answer_choices(
                model, tokenizer, questions, batch_size=how.batch_size, label=label, quiet=how.quiet
            )
        if timed:
            names = [*list(folders)[:1], *list(folders)[-1:]]
            models = [load_model(folders[name], how) for name in names]
            limit = getattr(models[0].config.get_text_config(decoder=True), "max_position_embeddings", None)
            prompt = min(PROMPT, (limit or 2 * PROMPT) // 2)
            speeds = dict(
                zip(names, measure_speed(models, prompt=prompt, new_tokens=NEW_TOKENS, runs=RUNS), strict=True)
            )
    except (*LOADING_ERRORS, ShortcutError) as error:
        say(f"not measured: {' '.join(str(error).split())[:200]}", quiet=False)
    return Benchmark(answers if len(answers) == len(folders) else {}, speeds)
