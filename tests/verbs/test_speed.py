"""`speed` counts what it should: on a clock that the models themselves set, every figure is known beforehand."""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, MambaConfig, MambaForCausalLM

import shortcut
from shortcut.checking import speed
from shortcut.checking.operations import count_operations
from shortcut.checking.speed import Work, cache_bytes, run_once
from shortcut.checkpoint.open import open_model
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.options.presets import SPEED_PRESETS
from shortcut.surgery.savings import CACHED, cache_per_token
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.reference import cached

HELD = 3_000_000  # bytes that the made-up process says a model takes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The calls of all models, as folder and tokens; each takes a second per token and block, and 1/4 more every call.

    Memory is what `HELD` says: no process is started.
    """
    made: list[tuple[str, int]] = []
    seconds = [0.0]

    def load(folder: Path, how: Loading) -> Any:
        model = load_model(folder, how)

        def pass_time(_: Any, __: Any, given: dict[str, Any], _output: Any) -> None:
            earlier = sum(name == folder.name for name, _ in made)
            made.append((folder.name, given["input_ids"].shape[1]))
            seconds[0] += model.config.num_hidden_layers * given["input_ids"].numel() + earlier / 4

        model.register_forward_hook(pass_time, with_kwargs=True)
        return model

    monkeypatch.setattr("shortcut.live.load.load_model", load)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr("shortcut.checking.footprint.measure_footprint", lambda *_, **__: HELD)
    return made


@pytest.fixture(scope="module")
def short(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without two of its blocks, and without the attention of a third."""
    folder = tmp_path_factory.mktemp("speed") / "short"
    shortcut.cut(checkpoint_of("llama"), folder, drop="2-3", mlp_only="5", quiet=True)
    return folder


def test_models_run_in_turn_and_figures_are_those_of_the_clock(
    llama: Path, tmp_path: Path, calls: list[tuple[str, int]]
) -> None:
    """Both run once to count, then in turn; of the runs that count come medians, ranges and ratios, and no others."""
    shortcut.cut(llama, tmp_path / "short", drop="2-3", quiet=True)
    prompt, new, batch, runs, warm_up = 5, 4, 2, 3, 2
    how: dict[str, Any] = {"prompt": prompt, "new_tokens": new, "batch_size": batch, "runs": runs, "warm_up": warm_up}
    found = shortcut.speed(tmp_path / "short", base=str(llama), **how, device="cpu", quiet=True)
    one = [prompt, *[1] * (new - 1)]
    turns = ["short", "base"] * (1 + warm_up + runs)
    assert calls == [(name, tokens) for name in turns for tokens in one]

    def expected(depth: int) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for run in range(1 + warm_up, 1 + warm_up + runs):
            first, *later = [depth * batch * tokens + (run * new + call) / 4 for call, tokens in enumerate(one)]
            rates = {
                "prompt_tokens_per_second": batch * prompt / first,
                "new_tokens_per_second": batch * (new - 1) / sum(later),
                "throughput": batch * new / (first + sum(later)),
            }
            times = {"prompt_seconds": first, "first_token_seconds": first, "new_token_seconds": sum(later) / (new - 1)}
            for key, value in {**rates, **times}.items():
                values.setdefault(key, []).append(value)
        return values

    document = found.to_dict()
    medians = []
    for name, depth in (("model", DEPTH - 2), ("base", DEPTH)):
        for key, values in expected(depth).items():
            spread = {"median": statistics.median(values), "low": min(values), "high": max(values)}
            assert document["figures"][key][name] == pytest.approx(spread)
            medians.append(spread["median"])
    assert found.ratio("prompt_seconds") == pytest.approx((DEPTH * 10 + 4) / ((DEPTH - 2) * 10 + 4))
    for key in expected(DEPTH):
        model, base = (document["figures"][key][name]["median"] for name in ("model", "base"))
        faster = base / model if key.endswith("seconds") else model / base
        assert document["figures"][key]["ratio"] == pytest.approx(faster)
        assert faster > 1
    assert document["figures"]["memory_bytes"]["model"]["median"] == HELD
    assert document["settings"].items() >= {**how, "seed": 0, "device": "cpu", "dtypes": ["float32"] * 2}.items()
    lines = str(found).splitlines()
    assert lines[:2] == [f"base  {llama}", f"model {tmp_path / 'short'}"]
    assert lines[4].split() == ["prompt,", "ms", "7.4e+04", "7.3e+04", "-", "7.5e+04", "5.4e+04", "5.3e+04", "-",
                                "5.5e+04", "1.37", f"{found.ideal('prompt_seconds'):.3g}"]  # fmt: skip


@pytest.mark.usefixtures("calls")
def test_the_cache_is_that_of_transformers(llama: Path, short: Path) -> None:
    """Bytes per token are those of the tensors in a cache, and what the headers say, of halves of blocks as well."""
    found = shortcut.speed(short, base=str(llama), prompt=7, new_tokens=3, batch_size=2, runs=1, quiet=True)
    for folder, key in ((short, "model"), (llama, "base")):
        _, cache = cached(load_model(folder), input_ids=torch.ones(2, 9, dtype=torch.long))
        tensors = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
        size = sum(part.numel() * part.element_size() for part in tensors)
        assert found.to_dict()["figures"]["cache_bytes_per_token"][key]["median"] == size / 18
    plan = shortcut.plan(llama, drop="2-3", mlp_only="5")
    known = cache_per_token(open_model(llama), plan)
    assert known is not None
    assert found.figures[0]["cache_bytes_per_token"].median == known / CACHED * 4
    assert found.ratio("cache_bytes_per_token") == DEPTH / (DEPTH - 3)


def test_windows_that_slide_hold_less(checkpoint_of: Callable[..., Path]) -> None:
    """Blocks that see a window of five tokens keep the four before the next one."""
    model = load_model(checkpoint_of("mistral"))
    _, cache = run_once(model, Work(prompt=9).ids([model]), 2, lambda: None)
    assert cache_bytes(cache) == DEPTH * 2 * (2 * 10) * 4 * 4


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_on_paper(family: str, attention: str, checkpoint_of: Callable[..., Path]) -> None:
    """Two per weight that a token meets, four per pair of tokens and width of the queries; experts as far as chosen."""
    model = load_model(checkpoint_of(family))
    model.set_attn_implementation(attention)
    own, batch, prompt, new = FAMILIES[family], 2, 7, 3
    width, inner = own["hidden_size"], own["intermediate_size"]
    mlp = 3 * width * inner if family == "llama" else 2 * 3 * width * inner + 3 * width
    weights = DEPTH * (width * (width + width // 2) * 2 + mlp)

    def on_paper(tokens: int, seen: int) -> int:
        pairs = DEPTH * 4 * batch * tokens * seen * width
        return 2 * batch * (tokens * weights + width * VOCABULARY) + pairs

    expected = on_paper(prompt, prompt), on_paper(1, prompt + 1) + on_paper(1, prompt + 2)
    assert count_operations(model, Work(prompt, new, batch)) == expected


@pytest.mark.usefixtures("calls")
def test_the_ideal_follows_the_operations(llama: Path, short: Path) -> None:
    """Beside ratios of times stand those of the operations, none beside memory; of quantised models none at all."""
    found = shortcut.speed(short, base=str(llama), prompt=16, new_tokens=3, runs=1, quiet=True)
    counted = [count_operations(load_model(folder), Work(16, 3)) or (0, 0) for folder in (llama, short)]
    assert found.ideal("first_token_seconds") == counted[0][0] / counted[1][0] > 1
    assert found.ideal("new_tokens_per_second") == counted[0][1] / counted[1][1] > 1
    assert found.ideal("memory_bytes") is None
    model = load_model(llama)
    model.hf_quantizer = object()
    assert count_operations(model, Work(4, 2)) is None


def test_a_preset_is_its_options(llama: Path, calls: list[tuple[str, int]]) -> None:
    """The published protocol: 12 tokens, 128 new ones, 20 runs after 10; what is given beside it wins."""
    options = SPEED_PRESETS["shortened-llama"].options
    assert options == {"prompt": 12, "new_tokens": 128, "runs": 20, "warm_up": 10}
    given: dict[str, Any] = {"preset": "shortened-llama", "quiet": True}
    found = shortcut.speed(llama, new_tokens=2, **given)
    assert found.settings.items() >= {**options, "preset": "shortened-llama", "new_tokens": 2}.items()
    assert calls == [("base", 12), ("base", 1)] * 31
    assert found.to_dict()["base"] is None
    assert "ratio" not in str(found)


@pytest.mark.thorough
def test_memory_of_a_process_of_its_own(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights and some more are resident, code of its own included; the document on the disk is the one printed."""
    words = [
        "speed",
        str(short),
        "--device",
        "cpu",
        "--prompt",
        "3",
        "--new-tokens",
        "2",
        "--runs",
        "1",
        "--json",
        "--quiet",
    ]
    assert main([*words, "--batch-size", "2", "--out", str(tmp_path / "speed.json")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "speed.json").read_text())
    memory = document["figures"]["memory_bytes"]["model"]
    weights = sum(weight.nbytes for weight in load_model(short).parameters())
    assert weights < memory["median"] < 100_000_000  # torch itself holds more


class OnGpu:
    """Stands for a model on a GPU, with 300 bytes of weights."""

    device = torch.device("cuda", 0)

    def get_memory_footprint(self) -> int:
        return 300

    def forward(self, cache: Cache | None = None, **_: Any) -> Any:
        """Logits of one token, and an empty cache."""
        return SimpleNamespace(logits=torch.zeros(1, 1, 3), cache=cache or DynamicCache())

    __call__ = forward


def test_memory_on_a_gpu_leaves_out_the_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 950 bytes at most, 400 were held before by others; the driver is asked how busy it was, where it answers."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 950)
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 40)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    run = speed._time_run(OnGpu(), torch.zeros(1, 1, dtype=torch.long), 2)
    assert (run.memory, run.use, done) == (550, None, ["reset", *["wait"] * 4])
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=OSError))
    assert speed._time_run(OnGpu(), torch.zeros(1, 1, dtype=torch.long), 2).use == 0.4


MISTAKES = {
    "--prompt 0": "--prompt 0 is too few: at least 1",
    "--runs 0": "--runs 0 is too few: at least 1",
    "--warm-up -1": "--warm-up -1 is too few: at least 0",
    "--batch-size 0": "--batch-size 0 is too few: at least 1",
    "--new-tokens 1": "--new-tokens 1 is too few: at least 2, the first of which comes with the prompt",
    "--prompt 100 --new-tokens 29": "--prompt 100 and --new-tokens 29 are 129 tokens: {llama} has 128 positions",
    "--dtype int8": "unknown dtype 'int8': there are auto, float32, bfloat16, float16",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_line(options: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are too small and runs longer than the model's positions are refused before anything is loaded."""
    assert main(["speed", str(llama), *options.split()]) == 1
    assert capsys.readouterr().err == f"shortcut: {MISTAKES[options].format(llama=llama)}\n"


@pytest.mark.parametrize(("errors", "reason"), [("a\nb: no room\n", "b: no room"), ("", "it ended with -9")])
def test_a_process_that_fails_is_one_line(
    errors: str, reason: str, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last that the process said is the reason, or how it ended."""
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=-9, stderr=errors))
    assert main(["speed", str(llama), "--prompt", "3", "--device", "cpu", "--quiet"]) == 1
    expected = f"shortcut: {llama} does not run in a process of its own, to see what memory it takes: {reason}\n"
    assert capsys.readouterr().err == expected


def test_states_are_used() -> None:
    """Mamba reads one token behind what its state holds: the same tokens as by reading all of them again."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=24, state_size=4, num_hidden_layers=3)).eval()
    ids = Work(prompt=9, batch_size=2).ids([model])
    read: list[int] = []
    chosen: list[torch.Tensor] = []

    def look(_: Any, __: Any, kwargs: Any, output: Any) -> None:
        read.append(kwargs["input_ids"].shape[1])
        chosen.append(output.logits[:, -1].argmax(-1))

    handle = model.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        run_once(model, ids, 6, lambda: None)
        handle.remove()
        for token in chosen:
            assert torch.equal(model(ids, use_cache=False).logits[:, -1].argmax(-1), token)
            ids = torch.cat([ids, token[:, None]], dim=1)
    assert read == [9, 1, 1, 1, 1, 1]


def test_a_model_without_a_cache_is_refused(llama: Path) -> None:
    """Its new tokens would cost whole prompts, which is said instead."""
    model = load_model(llama)
    model.register_forward_hook(lambda *_: SimpleNamespace(cache=None))
    with pytest.raises(ShortcutError, match="llama keeps no cache of keys and values"):
        run_once(model, Work(3, 2).ids([model]), 2, lambda: None)
