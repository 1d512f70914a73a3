"""The releases of transformers that checkpoints are loaded with, each in a folder of its own beside one torch."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

WORK = Path(".matrix")
RELEASES = ("4.57.6", "5.0.0", "5.8.1", "5.14.1", "5.16.1", "5.20.2", "5.22.2", "5.23.0", "5.24.0")
# The interpreter that the environment was made from: its pip does not mind what else is installed in that.
PIP = (getattr(sys, "_base_executable", None) or sys.executable, "-m", "pip")


def known_releases() -> tuple[str, ...]:
    """All releases, and the newest there is: the installed one, or one that the package index has."""
    return tuple(sorted({*RELEASES, newest_release()}, key=Version))


def newest_release() -> str:
    """The newest release that pip finds for this Python; where it finds none, the installed one."""
    command = [*PIP, "index", "versions", "transformers"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"transformers \(([\d.]+)\)", told)
    return max(version("transformers"), found[1] if found else "0", key=Version)


def environment_of(release: str) -> Path:
    """The folder with this release and all that it needs but torch; installed where it is not there yet.

    What pip says is told only if it fails: it minds packages beside the folder, which this release never sees.
    """
    folder, part = WORK / release, WORK / f"{release}.part"
    if not folder.exists():
        command = [*PIP, "install", "--quiet", "--target", str(part), f"transformers=={release}", "pillow"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip cannot install transformers {release}: {done.stderr.strip()}")
        part.rename(folder)
    return folder.resolve()


def run_probe(folders: list[Path], environment: Path | None, home: Path) -> tuple[str, str]:
    """What the probe prints of these checkpoints, and how it ended.

    environment: the folder of a release; without one, the installed release loads them. home: where it may put copies
    of modeling files.
    """
    settings = {
        "PYTHONPATH": str(environment or ""),
        "HF_HOME": str(home.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *map(str, folders)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    return done.stdout, f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
