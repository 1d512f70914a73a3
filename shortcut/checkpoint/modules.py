"""Folders of sentence-transformers: modules.json names the transformer, and what its states go through behind it.

The transformer is in the folder itself, or in one inside it. What is cut from either is written into the folder itself,
with the other modules beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from shortcut.common.errors import ShortcutError

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"


def find_transformer(folder: Path) -> Path:
    """The folder of the transformer: that of the first module, where the folder itself has no config.json."""
    first = read_modules(folder)[:1] if not (folder / "config.json").exists() else []
    return folder / first[0]["path"] if first else folder


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a folder, in order; none where it has no modules.json. Raises ShortcutError for a damaged one."""
    path = folder / MODULES
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        places = [module["path"] for module in found]
        sound = all(Path(place).name == place and place not in (".", "..") for place in places)
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ShortcutError(f"cannot read {path}: {error}") from None
    if not sound:
        raise ShortcutError(f"{path} names a module that is in no folder of its own: {places}")
    return list(found)


def copy_modules(source: Path, target: Path) -> None:
    """Write modules.json for a transformer in the target, and copy all that it names besides, weights included.

    source: the folder of the transformer that was cut.
    """
    above = [module["path"] for module in read_modules(source.parent)[:1]]
    root = source.parent if above == [source.name] else source
    first, *others = read_modules(root) or [{}]
    if not first:
        return
    for module in others:
        if (root / module["path"]).is_dir():  # some modules have no settings
            shutil.copytree(root / module["path"], target / module["path"], dirs_exist_ok=True)
    if (root / SETTINGS).exists():
        shutil.copyfile(root / SETTINGS, target / SETTINGS)
    text = json.dumps([{**first, "path": ""}, *others], indent=2, ensure_ascii=False)
    (target / MODULES).write_text(f"{text}\n", encoding="utf-8")
