"""`python -m tests.matrix`: which releases of transformers load what shortcut writes, and to the same answers.

Prints the table and puts it into README.md between its markers; all results go to .matrix/results.jsonl. Exit code 1 if
a checkpoint loads and answers otherwise, or fails without a clear word. With --release, --only or --oldest README.md
stays as it is.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from shortcut.modeling import editions
from tests.matrix.releases import WORK, environment_of, known_releases, run_probe
from tests.matrix.table import BAD, Result, format_lines, put_into, read_results, table_of
from tests.matrix.write import write_all


def main() -> int:
    options = read_options()
    releases = options.release.split(",") if options.release else known_releases()
    partly = bool(options.release or options.only or options.oldest)
    work = WORK / f"oldest-{options.oldest}" if options.oldest else WORK
    made = checkpoints(work, options)
    results = [result for release in releases for result in run_release(release, made)]
    (work / "results.jsonl").write_text(format_lines(results))
    print(table := table_of(results))
    if not partly and not put_into(Path("README.md"), table):
        print("README.md has no markers for the table", file=sys.stderr)
    return int(any(result.cell in BAD for result in results))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--release", help="only these releases, such as 4.57.6,5.0.0")
    parser.add_argument("--only", default="", help="only checkpoints whose name holds this, such as halves-")
    parser.add_argument("--reuse", action="store_true", help="take the checkpoints of the last run")
    parser.add_argument("--oldest", help="have modeling files say that they work from this release on, to find out")
    return parser.parse_args()


def checkpoints(work: Path, options: argparse.Namespace) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of the checkpoints, and what stands beside them."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    oldest = dict.fromkeys(editions.OLDEST, options.oldest)
    with mock.patch.object(editions, "OLDEST", oldest) if options.oldest else nullcontext():
        return list(write_all(work, options.only, reuse=options.reuse))


def run_release(release: str, made: list[tuple[Path, dict[str, Any]]]) -> list[Result]:
    """Load all checkpoints with one release; what is bad is told at once."""
    told = [{key: how[key] for key in ("kind", "family", "code")} for _, how in made]
    folders = [folder for folder, _ in made]
    results = read_results(told, release, *run_probe(folders, environment_of(release), WORK / "home" / release))
    print(f"{release}: {sum(result.cell == 'same' for result in results)} of {len(made)} the same", file=sys.stderr)
    for result in results:
        if result.cell in BAD:
            print(result, file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
