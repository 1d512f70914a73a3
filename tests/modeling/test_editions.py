"""Modeling files outlive releases of transformers: what they need is found, and old editions are known and renewed."""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.models.llama import modeling_llama

import shortcut
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.family import halves
from shortcut.live.load import load_model
from shortcut.modeling import editions, passing
from shortcut.modeling.editions import EDITION, NEWEST, OLDEST, edition_of, hash_of
from shortcut.modeling.passing import cache_argument, caches_can_be_told
from shortcut.records.plan import Base
from tests.conftest import DEPTH
from tests.editions import EDITIONS, modeling_files
from tests.fresh import start_fresh
from tests.reference import greedy, logits

LAST = {"last_token": "2,5"}


def load(folder: Path) -> Any:
    """As anybody does."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_every_file_is_on_record() -> None:
    """What shortcut writes now is noted under its edition, so that a later version knows it: else raise EDITION."""
    noted = json.loads(EDITIONS.read_text())
    assert [int(edition) for edition in noted] == list(range(1, EDITION + 1))
    assert all(edition_of(modeling.code) == EDITION for modeling in modeling_files()), "python -m tests.editions"


def test_the_first_line_says_what_it_is() -> None:
    """Edition, the oldest release that will do, and the newest it was proven with."""
    for modeling in modeling_files():
        kind = modeling.file.removeprefix("modeling_").removesuffix(".py")
        head = f"# Edition {EDITION}, for transformers {OLDEST[kind]} or newer, proven up to {NEWEST}."
        assert modeling.code.startswith(head)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes up a release in which blocks of Llama take their cache, or their mask, under another name."""

    def rename(old: str, new: str, *, annotated: bool = True) -> None:
        stock = inspect.unwrap(modeling_llama.LlamaDecoderLayer.forward)
        signature = inspect.signature(stock)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if new in kwargs:
                kwargs[old] = kwargs.pop(new)
            return stock(self, *args, **kwargs)

        def take(self: Any, *args: Any, **kwargs: Any) -> Any:  # as the decoder of that release calls its blocks
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return call(self, *args, **kwargs)

        own = [
            parameter.replace(name=new, annotation=parameter.annotation if annotated else parameter.empty)
            if parameter.name == old
            else parameter
            for parameter in signature.parameters.values()
        ]
        forward.__qualname__ = stock.__qualname__
        forward.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        call = modeling_llama.LlamaDecoderLayer.__call__
        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__call__", take)

    return rename


CACHE = cache_argument(modeling_llama.LlamaDecoderLayer.forward)


def test_a_cache_under_another_name_is_found(
    llama: Path, token_ids: Tensor, tmp_path: Path, renamed: Callable[..., None]
) -> None:
    """By its annotation, in whatever release: the same logits and the same continuation."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    before = load(tmp_path / "short")
    expected = logits(before, token_ids), greedy(before, token_ids)
    renamed(CACHE, "memory")
    assert cache_argument(modeling_llama.LlamaDecoderLayer.forward) == "memory"
    after = load(tmp_path / "short")
    torch.testing.assert_close(logits(after, token_ids), expected[0])
    assert torch.equal(greedy(after, token_ids), expected[1])


def test_a_cache_that_cannot_be_found(llama: Path, tmp_path: Path, renamed: Callable[..., None]) -> None:
    """Without annotation and known name, from_pretrained fails, in one line that says what was looked for."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    renamed(CACHE, "memory", annotated=False)
    with pytest.raises(
        TypeError, match=r"LlamaDecoderLayer.* of transformers [\d.]+ takes no cache .*refresh"
    ) as error:
        load(tmp_path / "short")
    assert "\n" not in str(error.value)


def test_a_mask_under_another_name(llama: Path, tmp_path: Path, renamed: Callable[..., None]) -> None:
    """It is never passed over: from_pretrained fails."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    renamed("attention_mask", "visible")
    with pytest.raises(TypeError, match="takes no attention_mask"):
        load(tmp_path / "short")


def test_other_arguments(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """A tensor that is as long as the prompt, under a name that is not known, is not broadcast without a word."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    model = load(tmp_path / "short")
    tokens = token_ids.shape[1]
    for value in (torch.zeros(1, tokens, 3), (torch.zeros(2), [torch.zeros(tokens)])):
        with pytest.raises(TypeError, match=rf"'phases' is as long as the prompt \({tokens} tokens\)"):
            model(token_ids, phases=value)
    model(token_ids, phases=torch.zeros(1, tokens + 1, 3))


def test_a_block_that_stores_nothing(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """The reason is said, in place of an error somewhere behind it."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    model = load(tmp_path / "short")
    model.model.layers[5].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(TypeError, match=f"LlamaDecoderLayer stored nothing in the cache it was given as '{CACHE}'"):
        model(token_ids)


def test_annotations() -> None:
    """One annotated argument is found whatever it is called; without one, known names; never a guess."""

    def plain(states: Tensor, layer_past: Any = None) -> None: ...

    def annotated(states: Tensor, cache: Any = None, memory: DynamicCache | None = None) -> None: ...

    def two(states: Tensor, one: Cache | None = None, other: Cache | None = None) -> None: ...

    def several(states: Tensor, cache: Any = None, layer_past: Any = None) -> None: ...

    assert [cache_argument(each) for each in (plain, annotated)] == ["layer_past", "memory"]
    for each in (two, several):
        with pytest.raises(TypeError, match="takes no cache that is known"):
            cache_argument(each)


def test_without_a_cache_of_ones_own_choice(
    llama: Path, token_ids: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """generate(use_cache=False) of last-token checkpoints writes what it writes with a cache, and says so once."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    model = load(tmp_path / "short")
    expected = greedy(model, token_ids)
    assert caplog.text == ""
    for _ in range(2):
        assert torch.equal(greedy(model, token_ids, cache=False), expected)
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(token_ids, max_new_tokens=9, min_new_tokens=9, pad_token_id=0), expected)
    assert caplog.text.count("use_cache=False is not followed") == 1
    shortcut.cut(llama, tmp_path / "half", mlp_only="2", quiet=True)
    greedy(load(tmp_path / "half"), token_ids, cache=False)
    assert caplog.text.count("use_cache=False is not followed") == 1


def test_a_static_cache(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """Room for more in the cache is not looked at."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    model = load(tmp_path / "short")
    how: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    static = model.generate(token_ids, cache_implementation="static", disable_compile=True, **how)
    assert torch.equal(static, greedy(model, token_ids))


def test_missing_weights_are_not_filled_in(llama: Path, tmp_path: Path) -> None:
    """Transformers logs them and goes on with random numbers; a checkpoint of shortcut's refuses."""
    from safetensors.torch import load_file, save_file

    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    weights = load_file(tmp_path / "short" / "model.safetensors")
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^1 weights are not in the checkpoint, such as model\.layers\.3"):
        load(tmp_path / "short")


def test_caches_that_cannot_be_told(llama: Path, monkeypatch: pytest.MonkeyPatch, token_ids: Tensor) -> None:
    """Where transformers cannot leave blocks out of its cache, block 0 keeps its attention, in checkpoints and live."""
    assert caches_can_be_told()
    monkeypatch.setattr(passing, "caches_can_be_told", lambda: False)
    model, base = load_model(llama), Base("", None, DEPTH)
    for actions in ({0: "mlp-only"}, {0: "drop", 6: "drop"}):
        with shortcut.preview(model, shortcut.Plan.of(base, actions)):
            logits(model, token_ids)
            with pytest.raises(ShortcutError, match="block 0 has no attention, and transformers .* pip install -U"):
                greedy(model, token_ids)
    assert getattr(model.config, "kv_sharing_modes", None) is None
    with shortcut.preview(model, shortcut.Plan.of(base, {1: "mlp-only"})):
        greedy(model, token_ids)


FAILING = """def run_last(*_: Any, **__: Any) -> Any:
    raise TypeError("a release too late")


def no_longer_run("""


@pytest.fixture
def outdated(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose modeling file is of an edition before, and fails when the model is run."""
    shortcut.cut(llama, tmp_path / "old", **LAST, attention_only="3", quiet=True)
    path = tmp_path / "old" / "modeling_hollow.py"
    path.write_text(path.read_text().replace("def run_last(", FAILING))
    known = {**editions._editions(), hash_of(path.read_text()): EDITION - 1}
    monkeypatch.setattr(editions, "_editions", lambda: known)
    return tmp_path / "old"


def test_an_older_edition_is_trusted_and_named(
    outdated: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shortcut's own code: it is run without being asked for, and a line says that there is a newer one."""
    hint = f"{outdated.resolve()} has an older edition of its modeling file: `shortcut refresh {outdated.resolve()}`"
    with pytest.raises(TypeError, match="a release too late"):
        main(["check", str(outdated), "--base", str(llama), "--length", "32", "--samples", "2"])
    assert f"{outdated} has an older edition of its modeling file" in capsys.readouterr().err
    assert main(["inspect", str(outdated)]) == 0
    assert hint in capsys.readouterr().err
    assert main(["inspect", str(outdated), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    shortcut.cut(outdated, tmp_path / "shorter", drop="1", quiet=True)  # what is written anew has the current one
    assert edition_of((tmp_path / "shorter" / "modeling_hollow.py").read_text()) == EDITION


@pytest.mark.parametrize("kind", ["hollow", "shortv"])
def test_the_first_edition(kind: str, llama: Path, frozen: Callable[..., Any], tmp_path: Path) -> None:
    """Checkpoints as they were written before editions were counted: known, renewed, and equal to new ones."""
    new = tmp_path / "new"
    if kind == "hollow":
        shortcut.cut(llama, new, **LAST, attention_only="3", mlp_only="0", quiet=True)
    else:
        shutil.copytree(frozen("llava")[1], new)
    old = shutil.copytree(new, tmp_path / "old")
    first = (Path(__file__).parents[1] / "data" / f"edition_1_{kind}.txt").read_text()
    (old / f"modeling_{kind}.py").write_text(first)
    config = json.loads((old / "config.json").read_text())
    assert edition_of(first) == 1
    assert halves.has_own_code(old, config)
    assert halves.is_outdated(old, config)
    report = shortcut.refresh(old)
    assert (report.before, report.now, report.renewed) == (1, EDITION, True)
    assert contents(old) == contents(new)


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_refresh_renews_one_file(
    outdated: Path, llama: Path, tmp_path: Path, token_ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current file takes the place of the old one, all others stay, and the model is that of a new cut."""
    before = contents(outdated)
    assert main(["refresh", str(outdated)]) == 0
    out = capsys.readouterr().out
    assert f"modeling_hollow.py of {outdated}: edition {EDITION - 1} -> edition {EDITION}" in out
    assert transformers.__version__ in out
    after = contents(outdated)
    assert {name for name in before if after[name] != before[name]} == {"modeling_hollow.py"}
    assert before.keys() == after.keys()
    shortcut.cut(llama, tmp_path / "new", **LAST, attention_only="3", quiet=True)
    assert after["modeling_hollow.py"] == (tmp_path / "new" / "modeling_hollow.py").read_bytes()
    torch.testing.assert_close(logits(load(outdated), token_ids), logits(load(tmp_path / "new"), token_ids))
    assert main(["refresh", str(outdated)]) == 0
    assert "the current one: nothing to do" in capsys.readouterr().out
    (outdated / "modeling_hollow.py").unlink()
    assert "it was missing -> edition" in str(shortcut.refresh(outdated))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "modeling_hollow.py").write_text("# mine"), "is not as shortcut wrote it: remove"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "there is nothing to refresh"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_refresh_leaves_others_alone(outdated: Path, spoil: Callable[[Path], object], message: str) -> None:
    """A file changed by hand, a checkpoint without one, no checkpoint: one line, and nothing is written."""
    spoil(outdated)
    before = contents(outdated)
    with pytest.raises(ShortcutError, match=message) as error:
        shortcut.refresh(outdated)
    assert "\n" not in str(error.value)
    assert contents(outdated) == before


def test_refresh_writes_nothing_that_does_not_build(outdated: Path) -> None:
    """Where the installed transformers cannot build the model by the new file, the old one stays."""
    before = contents(outdated)
    config = json.loads(before["config.json"])
    (outdated / "config.json").write_text(json.dumps({**config, "hidden_size": -8}))
    before = contents(outdated)
    with pytest.raises(ShortcutError, match="transformers cannot"):
        shortcut.refresh(outdated)
    assert contents(outdated) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{old} --create-pr", "is a folder: --create-pr and --revision are for models of the Hub"),
        ("nowhere", "no checkpoint at nowhere: neither a folder nor a Hub id (org/name)"),
        ("org/name --create-pr --revision v2", "leave out --revision"),
    ],
)
def test_mistakes(words: str, message: str, outdated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each."""
    assert main(["refresh", *words.format(old=outdated).split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("release", "said"), [("99.1.0", True), (NEWEST, False), (f"{NEWEST}.post1", False)])
def test_releases_beyond_the_proven_ones(
    release: str, said: bool, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Commands that write a modeling file say in one line that nobody has tried it there; others do not."""
    monkeypatch.setattr(editions, "version", lambda _: release)
    assert main(["cut", str(llama), str(tmp_path / "half"), "--mlp-only", "3"]) == 0
    line = f"that file is proven up to transformers {NEWEST}, and {release} is installed: see that check passes"
    assert (line in capsys.readouterr().out) is said
    assert main(["cut", str(llama), str(tmp_path / "short"), "--drop", "3"]) == 0
    assert "proven" not in capsys.readouterr().out


OLDER = """
import transformers
transformers.__version__ = sys.argv[2]
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("import LlamaConfig, LlamaForCausalLM", "import LaterConfig", "does not know the family of this model: pip"),
        (
            '"model.layers"',
            '"model.blocks"',
            r"LlamaForCausalLM of transformers .* has no blocks at model\.blocks: use",
        ),
    ],
)
def test_releases_that_lack_something(was: str, now: str, message: str, llama: Path, tmp_path: Path) -> None:
    """A family that is not there yet, or keeps its blocks elsewhere, is one line when the model is loaded."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    path = tmp_path / "short" / "modeling_hollow.py"
    assert path.read_text().count(was) == 1
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises((ImportError, TypeError), match=message) as error:
        load(tmp_path / "short")
    assert "\n" not in str(error.value)


@pytest.mark.thorough
def test_older_releases_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    """A release before the oldest that will do gets one line, whatever else it lacks."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    done = start_fresh(OLDER, "short", "5.2.0", folder=tmp_path)
    oldest = OLDEST["hollow"]
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: this checkpoint needs transformers {oldest} or newer, and transformers 5.2.0 is installed: "
        "pip install -U transformers"
    )


def test_files_without_a_known_text_are_foreign(llama: Path, tmp_path: Path) -> None:
    """A file that differs by one sign is not run without --trust-remote-code."""
    shortcut.cut(llama, tmp_path / "short", **LAST, quiet=True)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert halves.has_own_code(tmp_path / "short", config)
    path = tmp_path / "short" / "modeling_hollow.py"
    path.write_text(path.read_text() + "\n")
    assert not halves.has_own_code(tmp_path / "short", config)
    assert len(load(tmp_path / "short").model.layers) == DEPTH
