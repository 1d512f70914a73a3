"""A fresh interpreter that has transformers and no shortcut, as whoever loads a checkpoint has."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_fresh(code: str, *words: Any, folder: Path, hub: str | None = None, **environment: str) -> str:
    """Run Python with these words in its sys.argv, in a folder; gives what it prints.

    hub: the address of a server that is its Hub; what it fetches is cached in folder/home.
    """
    done = start_fresh(code, *words, folder=folder, hub=hub, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start_fresh(
    code: str, *words: Any, folder: Path, hub: str | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The same, whatever comes of it."""
    there = {"HF_ENDPOINT": hub or "", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "x"}
    where = {**os.environ, "PYTHONPATH": "", **({**there, "HF_HUB_DISABLE_XET": "1"} if hub else {}), **environment}
    command = [sys.executable, "-c", f"import sys\nsys.modules['shortcut'] = None\n{code}", *map(str, words)]
    return subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=False)
