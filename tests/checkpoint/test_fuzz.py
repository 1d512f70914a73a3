"""A short run of the fuzzer in every test run; `make fuzz` is the long one."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.thorough


def test_hostile_checkpoints_are_refused_or_cut_rightly() -> None:
    """A few seconds of spoilt checkpoints, in a process without torch: refused in one line, or cut byte for byte."""
    argv = [sys.executable, "-m", "tests.fuzz", "--seconds", "5", "--seed", "0"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert min(outcome["cut"], outcome["refused"], outcome["inspected"]) > 0
