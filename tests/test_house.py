"""The house: rooms on floors, imports that only go down, functions that can be read at once, torch where needed."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import shortcut

PACKAGE = Path(shortcut.__file__).parent
FLOORS = [
    {"common", "modeling"},
    {"records", "family", "options"},
    {"checkpoint", "live"},
    {"surgery", "material"},
    {"scoring", "checking", "healing", "talk"},
    {"choose", "publish"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
SIDEWAYS = {("options", "records"), ("live", "checkpoint")}  # on one floor, and the first knows the second
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LIMIT, FUNCTION_LIMIT, PARAMETER_LIMIT = 300, 45, 8
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """The room, or the file at the top, of a module such as "records.plan"; the package itself is ""."""
    return module.split(".")[0]


def name_of(path: Path) -> str:
    """The name of a module inside the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports_of(tree: ast.AST) -> set[str]:
    """The modules of the package that a file imports, inside functions too, with "" for the package itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "shortcut"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "shortcut":
                found.add("")
            elif (node.module or "").startswith("shortcut."):
                found.add(node.module.removeprefix("shortcut."))
    return found


def test_every_room_is_on_a_floor() -> None:
    """Every file and folder of the package is on exactly one floor, and every floor is inhabited."""
    assert {room_of(name_of(path)) for path in FILES} - {""} == set(FLOOR_OF)
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


def test_imports_are_seen() -> None:
    """The reading of imports sees every way there is to write one."""
    text = "import shortcut.text\nfrom shortcut import __version__, road\n"
    text += "def f():\n    from shortcut.records.plan import Plan\n"
    assert imports_of(ast.parse(text)) == {"text", "", "records.plan"}


def test_imports_go_down() -> None:
    """A room imports from itself and from the floors below, and sideways only where that is said above."""
    wrong = []
    for path in FILES:
        module = name_of(path)
        room = room_of(module)
        for other in imports_of(ast.parse(path.read_text())) if room else ():
            assert find_spec(f"shortcut.{other}") is not None, f"{module} imports {other}, which is not there"
            to = room_of(other)
            down = to == room or (room, to) in SIDEWAYS or (to in FLOOR_OF and FLOOR_OF[to] < FLOOR_OF[room])
            wrong += [] if down else [f"{module} imports {other}"]
    assert wrong == []


def test_verbs_are_called_by_verbs() -> None:
    """What a verb is made of never calls one: only other verbs, the command line and the Python API do."""
    callers = {
        room_of(name_of(path)) for path in FILES if "verbs" in map(room_of, imports_of(ast.parse(path.read_text())))
    }
    assert callers == {"", "verbs", "cli"}


def test_files_and_functions_are_short() -> None:
    """No file and no function, its signature included, is longer than can be read at once."""
    long = []
    for path in FILES:
        text = path.read_text()
        long += [f"{path}: {len(text.splitlines())} lines"] if len(text.splitlines()) > FILE_LIMIT else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                parameters -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
                if lines > FUNCTION_LIMIT or (parameters > PARAMETER_LIMIT and "modeling" not in path.parts):
                    long.append(f"{name_of(path)}.{node.name}: {lines} lines, {parameters} parameters")
    assert long == []


@pytest.mark.parametrize("line", ["--help", "inspect {llama}", "cut {llama} out --drop 2", "plan {llama} --drop 2"])
def test_what_works_on_files_imports_no_model_library(llama: Path, tmp_path: Path, line: str) -> None:
    """Neither the package, nor its command line, nor what works on files alone imports torch or transformers."""
    program = "import sys, shortcut, shortcut.cli; code = shortcut.cli.main(sys.argv[1:])\n"
    program += "print(code, sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    words = [sys.executable, "-c", program, *line.format(llama=llama).split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert done.stderr == "0 []\n"
