"""`make newest` says in its last line what became of the tests, for a log of which nobody reads more."""

import re

from tests.newest import SHOWN, newer, outcome

RELEASES = r"\(transformers [\d.]+, torch [\d.]+\S*, huggingface_hub [\d.]+, .*\)"


def test_all_passed() -> None:
    """The line names the releases that the tests passed with."""
    assert re.fullmatch(f"newest: passed {RELEASES}", outcome(0, "7 passed"))


def test_nothing_is_newer() -> None:
    """Packages of the lock are compared by their releases, not by what they were built for; others do not count."""
    pins = {"torch": "2.13.0", "peft": "0.21.2", "gradio": "6.0"}
    assert newer({"torch": "2.13.0+cpu", "peft": "0.21.2", "pip": "23.2"}, pins) == []
    assert newer({"torch": "2.14.1", "peft": "0.22.0", "gradio": "6.0"}, pins) == ["peft", "torch"]


def test_some_failed() -> None:
    """A few names, of failed tests and of files that could not be read; where there are none, how pytest ended."""
    output = "FAILED tests/test_a.py::test_b[c-d] - assert 0\nERROR tests/test_e.py\n1 failed, 1 error"
    assert re.fullmatch(rf"newest: broke: test_a.py::test_b\[c-d\], test_e.py {RELEASES}", outcome(1, output))
    many = "".join(f"FAILED tests/test_a.py::test_{number} - x\n" for number in range(SHOWN + 3))
    assert " and 3 more (" in outcome(1, many)
    assert outcome(3, "").startswith("newest: broke: pytest ended with 3 (")
