"""The build of the package: imports go downwards only, files and functions stay short, torch stays out of the floor."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import shortcut

PACKAGE = Path(shortcut.__file__).parent
FLOORS = [
    {"errors", "text", "processes", "arguments", "option_help", "presets"},
    {"progress", "modeling"},
    {"records", "anatomy", "live"},
    {"offload", "branches", "speech"},
    {"decoder"},
    {"surgery", "scoring"},
    {"choose", "checking", "repair"},
    {"publish", "conversion"},
    {"sources", "columns"},
    {"commands", "talk"},
    {"runs", "comparing"},
    {"measure", "selection", "tuning", "evaluation", "pushing", "refreshing", "timing"},
    {"healing"},
    {"road"},
    {"recipes", "freezing"},
    {"demos"},
    {"cli"},
    {"__main__"},
]
STRANGERS = {"surgery", "scoring"}  # on one floor, and yet neither knows of the other
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
FILE_LIMIT, FUNCTION_LIMIT = 300, 45  # lines; a function's from its docstring on: a signature lists options


def name_of(path):
    """The name of a module inside the package, such as "records.plan"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module):
    """The number of the floor that a module is on."""
    (floor,) = [number for number, names in enumerate(FLOORS) if module.split(".")[0] in names]
    return floor


def imports_of(tree):
    """The modules of the package that a file imports, inside functions too, with "" for the package's version."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "shortcut"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "shortcut":
                found |= {"" if alias.name == "__version__" else alias.name for alias in node.names}
            elif (node.module or "").startswith("shortcut."):
                found.add(node.module.removeprefix("shortcut."))
    return found


def test_every_module_is_on_one_floor():
    """Every file and folder of the package is on exactly one floor, and every floor is inhabited."""
    assert {name_of(path).split(".")[0] for path in MODULES} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


def test_imports_are_seen():
    """The reading of imports sees every way there is to write one."""
    text = "import shortcut.text\nfrom shortcut import __version__, road\n"
    text += "def f():\n    from shortcut.records.plan import Plan\n"
    assert imports_of(ast.parse(text)) == {"text", "", "road", "records.plan"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards(path):
    """A module imports only what is on its own floor or below, and what is really there."""
    module = name_of(path)
    for other in imports_of(ast.parse(path.read_text())) - {""}:
        assert find_spec(f"shortcut.{other}") is not None
        assert floor_of(other) <= floor_of(module), f"{module} imports {other}, which is on a higher floor"
        parts = {module.split(".")[0], other.split(".")[0]}
        assert parts != STRANGERS, f"{module} imports {other}"


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py"], ids=name_of)
def test_files_and_functions_are_short(path):
    """No file and no function is longer than can be read at once."""
    text = path.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.body[0].lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LIMIT} == {}
    assert len(text.splitlines()) <= FILE_LIMIT


@pytest.mark.parametrize("line", ["--help", "inspect {llama}", "cut {llama} out --drop 2", "plan {llama} --drop 2"])
def test_what_works_on_files_imports_no_model_library(llama, tmp_path, line):
    """Neither the package, nor its command line, nor what works on files alone imports torch or transformers."""
    program = "import sys, shortcut, shortcut.cli; code = shortcut.cli.main(sys.argv[1:])\n"
    program += "print(code, sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    words = [sys.executable, "-c", program, *line.format(llama=llama).split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert done.stderr == "0 []\n"
