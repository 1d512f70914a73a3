"""The command line: what is wrong is said in one line before anything runs, and results alone go to stdout."""

import functools
import json
import shutil

import pytest
import yaml

from shortcut.cli import COMMANDS, main
from shortcut.common.version import __version__
from shortcut.options.verb import verb, verb_of
from shortcut.verbs.inspect import InspectOptions


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that relative paths are its own as well."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Replace every command by one that only notes what it is called with."""
    noted = []
    for name, command in COMMANDS.items():
        noting = functools.partial(lambda name, **options: noted.append((name, options)), name)
        monkeypatch.setitem(COMMANDS, name, functools.update_wrapper(noting, command))
    return noted


def fails(capsys, argv, code):
    """Run a command line that ends with this code; give the one line it leaves on stderr, with nothing on stdout."""
    capsys.readouterr()  # what making the model printed
    assert main(argv) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("shortcut: ")
    assert len(said.err.splitlines()) == 1
    return said.err


def succeeds(capsys, argv):
    """Run a command line that ends well and without a message; give what it prints."""
    capsys.readouterr()  # what making the model printed
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["-h"], 0), (["help"], 0), ([], 2)])
def test_the_overview(capsys, argv, code):
    """The overview names every command; to be shown it for want of a command is wrong usage."""
    assert main(argv) == code
    words = capsys.readouterr().out.split()
    assert [name for name in COMMANDS if name not in words] == []


def test_the_version(capsys):
    """The version printed is the version of the package."""
    assert succeeds(capsys, ["--version"]) == f"shortcut {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command(capsys, name, flag):
    """The help lists every option of the command's signature, each with its meaning."""
    printed = succeeds(capsys, [name, "m", flag])
    options = verb_of(COMMANDS[name]).options
    heads = {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}
    expected = {option.name.upper() if option.positional else option.flag for option in options.values()}
    assert expected - heads == set()
    for option in options.values():
        assert option.meaning.split()[0] in printed


def test_every_command_that_takes_text_takes_conversations():
    """--chat-template goes wherever --data goes, but for questions about images, which always go through one."""
    commands = [command for name, command in COMMANDS.items() if name != "freeze"]
    both = [{"data", "chat_template"} & verb_of(command).options.keys() for command in commands]
    assert {len(found) for found in both} == {0, 2}


WRONG = {
    "frobnicate": f"unknown command 'frobnicate': there are {', '.join(COMMANDS)} (",
    "--json": "unknown command '--json'",
    "prune m out --dry-rnu": "unknown option --dry-rnu",
    "cut m out --drop 2 --dry-rnu": "unknown option --dry-rnu: did you mean --dry-run?",
    "cut m out --drop 2 -q": "unknown option -q",
    "cut m out --drop 2 -- x": "unknown option --",
    "cut m out --drop 2 --dry-run=false": "--dry-run stands alone: it takes no value such as 'false'",
    "cut m out --drop 2 --dry-run false": "unexpected argument 'false'",
    "cut m out --drop": "--drop needs a value",
    "cut m out --drop --dry-run": "--drop needs a value",
    "cut m out --drop 2 --drop 3": "--drop is given twice",
    "cut m out more --drop 2": "unexpected argument 'more'",
    "cut m --drop 2": "OUT is missing",
    "inspect": "MODEL is missing",
    "plan s.json --count 2 --select best": "--select best: choose from lowest, span, deepest",
    "plan s.json --count two": "--count two: needs a whole number",
    "score m --average blocks": "--average blocks: choose from tokens, sequences",
    "score m --preset best": "--preset best: choose from shortgpt, shortx, deeper-layers, shortened-llama, short-",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_usage(capsys, calls, tmp_path, line):
    """Wrong usage is one line and code 2; the command is not called and nothing is written."""
    assert WRONG[line] in fails(capsys, line.split(), 2)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "name", "options"),
    [
        ("cut --drop=2-3 m out", "cut", {"model": "m", "out": "out", "drop": "2-3"}),
        ("cut m --dry-run out --drop 2", "cut", {"model": "m", "out": "out", "drop": "2", "dry_run": True}),
        ("cut 1 None --plan=a=b", "cut", {"model": "1", "out": "None", "plan": "a=b"}),
        ("score m --seed -3 --metric l2,angular", "score", {"model": "m", "seed": -3, "metric": "l2,angular"}),
        ("score [1] --data {} --quiet", "score", {"model": "[1]", "data": "{}", "quiet": True}),
        ("prune m cut --ratio 25%", "prune", {"model": "m", "out": "cut", "ratio": "25%"}),
        ("plan s.json --count 2", "plan", {"scores": "s.json", "count": 2}),
        ("sweep m --preset sleb --average tokens", "sweep", {"model": "m", "preset": "sleb", "average": "tokens"}),
        ("demo", "demo", {}),
        ("check out --base 0.5", "check", {"checkpoint": "out", "base": "0.5"}),
    ],
)
def test_right_usage(calls, line, name, options):
    """Options may stand anywhere, with a blank or an equals sign, and text is never taken for anything but text."""
    assert main(line.split()) == 0
    assert calls == [(name, options)]


@pytest.mark.parametrize(
    ("drop", "kept"),
    [("--drop 2", [0, 1, 3, 4, 5, 6]), ("--drop 2,4", [0, 1, 3, 5, 6]), ("--drop=2-3", [0, 1, 4, 5, 6])],
)
def test_cut_drops_what_is_named(capsys, llama, tmp_path, drop, kept):
    """--drop takes block numbers, never a count, and --json gives one document on stdout and nothing else."""
    report = json.loads(succeeds(capsys, ["cut", str(llama), "out", *drop.split(), "--json"]))
    assert report["written"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == len(kept)
    assert report["plan"] == json.loads((tmp_path / "out" / "shortcut.json").read_text())["plan"]
    assert report["plan"]["drop"] == drop.removeprefix("--drop")[1:]


def test_a_dry_run_writes_nothing(capsys, llama, tmp_path):
    """A dry run says what would be written, to the byte, and leaves no trace."""
    printed = succeeds(capsys, ["cut", str(llama), "out", "--drop", "4-5", "--dry-run"])
    assert printed.startswith("would write out\ndrops  4-5\nkeeps  0-3,6 (5 of 7 blocks)\n")
    printed = succeeds(capsys, ["cut", str(llama), "out", "--keep", "every-second", "--dry-run"])
    assert printed.startswith("would write out\ndrops  1,3,5\nkeeps  0,2,4,6 (4 of 7 blocks)\n")
    assert list(tmp_path.iterdir()) == []
    report = json.loads(succeeds(capsys, ["cut", str(llama), "out", "--drop", "4-5", "--dry-run", "--json"]))
    assert report["written"] is False
    assert report["bytes_after"] == sum(size for _, size in report["files"])


def test_a_plan_goes_through_its_file(capsys, llama, tmp_path):
    """`plan` prints what it writes, and `cut --plan` carries that out."""
    printed = succeeds(capsys, ["plan", str(llama), "--select", "deepest", "--count", "2", "--out", "plan.yaml"])
    assert yaml.safe_load(printed) == yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert yaml.safe_load(printed)["drop"] == "4-5"
    assert "drops  4-5\n" in succeeds(capsys, ["cut", str(llama), "out", "--plan", "plan.yaml"])
    assert json.loads(succeeds(capsys, ["inspect", "out", "--json"]))["blocks"][4]["number"] == 4


@pytest.mark.parametrize("line", ["cut base out --drop 2", "score base", "prune base out --count 1", "chat base"])
def test_a_config_that_contradicts_itself(capsys, checkpoint_of, tmp_path, line):
    """The same line from every command."""
    shutil.copytree(checkpoint_of("qwen3"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["layer_types"] = config["layer_types"][:5]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert "transformers cannot read this config: Class validation error" in fails(capsys, line.split(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


MISTAKES = {
    "cut {llama} out --drop 40": "no block 40: the model has blocks 0-6",
    "cut {llama} out --drop 0-6": "drops all 7 blocks",
    "cut {llama} out": "say what goes with one of --plan and --drop",
    "cut {llama} out --drop 2 --plan p.yaml": "say what goes with one of --plan and --drop",
    "cut {llama} out --plan gone.yaml": "no plan at gone.yaml",
    "cut {llama} out --drop 2 --max-shard-size much": "cannot read the size 'much'",
    "cut {llama} full --drop 2": "full is not empty: name another folder, or --overwrite it",
    "cut {llama} full --drop 2 --overwrite": "full was not written by shortcut (no shortcut.json in it)",
    "cut {llama} {llama}/out --drop 2": "it is the base",
    "cut {llama} full/file --drop 2": "full/file is a file: name a folder",
    "cut {llama} full/file/out --drop 2": "full/file",
    "cut gone out --drop 2": "no model at gone: neither a folder, nor a .gguf file, nor a Hub id (org/name)",
    "cut full out --drop 2": "no config.json in",
    "inspect gone.gguf": "no file gone.gguf",
    "inspect org/name": "cannot get org/name from the Hub",
    "plan {llama} --count 2": "--select lowest needs scores",
    "plan {llama} --count 7 --select deepest": "cannot drop 7 of 7 blocks: 1 to 6 can go",
    "plan {llama} --count 7 --select spaced": "cannot drop 7 of 7 blocks: 1 to 6 can go",
    "plan {llama} --keep 0-5 --drop 6": "say which blocks go, or which stay, not both",
    "plan {llama} --keep none": "cannot read 'none' in the block list 'none'",
    "plan {llama} --keep every-other": "cannot read 'every-other': there are every-second, every-third",
    "plan gone.json --count 2": "no scores at gone.json",
    "plan {llama} --drop 2 --out full": "cannot write full: Is a directory",
    "plan {llama} --drop 2 --out .": "cannot write .",
    "check gone": "no folder gone",
    "run gone.yaml": "cannot read the recipe gone.yaml",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_found_while_working(capsys, llama, tmp_path, line):
    """What the user can mend is one line and code 1, and nothing is left behind."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert MISTAKES[line] in fails(capsys, line.format(llama=llama).split(), 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_an_interruption(capsys, monkeypatch):
    """Ctrl-C while a command works is one line and code 130."""

    @verb(InspectOptions, example="m")
    def interrupted(asked: InspectOptions) -> None:
        raise KeyboardInterrupt(asked.model)

    monkeypatch.setitem(COMMANDS, "inspect", interrupted)
    assert fails(capsys, ["inspect", "m"], 130) == "shortcut: interrupted\n"
