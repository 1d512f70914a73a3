"""How much memory a model takes while it runs on a CPU: two in one process cannot be told apart, so each has its own.

Run as a module, this file is that process.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shortcut.common.errors import ShortcutError
from shortcut.options.groups import Loading
from shortcut.options.verb import handed_on

if TYPE_CHECKING:
    from shortcut.checking.speed import Work

_RESET = Path("/proc/self/clear_refs")  # Linux: 5 has the peak start anew from what is resident now


def measure_footprint(folder: Path, work: "Work", how: Loading) -> int | None:
    """Bytes resident at most during a run, beyond what the process held with the code of the model and no weights.

    None where the system does not say; ShortcutError where
    the process fails.
    """
    if not os.access(_RESET, os.W_OK):
        return None
    asked = json.dumps({"folder": str(folder), "work": asdict(work), "how": asdict(handed_on(Loading, how))})
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "shortcut.checking.footprint", asked],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:300]
        raise ShortcutError(f"{folder} does not run in a process of its own, to see what memory it takes: {reason}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _main(folder: Path, work: "Work", how: Loading) -> int:
    import torch

    from shortcut.checking.speed import run_once
    from shortcut.live.load import build_empty, load_model, trusts

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own_code = "auto_map" in config and trusts(folder, trust_remote_code=how.trust_remote_code)
    build_empty(config, folder if own_code else None)
    before = _resident("VmRSS")
    model = load_model(folder, how)
    _RESET.write_text("5")
    with torch.inference_mode():
        run_once(model, work.ids([model]), work.new_tokens, lambda: None)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    from shortcut.checking.speed import Work

    print(_main(Path(given["folder"]), Work(**given["work"]), Loading(**given["how"])))
