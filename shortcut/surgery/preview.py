"""A plan carried out on a live model, for the length of a `with` block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from shortcut.errors import ShortcutError
from shortcut.live import Model, find_blocks, forwards_replaced, hidden_input, output_forms
from shortcut.records.plan import Plan


@contextmanager
def preview(model: Model, plan: Plan) -> Iterator[Model]:
    """Run a live model as if the plan had been cut: the same logits, also in `generate` with a cache.

    Dropped blocks hand on what they are given and cost nothing; no weight is touched, and whatever happens inside, the
    model is afterwards what it was. A cache made outside must not be used inside, nor the reverse. Raises ShortcutError
    for a plan of another depth.
    """
    blocks = find_blocks(model)
    if len(blocks) != plan.base.blocks:
        raise ShortcutError(f"the plan is for {plan.base.blocks} blocks and the model has {len(blocks)}")
    forms, _ = output_forms(model)
    bypasses = {blocks[i]: _bypass(forms[i]) for i in plan.dropped}
    with forwards_replaced(bypasses), _without_cache_entries(model, plan):
        yield model


def _bypass(form: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return form(hidden_input(args, kwargs))

    return forward


@contextmanager
def _without_cache_entries(model: Model, plan: Plan) -> Iterator[None]:
    """Tell the caches that transformers makes from the config that dropped blocks store nothing.

    Otherwise the length of the cache is read from block 0, and stays 0 for ever when block 0 is dropped.
    """
    config: Any = model.config.get_text_config(decoder=True)
    before = vars(config).get("kv_sharing_modes")
    config.kv_sharing_modes = ["reuse" if action == "drop" else None for action in plan.actions]
    try:
        yield
    finally:
        if before is None:
            del config.kv_sharing_modes
        else:
            config.kv_sharing_modes = before
