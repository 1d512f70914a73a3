"""The texts of the modeling files: put together as one file each, numbered by edition, and known again by their hash.

The files of an edition are written by `python -m tests.editions` into `data/editions.json`, all that were ever shipped:
a checkpoint with an older one is still known as shortcut's own, and `shortcut refresh` gives it the current one.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from importlib.resources import files

EDITION = 2
# The oldest release of transformers that each kind of file works with, and the newest that `make matrix` ran.
OLDEST = {"hollow": "5.8", "shortv": "5.8", "decilm": "4.57"}
NEWEST = "5.24.0"

_HEAD = """# Edition {edition}, for transformers {oldest} or newer, proven up to {newest}. `shortcut refresh` renews it.
{docstring}

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("{oldest}"):
    needed, here = "transformers {oldest} or newer", f"transformers {{transformers.__version__}}"
    raise ImportError(f"this checkpoint needs {{needed}}, and {{here}} is installed: pip install -U transformers")

{imports}

try:
    from transformers import {native}
except ImportError:
    here = f"transformers {{transformers.__version__}}"
    raise ImportError(f"{{here}} does not know the family of this model: pip install -U transformers") from None

{body}"""
_SHARED = "shortcut.modeling.passing"


def read_template(kind: str) -> str:
    """The text of a module beside this one."""
    return files("shortcut").joinpath("modeling", f"{kind}.py").read_text(encoding="utf-8")


def flat_file(kind: str, text: str) -> str:
    """The file that goes into a checkpoint: this text of a kind, and what it takes from the module that kinds share."""
    docstring, imports, body = _parts(text)
    native = ", ".join(sorted(imports.pop("transformers")))
    if _SHARED in imports:
        del imports[_SHARED]
        _, more, shared = _parts(read_template(_SHARED.rpartition(".")[2]))
        imports = {module: imports.get(module, set()) | more.get(module, set()) for module in {**imports, **more}}
        body = f"{shared.rstrip()}\n\n\n{body.lstrip()}"
    return _HEAD.format(
        edition=EDITION,
        oldest=OLDEST[kind],
        newest=NEWEST,
        docstring=docstring,
        imports="\n".join(_in_order(imports)),
        native=native,
        body=body.lstrip(),
    )


def edition_of(text: str) -> int | None:
    """The edition of a modeling file; None where shortcut never wrote this text."""
    return _editions().get(hash_of(text))


def hash_of(text: str) -> str:
    """What tells one modeling file from another."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def beyond_proof() -> str | None:
    """The installed release of transformers, where it is a later one than these files were proven with."""
    here = version("transformers")
    now, proven = (tuple(map(int, each.split(".")[:2])) for each in (here, NEWEST))
    return here if now > proven else None


@cache
def _editions() -> Mapping[str, int]:
    known = json.loads(files("shortcut").joinpath("data", "editions.json").read_text(encoding="utf-8"))
    return {each: int(edition) for edition, hashes in known.items() for each in hashes}


def _parts(text: str) -> tuple[str, dict[str, set[str]], str]:
    """The docstring of a module; its imports, names by module, where a module may be imported whole; and the rest."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    imports: dict[str, set[str]] = {}
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in nodes:
        for alias in node.names:
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            imports.setdefault(module, set()).add(alias.name if isinstance(node, ast.ImportFrom) else "")
    docstring = "".join(lines[: tree.body[0].end_lineno]).rstrip()
    return docstring, imports, "".join(lines[nodes[-1].end_lineno :])


def _in_order(imports: Mapping[str, set[str]]) -> Iterator[str]:
    """The lines of imports: of modules, then of names; of the standard library, then of others."""
    for others in (False, True):
        chosen = {name: names for name, names in sorted(imports.items()) if _is_other(name) is others}
        yield from (f"import {module}" for module, names in chosen.items() if "" in names and module != "transformers")
        for module in [module for module, names in chosen.items() if any(names)]:
            yield f"from {module} import {', '.join(sorted(filter(None, chosen[module])))}"
        yield from [] if others else [""]


def _is_other(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "transformers")
