"""`score`: how important every block is."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any

from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import write_text
from shortcut.choose.rules import parse_candidates
from shortcut.common.processes import is_writer, writer_first
from shortcut.common.progress import say
from shortcut.material.take import take_text
from shortcut.options.groups import Allowed, Model, Offload, Plot, Ranking, Running, SampledText, Scaled, Stacked
from shortcut.options.presets import PRESETS
from shortcut.options.verb import verb
from shortcut.publish.plots import check_files
from shortcut.records.actions import FREEZING, parse_actions
from shortcut.records.scores import Scores, format_scores


@dataclass(frozen=True)
class ScoreOptions(Scaled, Ranking, Allowed, SampledText, Offload, Running, Stacked, Plot):
    """Scoring"""

    model: Model
    _: KW_ONLY
    greedy: Annotated[
        int, "how many moves to make one by one, by the first metric, scoring the rest again each time"
    ] = 0
    stability: Annotated[
        int, "how many parts of the text to score alone as well, to see whether they rank the blocks alike"
    ] = 0


@verb(ScoreOptions, first="metric data out", example="org/model --out scores.json", presets=PRESETS)
def score(asked: ScoreOptions) -> Scores:
    """Score every block of a model on some text: higher is more important.

    Metrics of what goes into a block and comes out of it share one walk through the blocks, at the cost of about one
    forward pass; `shortcut metrics` says what others cost. Metrics of spans (angular, angular-all) score every span of
    every length: the table shows single blocks, --out and --plot show all. With --greedy N the block that scores lowest
    by the first metric is left out and the rest is scored again, N times. With --stability K parts of the text are
    scored as well, and the table says how far they agree. Fails where there is too little text, and where the model's
    activations are not finite.
    """
    from shortcut.live.load import pick_device, pick_dtype
    from shortcut.live.offload import open_live
    from shortcut.scoring.greedy import check_scaled, plan_removal
    from shortcut.scoring.metrics import check_metrics, pick_metrics
    from shortcut.scoring.scores import make_scores
    from shortcut.scoring.stability import agreements, split_evenly

    metrics, actions = pick_metrics(asked.metric, asked.average), parse_actions(asked.allow)
    pick_dtype(asked.dtype, pick_device(asked.device))
    check_files(asked.out, asked.plot)
    with writer_first():  # it may have to fetch or convert
        checkpoint = open_model(asked.model, asked.revision, stack=asked.stack, quiet=asked.quiet)
    check_metrics(metrics, checkpoint)
    depth = checkpoint.base.blocks
    may_go = parse_candidates(asked.candidates, asked.protect, depth)
    check_scaled(asked.scaled, asked.greedy)
    greedy, scaled = asked.greedy, asked.scaled
    removal = plan_removal(metrics[0], greedy, may_go, depth, actions, scaled=scaled) if greedy else None
    images, trust = bool(set(actions) & set(FREEZING)), asked.trust_remote_code
    calibration = take_text(checkpoint, asked, asked.samples, images=images, trust_remote_code=trust)
    parts = split_evenly(calibration, asked.stability) if asked.stability else []
    say(f"scoring {depth} blocks of {checkpoint.name} on {calibration.tokens} tokens", quiet=asked.quiet)
    with open_live(checkpoint, asked, offload=asked.offload, quiet=asked.quiet) as live:
        scores = make_scores(checkpoint, live, calibration, metrics, asked, allow=actions, removal=removal)
        alone = [make_scores(checkpoint, live, part, metrics, asked, allow=actions) for part in parts]
    noted: dict[str, Any] = {} if asked.preset is None else {"preset": asked.preset}
    noted |= {"stability": {"parts": asked.stability, **agreements(alone)}} if alone else {}
    scores = replace(scores, settings={**scores.settings, **noted})
    if asked.out is not None and is_writer():
        write_text(asked.out, format_scores(scores))
    if asked.plot is not None and is_writer():
        from shortcut.publish.plots import draw_scores

        draw_scores(scores, asked.plot)
    return scores
