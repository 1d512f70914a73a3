"""shortcut: rank the decoder blocks of a transformer and write a physically shorter checkpoint.

Everything the command line does is here as a function of the same name and options:

    import shortcut

    scores = shortcut.score("org/model", metric="block-influence,angular")
    plan = shortcut.plan(scores, count=7)
    shortcut.cut("org/model", "shorter", plan=plan)
    shortcut.check("shorter")

Importing this package imports neither torch nor transformers; the functions do, where they need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shortcut.common.version import __version__ as __version__

if TYPE_CHECKING:
    from shortcut.common.errors import ShortcutError as ShortcutError
    from shortcut.records.plan import Plan as Plan
    from shortcut.records.scores import Scores as Scores
    from shortcut.scoring.metrics import Metric as Metric
    from shortcut.scoring.metrics import add_metric as add_metric
    from shortcut.surgery.preview import preview as preview
    from shortcut.verbs.chat import chat as chat
    from shortcut.verbs.check import check as check
    from shortcut.verbs.compare import compare as compare
    from shortcut.verbs.cut import cut as cut
    from shortcut.verbs.demo import demo as demo
    from shortcut.verbs.diff import diff as diff
    from shortcut.verbs.eval import eval as eval  # noqa: A004  (the word on the command line)
    from shortcut.verbs.families import families as families
    from shortcut.verbs.freeze import freeze as freeze
    from shortcut.verbs.heal import heal as heal
    from shortcut.verbs.inspect import inspect as inspect
    from shortcut.verbs.metrics import metrics as metrics
    from shortcut.verbs.plan import plan as plan
    from shortcut.verbs.prune import prune as prune
    from shortcut.verbs.push import push as push
    from shortcut.verbs.refresh import refresh as refresh
    from shortcut.verbs.run import run as run
    from shortcut.verbs.score import score as score
    from shortcut.verbs.speed import speed as speed
    from shortcut.verbs.sweep import sweep as sweep

_VERBS = "chat check compare cut demo diff eval families freeze heal inspect metrics plan prune push refresh run score"
_HOME = {
    **{verb: f"shortcut.verbs.{verb}" for verb in f"{_VERBS} speed sweep".split()},
    "Metric": "shortcut.scoring.metrics",
    "Plan": "shortcut.records.plan",
    "Scores": "shortcut.records.scores",
    "ShortcutError": "shortcut.common.errors",
    "add_metric": "shortcut.scoring.metrics",
    "preview": "shortcut.surgery.preview",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shortcut' has no attribute {name!r}")
