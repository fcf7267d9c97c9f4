"""A study of one table as a command: measure in worlds, write numbers and a page beside the others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "beliefs"
Rows = list[dict[str, object]]


def study(
    name: str,
    measure: Callable[[Sequence[int]], Rows],
    render: Callable[[Rows, str, int], str],
    argv: Sequence[str] | None,
) -> int:
    """Write ``NAME.json`` and ``NAME.md``, and print the page; returns the exit code.

    Args: measure: seeds of worlds to rows. render: rows, the command and the number of worlds to Markdown.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.beliefs.{name}")
    parser.add_argument("--seeds", type=int, default=20, help="worlds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the two files")
    given = parser.parse_args(argv)
    rows = measure(range(given.seeds))
    command = " ".join([parser.prog, *(argv if argv is not None else sys.argv[1:])])
    page = render(rows, command, given.seeds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(page)
    print(page)
    return 0
