"""A plan carried out on a live model, for the length of a `with` block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

from torch import nn

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.family.anatomy import visual_tokens
from shortcut.live.batch import Batch
from shortcut.live.blocks import Form, find_blocks, forwards_replaced, hidden_input, output_forms
from shortcut.live.decoder import Decoder
from shortcut.live.load import Model
from shortcut.records.actions import GONE
from shortcut.records.plan import Plan
from shortcut.surgery.hollow import check_frozen


@contextmanager
def preview(model: Model, plan: Plan, batch: Batch | None = None) -> Iterator["Preview"]:
    """Run a live model as if the plan had been cut: the same logits, also in `generate` with a cache.

    Dropped blocks hand on what they are given and cost nothing, and so do dropped halves; no weight is touched, and
    whatever happens inside, the model is afterwards what it was. `set` of what this gives changes the plan at once. A
    cache made under one plan must not be used under another. batch: what shows how the blocks return their states,
    where the model does not run on text alone. Raises ShortcutError for a plan of another depth, and where half a block
    is dropped and the halves cannot be told.
    """
    shown = Preview(model, plan.base.stack, batch)
    try:
        shown.set(plan)
        yield shown
    finally:
        shown.end()


class Preview:
    """What happens to a stack of blocks of a live model: one plan at a time."""

    def __init__(self, model: Model, stack: Stack, batch: Batch | None = None) -> None:
        self.model, self.batch, self.stack, self.blocks = model, batch, stack, find_blocks(model, stack)
        self._forms, _ = output_forms(model, stack, batch.inputs if batch is not None and batch.extra else None)
        self._decoder: Decoder | None = None  # taken apart when first half a block goes
        self._changes = ExitStack()

    def set(self, plan: Plan) -> None:
        """Carry out this plan instead of the one before, or raise as `preview` does, with none carried out."""
        self.end()
        if len(self.blocks) != plan.base.blocks:
            raise ShortcutError(f"the plan is for {plan.base.blocks} blocks and the model has {len(self.blocks)}")
        stand_ins: dict[nn.Module, Callable[..., Any]] = {self.blocks[i]: _bypass(self._forms[i]) for i in plan.dropped}
        for number in plan.hollow:
            self._decoder = self._decoder or Decoder.of(self.model, self.stack, self.batch)
            stand_ins |= self._decoder.branches(number).silent(GONE[plan.actions[number]])
        for number in plan.blocks("last-token"):
            from shortcut.modeling.passing import run_last

            stand_ins[self.blocks[number]] = partial(run_last, self.blocks[number], self.blocks[number].forward)
        if plan.frozen:
            content = {**self.model.config.to_dict(), "architectures": [type(self.model).__name__]}
            check_frozen(content, self.model.config, plan)
            ids = visual_tokens(content)
            stand_ins |= {self.blocks[number]: _freezing(self.blocks[number]) for number in plan.frozen}
            stand_ins[self.model] = _watching(self.model, ids)
        self._changes.enter_context(forwards_replaced(stand_ins))
        if self.stack == "decoder":
            self._changes.enter_context(_without_cache_entries(self.model, plan))

    def end(self) -> None:
        """Carry out no plan."""
        self._changes.close()


def _bypass(form: Form) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return form.hand_on(hidden_input(args, kwargs), args, kwargs)

    return forward


def _freezing(block: nn.Module) -> Callable[..., Any]:
    from shortcut.modeling.passing import run_some
    from shortcut.modeling.shortv import FROZEN

    own = block.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = FROZEN.get()
        return own(*args, **kwargs) if rows is None else run_some(block, own, rows, *args, **kwargs)

    return forward


def _watching(model: Model, token_ids: Sequence[int]) -> Callable[..., Any]:
    from shortcut.modeling.shortv import reading

    own = model.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with reading(model, token_ids, *args, **kwargs):
            return own(*args, **kwargs)

    return forward


@contextmanager
def _without_cache_entries(model: Model, plan: Plan) -> Iterator[None]:
    """Tell the caches that transformers makes from the config that blocks without attention store nothing.

    Where it matters and this transformers cannot be told, the model runs without a cache, and raises ShortcutError
    with one.
    """
    from transformers import Cache

    from shortcut.modeling.passing import store_nothing

    config: Any = model.config.get_text_config(decoder=True)
    before = vars(config).get("kv_sharing_modes")
    faults = store_nothing(config, ["attention" in GONE[action] for action in plan.actions])

    def refuse_caches(_: Any, args: Any, kwargs: Any) -> None:
        if faults and any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ShortcutError(faults[0])

    hook = find_blocks(model)[0].register_forward_pre_hook(refuse_caches, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        if before is None:
            del config.kv_sharing_modes
        else:
            config.kv_sharing_modes = before
