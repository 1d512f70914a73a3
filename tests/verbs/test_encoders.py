"""Models that do not predict the next token: scored, pruned and checked as the class that their config names.

Every score is compared with one from `output_hidden_states`, and every result with the base whose blocks are skipped.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

import shortcut
from shortcut.checking.agreement import CLASSES, EMBEDDINGS, NUMBERS, Given, pooled
from shortcut.common.errors import ShortcutError
from shortcut.family.tasks import find_task
from shortcut.material import take
from tests.conftest import VOCABULARY, make_tokenizer
from tests.test_cli import fails

pytestmark = pytest.mark.thorough

DEPTH = 6
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "num_hidden_layers": DEPTH,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "num_labels": 3,
}
DISTILBERT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "n_layers": DEPTH, "dim": 40, "hidden_dim": 53, "n_heads": 4}
MODERNBERT = {**SIZES, "global_attn_every_n_layers": 3, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
LLAMA = {**SIZES, "num_key_value_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("bert", SIZES),
    "BertForMaskedLM": ("bert", SIZES),
    "BertForTokenClassification": ("bert", SIZES),
    "ModernBertModel": ("modernbert", MODERNBERT),
    "ModernBertForSequenceClassification": ("modernbert", MODERNBERT),
    "RobertaForSequenceClassification": ("roberta", {**SIZES, "pad_token_id": 1}),
    "XLMRobertaModel": ("xlm-roberta", {**SIZES, "pad_token_id": 1}),
    "MPNetModel": ("mpnet", {**SIZES, "pad_token_id": 1}),
    "DistilBertModel": ("distilbert", DISTILBERT),
    "Qwen3Model": ("qwen3", {**LLAMA, "head_dim": 10}),
    "Qwen3ForSequenceClassification": ("qwen3", {**LLAMA, "head_dim": 10, "num_labels": 2}),
    "LlamaForSequenceClassification": ("llama", {**LLAMA, "num_labels": 1}),
}
TEXT: dict[str, Any] = {"samples": 5, "length": 24, "quiet": True}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random checkpoint of an architecture."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            family, sizes = CASES[name]
            torch.manual_seed(7)
            config = transformers.AutoConfig.for_model(family, **sizes)
            model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
            made[name] = tmp_path_factory.mktemp(name) / "base"
            model.save_pretrained(made[name])
            framing_tokenizer().save_pretrained(made[name])
        return made[name]

    return give


def framing_tokenizer() -> Any:
    """Bytes between <s> and </s>, with a token that masks."""
    tokenizer = make_tokenizer()
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer.mask_token = "<unk>"
    return tokenizer


def load(folder: Path, name: str) -> Any:
    """As a user loads it who knows the class."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def sequences() -> torch.Tensor:
    """What `score` takes: windows of the embedded text between the two tokens, (samples, length)."""
    from shortcut.material.calibration import make_calibration
    from shortcut.material.documents import Source

    tokenizer = framing_tokenizer()
    plain = make_calibration(tokenizer, Source(), samples=TEXT["samples"], length=TEXT["length"], framed=True)
    rows = torch.tensor(plain.sequences)
    assert set(rows[:, 0].tolist()) == {1}
    assert set(rows[:, -1].tolist()) == {2}
    assert not set(rows[:, 1:-1].flatten().tolist()) & {1, 2}
    return rows


def stack_of(model: Any) -> torch.nn.ModuleList:
    """The list of as many modules as there are blocks, found by its length alone."""
    lists = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == DEPTH]
    assert len(lists) == 1
    return lists[0]


def skip(model: Any, blocks: list[int]) -> None:
    """Have blocks of a live model hand on what they are given, in the form in which they give it."""
    for number in blocks:
        block = stack_of(model)[number]

        def forward(*args: Any, own: Any = block.forward, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            return states if isinstance(own(*args, **kwargs), torch.Tensor) else (states,)

        block.forward = forward


def output(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits, or the last states."""
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", CASES)
def test_scored_pruned_and_checked(name: str, encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """By its own class throughout; the result is the base without its blocks."""
    base, ids = encoder(name), sequences()
    scores = shortcut.score(base, metric="block-influence,angular-all", **TEXT)
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = load(base, name)
    for block in stack_of(model):
        block.register_forward_hook(
            lambda _, args, kwargs, out: states.append(
                (args[0] if args else kwargs["hidden_states"], out if isinstance(out, torch.Tensor) else out[0])
            ),
            with_kwargs=True,
        )
    output(model, ids)
    expected = [1 - torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in states]
    assert scores.of_blocks("block-influence") == pytest.approx(expected, rel=1e-4)
    report = shortcut.prune(base, tmp_path / "out", count=2, metric="block-influence", **TEXT)
    gone = sorted(sorted(range(DEPTH), key=lambda block: (expected[block], -block))[:2])
    assert list(report.cut.plan.dropped) == gone
    assert report.check.perplexity is None
    what, value = report.check.agreement or ("", 2.0)
    assert -1 <= value <= 1
    assert "base" in what
    short, whole = load(tmp_path / "out", name), load(base, name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    skip(whole, gone)
    torch.testing.assert_close(output(short, ids), output(whole, ids), rtol=1e-5, atol=1e-5)
    again = shortcut.check(tmp_path / "out", **{**TEXT, "samples": take.HELDOUT_SAMPLES["text"]})
    assert again.agreement == report.check.agreement
    auto = find_task(json.loads((base / "config.json").read_text())).auto
    assert isinstance(getattr(transformers, auto).from_pretrained(tmp_path / "out"), type(short))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{auto}.from_pretrained" in card
    assert "text-generation" not in card
    assert all("parameters" in held and "KV cache per token" not in held for held in report.page.columns.values())


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel", "MPNetModel"])
def test_padding_does_not_count(name: str, encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """Texts of several lengths score alike one by one and together, and so does what the model gives."""
    lines = ["a", "some words", "a few more words than these", "none"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    how: dict[str, Any] = {"data": str(tmp_path / "text.jsonl"), "by_document": True, "samples": 3, "quiet": True}
    found = [
        shortcut.score(encoder(name), metric="block-influence", batch_size=size, **how).of_blocks("block-influence")
        for size in (1, 3)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    shortcut.cut(encoder(name), tmp_path / "out", drop="2", quiet=True)
    same = [shortcut.check(tmp_path / "out", batch_size=size, **how).agreement for size in (1, 3)]
    assert same[0] is not None
    assert same[1] is not None
    assert same[0][1] == pytest.approx(same[1][1], rel=1e-5)


def test_embeddings_are_means_of_real_tokens() -> None:
    """However many others there are."""
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]])
    assert pooled(states, torch.tensor([[True, True, False]])).tolist() == [[2.0, 4.0]]
    one, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert Given(EMBEDDINGS, one).like(Given(EMBEDDINGS, other)) == pytest.approx(0.5)
    assert Given(CLASSES, torch.tensor([0, 1, 2])).like(Given(CLASSES, torch.tensor([0, 1, 1]))) == pytest.approx(2 / 3)
    numbers = torch.tensor([0.1, 5.0, 0.2])
    assert Given(NUMBERS, numbers).like(Given(NUMBERS, numbers * 3)) == pytest.approx(1)


@pytest.mark.parametrize("name", CASES)
def test_what_the_head_gives_without_a_block(name: str, encoder: Callable[[str], Path]) -> None:
    """kl is that of masked tokens or classes, the square of what one number changes by, or the angle of embeddings."""
    base, ids = encoder(name), sequences()
    scores = shortcut.score(base, metric="kl,block-influence", **TEXT)
    hidden = ids.clone()
    if name.endswith("MaskedLM"):
        hidden[:, 3::7] = framing_tokenizer().mask_token_id
    whole, distances = output(load(base, name), hidden).double(), []
    for block in range(DEPTH):
        model = load(base, name)
        skip(model, [block])
        without = output(model, hidden).double()
        if name.endswith("Model"):
            one, other = (each.mean(1) for each in (whole, without))
            distance = torch.cosine_similarity(one, other, dim=-1).clamp(-1, 1).arccos() / np.pi
        elif whole.shape[-1] == 1:
            distance = (whole - without).square()
        else:
            logs = [each.log_softmax(-1) for each in (whole, without)]
            distance = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
            distance = distance[hidden != ids] if name.endswith("MaskedLM") else distance
        distances.append(distance.mean().item())
    np.testing.assert_allclose(scores.of_blocks("kl"), distances, rtol=2e-3, atol=1e-6)
    plain = shortcut.score(base, metric="block-influence", **TEXT)
    assert plain.of_blocks("block-influence") == scores.of_blocks("block-influence")  # of the text as it is


def test_masked_tokens_have_a_perplexity(encoder: Callable[[str], Path]) -> None:
    """It is that of the tokens that were masked, without each block; blocks can go by it one by one."""
    base, ids = encoder("BertForMaskedLM"), sequences()
    scores = shortcut.score(base, metric="perplexity", greedy=2, **TEXT)
    hidden = ids.clone()
    hidden[:, 3::7] = framing_tokenizer().mask_token_id
    prices = []
    for gone in [[block] for block in range(DEPTH)]:
        model = load(base, "BertForMaskedLM")
        skip(model, gone)
        logs = output(model, hidden).double().log_softmax(-1)
        losses = -logs.gather(-1, ids[..., None])[..., 0][hidden != ids]
        prices.append(losses.mean().exp().item())
    np.testing.assert_allclose(scores.of_blocks("perplexity"), prices, rtol=1e-3)
    order = [move.block for move in scores.orders["perplexity"]]
    assert order[0] == int(np.argmin(prices))
    assert len(set(order)) == 2


HEALED = ["BertModel", "BertForMaskedLM", "ModernBertForSequenceClassification", "LlamaForSequenceClassification"]


@pytest.mark.parametrize("name", HEALED)
def test_healed_towards_what_the_base_gives(name: str, encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """distill brings what the shortened model gives nearer to the base's, on text that it was not trained on."""
    base, cut, healed = encoder(name), tmp_path / "cut", tmp_path / "healed"
    shortcut.prune(base, cut, drop="3", **TEXT)
    options: dict[str, Any] = {"method": "distill", "samples": 100, "length": 24, "epochs": 6, "full": True}
    report = shortcut.heal(cut, healed, **options, learning_rate=3e-4, patience=9, quiet=True)
    record = json.loads((healed / "shortcut.json").read_text())["healed"]
    (step,) = record["steps"]
    assert step["best"] < step["first"]
    assert step["judged"] == "distance from the base"
    assert "distance from the base" in report.changes[0]
    ids = sequences()
    if name.endswith("MaskedLM"):
        ids[:, 3::7] = framing_tokenizer().mask_token_id
    whole, short, better = (output(load(folder, name), ids) for folder in (base, cut, healed))
    if name.endswith("Model"):
        whole, short, better = (torch.nn.functional.normalize(each.mean(1), dim=-1) for each in (whole, short, better))
    if name.endswith("MaskedLM"):
        whole, short, better = (each[ids == ids[0, 3]].log_softmax(-1) for each in (whole, short, better))
    assert (better - whole).square().mean() < (short - whole).square().mean()
    assert shortcut.check(healed, samples=2, length=16, quiet=True).healed


def test_the_loss_is_the_distance(encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """Of embeddings the squared distance between directions, of masked tokens the divergence, padding not counted."""
    from shortcut.healing.losses import Student, Teacher
    from shortcut.live.decoder import Decoder
    from shortcut.material.calibration import pad
    from shortcut.records.plan import Base, Plan

    rows = [row[:length].tolist() for row, length in zip(sequences()[:3], (24, 11, 17), strict=True)]
    batch, plan = pad(rows), Plan.dropping(Base("m", None, DEPTH), [2])
    for name, mask in (("BertModel", None), ("BertForMaskedLM", 3)):
        shortcut.cut(encoder(name), tmp_path / name, drop="2", quiet=True)
        base, short = load(encoder(name), name), load(tmp_path / name, name)
        student = Student(Decoder.of(short), Teacher(Decoder.of(base), plan), mask=mask)
        found, expected = student([0, 1, 2], batch).item(), []
        for row in rows:
            hidden = torch.tensor([row])
            places = [place for place in range(len(row)) if place % 7 == 3]
            if mask is not None:
                hidden[0, places] = mask
            one, other = (output(model, hidden)[0].double() for model in (base, short))
            if mask is None:
                pair = [torch.nn.functional.normalize(each.mean(0), dim=-1) for each in (one, other)]
                expected.append((pair[0] - pair[1]).square().sum())
            else:
                logs = [each[places].log_softmax(-1) for each in (one, other)]
                expected += list((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
        assert found == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


HEALING = {
    "heal {} out --method refit": "healing by refit needs a model that predicts the next token, and BertModel gives",
    "heal {} out --method distill --own 3 --epochs 1": "--own is text that the base writes, and this one writes none",
    "heal {} out --method distill --top-k 3 --epochs 1": "--top-k is for models that predict the next token",
}


@pytest.mark.parametrize("command", HEALING)
def test_what_heals_only_models_that_write(
    command: str, encoder: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """One line, and nothing is written."""
    shortcut.cut(encoder("BertModel"), tmp_path / "cut", drop="3", quiet=True)
    argv = command.format(tmp_path / "cut").replace(" out", f" {tmp_path / 'out'}").split()
    assert HEALING[command] in fails(capsys, [*argv, "--samples", "20", "--length", "24", "--quiet"], 1)
    assert not (tmp_path / "out").exists()


WRITING = {
    "score {} --metric perplexity": "the metric perplexity needs a model that predicts tokens: use kl",
    "score {} --metric taylor": "the metric taylor is for decoders that stand alone: use kl or block-influence",
    "prune {} out --count 2 --select auto": "choosing by perplexity needs a model that predicts the next token",
    "prune {} out --count 2 --heal refit": "healing by refit needs a model that predicts the next token",
    "eval {}": "eval needs a model that predicts the next token",
    "speed {}": "speed needs a model that predicts the next token",
    "chat {}": "chat needs a model that predicts the next token",
    "prune {} out --count 2 --metric perplexity": "the metric perplexity needs a model that predicts tokens: use kl",
    "sweep {} --count 1": "choosing by perplexity needs a model that predicts the next token",
}


@pytest.mark.parametrize("line", WRITING)
def test_what_only_models_that_write_can_do(
    line: str, encoder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line, before any long work; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert WRITING[line] in fails(capsys, line.format(encoder("BertModel")).split(), 1)
    assert not list(tmp_path.iterdir())


def write_modules(folder: Path, transformer: Path, layout: str) -> None:
    """A folder as sentence-transformers has it, in one of its layouts."""
    inside, last = ("0_Transformer" if layout == "inside" else ""), ("Dense" if layout == "dense" else "Normalize")
    shutil.copytree(transformer, folder / inside)
    (folder / inside / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    paths = {"Transformer": inside, "Pooling": "1_Pooling", last: f"2_{last}"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 40, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if layout == "dense":
        (folder / "2_Dense").mkdir()
        dense = {"in_features": 40, "out_features": 11, "bias": True}
        dense["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
        (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
        weights = {"linear.weight": torch.randn(11, 40), "linear.bias": torch.randn(11)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize("layout", ["flat", "inside", "dense"])
def test_folders_of_sentence_transformers(layout: str, encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """What modules.json names goes along, and the library gives the embeddings of the base without its blocks."""
    from sentence_transformers import SentenceTransformer

    write_modules(tmp_path / "base", encoder("BertModel"), layout)
    shortcut.cut(tmp_path / "base", tmp_path / "out", drop="1,4", quiet=True)
    short, whole = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("out", "base"))
    texts = ["a whale", "two men on a hill", "x"]
    assert short.encode(texts).shape == (3, 11 if layout == "dense" else 40)
    assert np.abs(short.encode(texts) - whole.encode(texts)).max() > 0.01
    skip(whole[0], [1, 4])
    np.testing.assert_allclose(short.encode(texts), whole.encode(texts), atol=1e-6)


@pytest.mark.parametrize("text", ['{"path": ""}', '[{"path": "../up"}]', '[{"path": ".."}]', "[1]", "nothing"])
def test_modules_that_are_none(text: str, encoder: Callable[[str], Path], tmp_path: Path) -> None:
    """A damaged modules.json, and one that leads out of the folder, are one line."""
    shutil.copytree(encoder("BertModel"), tmp_path / "base")
    (tmp_path / "base" / "modules.json").write_text(text)
    with pytest.raises(ShortcutError, match="modules.json"):
        shortcut.cut(tmp_path / "base", tmp_path / "out", drop="1", quiet=True)
    assert not (tmp_path / "out").exists()
