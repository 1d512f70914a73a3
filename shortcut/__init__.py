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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from shortcut.commands import cut as cut
    from shortcut.commands import diff as diff
    from shortcut.commands import families as families
    from shortcut.commands import inspect as inspect
    from shortcut.commands import metrics as metrics
    from shortcut.commands import plan as plan
    from shortcut.comparing import compare as compare
    from shortcut.demos import demo as demo
    from shortcut.errors import ShortcutError as ShortcutError
    from shortcut.evaluation import eval as eval  # noqa: A004  (the word on the command line)
    from shortcut.freezing import freeze as freeze
    from shortcut.healing import heal as heal
    from shortcut.measure import check as check
    from shortcut.measure import score as score
    from shortcut.measure import sweep as sweep
    from shortcut.pushing import push as push
    from shortcut.recipes import run as run
    from shortcut.records.plan import Plan as Plan
    from shortcut.records.scores import Scores as Scores
    from shortcut.refreshing import refresh as refresh
    from shortcut.road import prune as prune
    from shortcut.scoring.metrics import Metric as Metric
    from shortcut.scoring.metrics import add_metric as add_metric
    from shortcut.surgery.preview import preview as preview
    from shortcut.talk import chat as chat
    from shortcut.timing import speed as speed

_HOME = {
    **dict.fromkeys(("cut", "diff", "families", "inspect", "metrics", "plan"), "shortcut.commands"),
    **dict.fromkeys(("check", "score", "sweep"), "shortcut.measure"),
    "chat": "shortcut.talk",
    "compare": "shortcut.comparing",
    "demo": "shortcut.demos",
    "eval": "shortcut.evaluation",
    "freeze": "shortcut.freezing",
    "heal": "shortcut.healing",
    "prune": "shortcut.road",
    "push": "shortcut.pushing",
    **dict.fromkeys(("Metric", "add_metric"), "shortcut.scoring.metrics"),
    "Plan": "shortcut.records.plan",
    "Scores": "shortcut.records.scores",
    "ShortcutError": "shortcut.errors",
    "preview": "shortcut.surgery.preview",
    "refresh": "shortcut.refreshing",
    "run": "shortcut.recipes",
    "speed": "shortcut.timing",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shortcut' has no attribute {name!r}")
