"""What shortcut writes, loaded by a range of releases of transformers, without shortcut: `python -m tests.matrix`."""
