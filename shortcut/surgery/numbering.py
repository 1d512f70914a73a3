"""Block numbers in other places than tensor names: names of modules, and patterns that match them, in plain data.

Quantised checkpoints say module by module how they are stored: in config.json, in files beside it, in the headers of
the weight files. A name gets its block's new number. A pattern stays where it says of every kept module, under the new
name, what it said under the old one; where it does not, the names that it matched take its place.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import Anatomy, is_other_tower

# Fields of config.json, and files beside it, that say how single modules are quantised.
QUANTISATION_FIELDS = ("quantization_config", "compression_config", "quantization")
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
_GLOBS = {"modelopt", "quark"}  # methods whose patterns are those of a shell; the others write regular expressions
_TORCHAO = "tensor_names"
_SECONDS = 1.0  # for one pattern against one name: a hostile one could take years

Matcher = Callable[[str], bool]
Renamed = Callable[[str], list[str]]  # what takes the place of a word: nothing where it speaks of deleted blocks


def renumber_settings(
    settings: Mapping[str, Any], anatomy: Anatomy, kept: Sequence[int], names: Iterable[str]
) -> dict[str, Any]:
    """Copy quantisation settings with every module name and pattern, keys included, made right for the kept blocks.

    names: of all tensors of the base. Raises ShortcutError for a word about blocks that cannot be understood.
    """
    method = str(settings.get("quant_method") or settings.get("producer", {}).get("name", ""))
    return _rewrite(settings, _renamer(anatomy, kept, names, method))


def renumber_metadata(
    metadata: Mapping[str, str], anatomy: Anatomy, kept: Sequence[int], names: Iterable[str]
) -> dict[str, str]:
    """The same for the metadata in the header of a weight file, where torchao keeps JSON under the names of tensors.

    names: as above. Other metadata are free text, and stay as they are.
    """
    if _TORCHAO not in metadata:
        return dict(metadata)
    renamed = _renamer(anatomy, kept, names, "torchao")
    try:
        parsed = {key: json.loads(value) if value[:1] in ("[", "{") else value for key, value in metadata.items()}
    except (ValueError, RecursionError):
        raise ShortcutError(f"the weight files list {_TORCHAO} in their metadata, but not as JSON") from None
    rewritten = _rewrite(parsed, renamed)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in rewritten.items()}


def _rewrite(data: Any, renamed: Renamed) -> Any:
    if isinstance(data, dict):
        return {new: _rewrite(value, renamed) for key, value in data.items() for new in renamed(key)}
    if isinstance(data, list):
        return [new for item in data for new in (renamed(item) if isinstance(item, str) else [_rewrite(item, renamed)])]
    if isinstance(data, str):
        words = renamed(data)
        if len(words) != 1:
            raise ShortcutError(f"cannot tell what becomes of {data!r} in the quantisation settings without its blocks")
        return words[0]
    return data


def _renamer(anatomy: Anatomy, kept: Sequence[int], names: Iterable[str], method: str) -> Renamed:
    numbers = {old: new for new, old in enumerate(kept)}
    modules = {module: _new_name(module, anatomy, numbers) for name in names for module in _ancestors(name)}
    containers = {match[1] for name in modules if (match := _NUMBERED.match(name))}
    last = anatomy.container.split(".")[-2]
    about_blocks = re.compile(rf"(^|\W)({re.escape(last)}|layers?|blocks?|h)\\?\.[\[(]?(\\d|\d)")

    @cache
    def renamed(word: str) -> list[str]:
        plain = method != "gptq" and _NUMBERED.fullmatch(word)
        if plain and plain[1].split(".")[-2:-1] == [last]:
            other = plain[1] in containers and plain[1] != anatomy.container
            if not other and not is_other_tower(plain[1], anatomy.container):
                new = numbers.get(int(plain[2]))
                return [] if new is None else [f"{plain[1]}{new}{plain[3]}"]
        if (plain and is_other_tower(plain[1], anatomy.container)) or _NO_PATTERN.fullmatch(word):
            return [word]
        matches = _matcher(word, method)
        if not any(map(matches, modules)) and about_blocks.search(word):
            raise ShortcutError(f"cannot tell which blocks {word!r} means in the quantisation settings")
        matched = [new for old, new in modules.items() if new is not None and matches(old)]
        if matched == [new for new in modules.values() if new is not None and matches(new)]:
            return [word]
        mark, end = (word[:2], "$") if word[:2] in ("-:", "+:") else ("", "")
        return [mark + name + end for name in matched]

    return renamed


_NUMBERED = re.compile(r"((?:[\w-]+\.)*?[A-Za-z_][\w-]*\.)(\d+)((?:\..*)?)", re.ASCII)
_NO_PATTERN = re.compile(r"[A-Za-z_.-]*")


def _ancestors(name: str) -> list[str]:
    """The modules that a tensor is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _new_name(module: str, anatomy: Anatomy, numbers: Mapping[int, int]) -> str | None:
    where = anatomy.split(f"{module}.*")
    if where is None:
        return module
    return anatomy.join(numbers[where[0]], where[1]).removesuffix(".*") if where[0] in numbers else None


def _matcher(word: str, method: str) -> Matcher:
    """Whether a module is meant by a word, as the programs read it that wrote the settings."""
    import regex

    if method in _GLOBS:
        return lambda name: fnmatch.fnmatchcase(name, word)
    marked = word[:3] == "re:" or word[:2] in ("-:", "+:")
    expression = word.partition(":")[2] if marked else word
    if not marked and method != "gptq":  # as transformers does: from the start of a name to the end of a part
        expression = rf"(?:{word})(?:(?<=\.)|(?=\.|$))"
    try:
        compiled = regex.compile(expression)
    except regex.error:
        return lambda name: name.endswith(word)

    def matches(name: str) -> bool:
        try:
            if marked and method == "torchao":
                return compiled.fullmatch(name, timeout=_SECONDS) is not None
            ends = not marked and method != "gptq" and name.endswith(word)
            return ends or compiled.match(name, timeout=_SECONDS) is not None
        except TimeoutError:
            raise ShortcutError(f"the pattern {word[:80]!r} in the quantisation settings takes too long") from None

    return matches
