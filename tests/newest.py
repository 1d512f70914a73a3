"""Runs the quick tests with whatever releases are installed; the last line says which, and whether they passed."""

import re
import subprocess
import sys
from importlib.metadata import version

NAMED = ("transformers", "torch", "huggingface_hub", "accelerate", "datasets", "numpy", "peft", "gradio")
SHOWN = 4  # failed tests in the line
QUICK = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]


def outcome(code: int, output: str) -> str:
    """What pytest's exit code and output come to, in one line."""
    releases = ", ".join(f"{name} {version(name)}" for name in NAMED)
    if code == 0:
        return f"newest: passed ({releases})"
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE) or [f"pytest ended with {code}"]
    more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
    return f"newest: broke: {', '.join(failed[:SHOWN])}{more} ({releases})"


def main(arguments: list[str]) -> int:
    """Runs pytest, its output as it comes, and gives its exit code."""
    command = [sys.executable, "-m", "pytest", *QUICK, *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    print(outcome(running.returncode, "".join(lines)), flush=True)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
