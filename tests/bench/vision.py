"""Prompts with images: what freezing saves, and what scoring blocks for it costs.

A random LLaVA, its prompt read with images frozen in a quarter of its blocks and more, beside the ratio of arithmetic;
and kl for all blocks beside a pass of the whole model for every block.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import shortcut
from shortcut.checking.verify import images_put_back
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.records.plan import Base, Plan
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.metrics import METRICS
from shortcut.surgery.savings import prefill
from tests.bench.rounds import THREADS, compare, emit, take_turns, timed

BLOCKS, TEXT, IMAGE_TOKEN = 24, 64, 999
WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
SHARES = (25, 50, 60, 75)  # percent of the blocks
RUNS = {576: 5, 2880: 3}  # by visual tokens


def main() -> None:
    torch.set_num_threads(THREADS)
    model = random_llava(**WIDTHS)
    for tokens, runs in RUNS.items():
        compare_prefill(model, tokens, runs)
    compare_scoring(random_llava(hidden_size=512, intermediate_size=1408, num_attention_heads=8), 576)


def random_llava(**widths: int) -> Any:
    torch.manual_seed(0)
    text = {"model_type": "llama", "num_hidden_layers": BLOCKS, "vocab_size": 1000, **widths}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 336, "patch_size": 14}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, image_seq_length=576)
    return LlavaForConditionalGeneration(config).eval()


def prompt_of(visual: int) -> Batch:
    """Half of the text in front of the images, half behind them."""
    ids = torch.randint(0, IMAGE_TOKEN, (1, TEXT + visual), generator=torch.Generator().manual_seed(0))
    ids[0, TEXT // 2 : TEXT // 2 + visual] = IMAGE_TOKEN
    images = torch.randn(visual // 576, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids == IMAGE_TOKEN, {"pixel_values": images})


def plan_of(share: int) -> Plan:
    count = round(BLOCKS * share / 100)
    return Plan.of(Base("random", None, BLOCKS), dict.fromkeys(range(BLOCKS - count, BLOCKS), "freeze-visual"))


def compare_prefill(model: Any, visual: int, runs: int) -> None:
    """The decoder's part alone: the states of the images are there already, as if a tower had made them."""
    batch = prompt_of(visual)
    with torch.inference_mode():
        states = model.model.get_input_embeddings()(batch.ids)
    text = model.config.text_config.to_dict()

    def read(plan: Plan | None) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            model(inputs_embeds=states, use_cache=True, logits_to_keep=1)

        def frozen() -> None:
            with shortcut.preview(model, plan):
                run()

        return run if plan is None else frozen

    read(None)()  # a first pass is slower
    for share in SHARES:
        plan = plan_of(share)
        timings = take_turns(runs, lambda plan=plan: timed(read(plan)), lambda: timed(read(None)))
        cost = prefill(text, plan.frozen, TEXT, visual)
        unseen = 2 * text["hidden_size"] * (TEXT + visual) ** 2  # pairs that a causal kernel leaves out
        dense = cost.dense - BLOCKS * unseen
        ideal = (cost.frozen - (BLOCKS - len(plan.frozen)) * unseen) / dense
        what = f"prefill, random LLaVA, width 1024, {share} % of {BLOCKS} blocks frozen, {TEXT} + {visual} tokens"
        found = compare(*timings)
        reached = round((1 - found["ratio"]) / (1 - ideal), 3)
        extra = {"ideal_ratio": round(ideal, 3), "saving_reached": reached}
        emit("vision", f"{what}, float32, {THREADS} thread", rival="no block frozen", **found, **extra)


def compare_scoring(model: Any, visual: int) -> None:
    batch, decoder = prompt_of(visual), Decoder.of(model)

    def score() -> None:
        score_blocks(decoder, [batch], [METRICS["kl"]], allow=["freeze-visual"])

    @torch.inference_mode()
    def by_hand() -> None:
        for blocks in [(), *((number,) for number in range(BLOCKS))]:
            with images_put_back(model, blocks, batch):
                model(**batch.inputs, use_cache=False, logits_to_keep=1)

    timings = take_turns(1, lambda: timed(score), lambda: timed(by_hand))
    what = f"kl of freezing, random LLaVA, width 512, {BLOCKS} blocks, {TEXT} + {visual} tokens, float32"
    emit("vision", what, rival=f"{BLOCKS + 1} forward passes", **compare(*timings), bound=0.55)


if __name__ == "__main__":
    main()
