"""Write the table of methods into README.md, from the code. Run by `make readme`; a test compares."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kalman_rl.cli import method_table

README = Path(__file__).resolve().parent.parent / "README.md"
COLUMNS = ("advantage", "ratio", "trust", "aggregate", "source")


def table() -> str:
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in method_table():
        cells = [f"`{row[column]}`" if column != "source" else row[column] for column in COLUMNS]
        lines.append(f"| **{row['name']}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    start, end = "<!-- methods: written by `make readme` -->", "<!-- /methods -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", f"{start}\n{table()}\n{end}", text, flags=re.S)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(table() + "\n")
