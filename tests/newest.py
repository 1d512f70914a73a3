"""Runs the tests without real weights, with what is installed; the last line says with what, and how it went.

Where all of them are those of the lock, with which `make test` runs, there is nothing to run.
"""

import re
import subprocess
import sys
from importlib.metadata import distributions, version

from packaging.markers import default_environment
from packaging.utils import canonicalize_name

from tests.test_lock import LOCK, pins_of

NAMED = ("transformers", "torch", "huggingface_hub", "accelerate", "datasets", "numpy", "peft", "gradio")
SHOWN = 4  # failed tests in the line
TESTS = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]


def outcome(code: int, output: str) -> str:
    """What pytest's exit code and output come to, in one line."""
    if code == 0:
        return f"newest: passed ({releases()})"
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE) or [f"pytest ended with {code}"]
    more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    return f"newest: broke: {', '.join(failed[:SHOWN])}{more} ({releases()})"


def releases() -> str:
    """The installed releases of the packages that matter most."""
    return ", ".join(f"{name} {version(name)}" for name in NAMED)


def newer(installed: dict[str, str], pins: dict[str, str]) -> list[str]:
    """The installed packages that are not of the release in the lock, whatever hardware they were built for."""
    public = {name: release.partition("+")[0] for name, release in installed.items()}
    return sorted(name for name, release in public.items() if pins.get(name, release) != release)


def main(arguments: list[str]) -> int:
    """Runs pytest, its output as it comes, and gives its exit code."""
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in distributions()}
    found = newer(installed, pins_of(LOCK, dict(default_environment())))
    if not found and not arguments:
        print(f"newest: passed, as nothing is newer than what `make test` runs with ({releases()})")
        return 0
    print(f"newer than the lock: {', '.join(found) or 'nothing'}", flush=True)
    command = [sys.executable, "-m", "pytest", *TESTS, *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    print(outcome(running.returncode, "".join(lines)), flush=True)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
