"""Train the small vision-language model of the package, on drawn images, in a quarter of an hour on two cores.

    python recipes/train_tiny_llava.py OUT [--steps 1400] [--seed 0]

Several questions are asked about an image at once: they stand one after the other behind it, do not see each other, and
have the positions that each would have alone. Progress goes to stderr; the accuracy on images that were not trained on
goes to stdout, beside that with the images of other questions, which is what guessing is worth.
"""

import sys
import time
from typing import Any

import fire
import numpy as np
import torch
from numpy.random import RandomState
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
from transformers import LlavaForConditionalGeneration as Llava
from transformers import PreTrainedTokenizerFast as FastTokenizer

from shortcut.material.drawings import KINDS, SIDE, TRAINING, WORDS, ask, compose, draw, paint, stream_of

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
IDS = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
PATCH = 8  # pixels
VISUAL = (SIDE // PATCH) ** 2  # tokens of an image
PREFIX = [IDS[word] for word in ("<s>", "USER:", *["<image>"] * VISUAL)]
SLOT = 12  # tokens of a question and its answer: the longest question, "ASSISTANT:" and one word
IMAGES, QUESTIONS = 32, 10  # images in a step, questions about each
HARD = ("above", "before", "two before", "at", "where", "left of")  # asked twice as often
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' + eos_token if message['role'] == 'assistant' }}{% endfor %}"
    "{{ ' ASSISTANT:' if add_generation_prompt }}"
)


def train(out: str, steps: int = 1400, seed: int = 0, threads: int = 2) -> None:
    """Train for so many steps and save model and processor to a folder, the weights in bfloat16."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model, generator = make_model(), stream_of(seed, TRAINING)
    optimizers = make_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    started, loss_now, right_now = time.monotonic(), 0.0, 0.0
    for step in range(steps):
        factor = min((step + 1) / 60, (steps - step) / (0.6 * steps), 1.0)
        for rate, group in zip(rates, groups, strict=True):
            group["lr"] = rate * factor
        loss, right = run_step(model, *make_batch(generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss_now += (loss.item() - loss_now) / min(step + 1, 30)
        right_now += (right - right_now) / min(step + 1, 30)
        if step % 25 == 0:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            report = f"step {step}/{steps}  loss {loss_now:.3f}  right {right_now:.1%}  {left:.0f} s left"
            print(report, file=sys.stderr, flush=True)
    print(f"trained in {time.monotonic() - started:.0f} s", file=sys.stderr)
    model.to(torch.bfloat16).eval().save_pretrained(out)
    make_processor().save_pretrained(out)
    print(measure(model))


def make_model() -> Llava:
    """A LLaVA of 2 million random weights: 1 block sees, 12 blocks speak."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": SIDE, "patch_size": PATCH, "projection_dim": 64}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4}
    words = {"vocab_size": 64, "pad_token_id": IDS["<pad>"], "bos_token_id": IDS["<s>"], "eos_token_id": IDS["</s>"]}
    places = {"max_position_embeddings": 256, "rope_theta": 1000.0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, **image, initializer_range=0.06),
        text_config=LlamaConfig(**text, **words, **places, initializer_range=0.06),
        image_token_index=IDS["<image>"],
        image_seq_length=VISUAL,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"  # in bfloat16 on a CPU, sdpa with a mask takes twice as long
    model = Llava(config)
    model.generation_config.max_new_tokens = 4
    return model


def make_optimizers(model: Llava) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and projector, AdamW for the rest."""
    matrices, rest = [], []
    for name, tensor in model.named_parameters():
        is_matrix = tensor.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else rest).append(tensor)
    muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.1)
    return [muon, torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def make_batch(generator: RandomState) -> tuple[Tensor, Tensor]:
    """Pixels (images, 3, side, side), -1 to 1, and token ids (images, tokens)."""
    kinds = (*KINDS, *HARD)
    pixels, ids = [], []
    for _ in range(IMAGES):
        scene = compose(generator)
        slots: list[list[int]] = []
        while len(slots) < QUESTIONS:
            if asked := ask(scene, kinds[generator.randint(len(kinds))], generator):
                slots.append(fill_slot(*asked))
        pixels.append(paint(scene, generator))
        ids.append(PREFIX + sum(slots, []))  # noqa: RUF017
    return scale(pixels), torch.tensor(ids)


def fill_slot(question: str, answer: str) -> list[int]:
    """The ids of a question and its answer, padded."""
    ids = [IDS[word] for word in (*question.split(), "ASSISTANT:", answer)]
    return ids + [IDS["<pad>"]] * (SLOT - len(ids))


def scale(pixels: list[Any]) -> Tensor:
    """Pixels of 0-255, (side, side, 3), as the processor gives them: (images, 3, side, side), -1 to 1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def run_step(model: Llava, pixels: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """The loss over answers and the ends after them, and the share of answers that are right."""
    asked = ids == IDS["ASSISTANT:"]
    answers = asked.roll(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run_slots(model, pixels, ids).float()
    ends = torch.full_like(ids[answers], IDS["</s>"])
    loss = cross_entropy(torch.cat([logits[asked], logits[answers]]), torch.cat([ids[answers], ends]))
    return loss, (logits[asked].argmax(-1) == ids[answers]).float().mean().item()


def run_slots(model: Llava, pixels: Tensor, ids: Tensor) -> Tensor:
    """Logits (images, tokens, words) of slots that follow the prefix, each of which sees it and itself."""
    head, place = len(PREFIX), torch.arange(ids.shape[1])
    slot = (place - head).div(SLOT, rounding_mode="floor").clamp(min=-1)
    seen = (place[:, None] >= place) & ((slot[:, None] == slot) | (slot == -1))
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -torch.inf)
    positions = torch.where(slot < 0, place, head + (place - head) % SLOT)
    shaped = {"attention_mask": mask[None, None], "position_ids": positions[None]}
    return model(input_ids=ids, pixel_values=pixels, **shaped).logits


@torch.no_grad()
def measure(model: Llava, samples: int = 1100, seed: int = 0) -> str:
    """For people: the share of right answers by kind, on images for evaluation, and with those of other questions."""
    drawn = draw(samples, seed)
    ids = torch.tensor([PREFIX + fill_slot(one.question, one.answer) for one in drawn])
    pixels = scale([np.asarray(one.image) for one in drawn]).to(model.dtype)
    asked = ids == IDS["ASSISTANT:"]
    rights = []
    for images in (pixels, pixels.roll(2 * len(KINDS), 0)):
        rows = torch.arange(samples).split(100)
        logits = torch.cat([run_slots(model, images[few], ids[few]) for few in rows])
        rights.append(logits[asked].argmax(-1) == ids[asked.roll(1, 1)])
    right = torch.stack(rights).float()
    lines = [f"{'question':<12}{'right':>8}{'shuffled':>10}", "{:<12}{:>8.1%}{:>10.1%}".format("all", *right.mean(1))]
    for place, kind in enumerate(KINDS):
        lines.append("{:<12}{:>8.1%}{:>10.1%}".format(kind, *right[:, place :: len(KINDS)].mean(1)))
    return "\n".join(lines)


def make_processor() -> LlavaProcessor:
    """A processor that cuts text into words at spaces and leaves images of the right size as they are."""
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"additional_special_tokens": ["<image>"], "padding_side": "left", "model_max_length": 256}
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return LlavaProcessor(
        CLIPImageProcessorPil(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        FastTokenizer(tokenizer_object=words, **special, **more),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


if __name__ == "__main__":
    fire.Fire(train)
