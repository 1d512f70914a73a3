"""`python -m shortcut`, which is also what torchrun starts."""

from shortcut.cli import entry

entry()
