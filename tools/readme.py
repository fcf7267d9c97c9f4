"""Write the table of methods into README.md and the cards into docs/methods.md, from the code.

Run by `make readme`; tests compare.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kalman_rl.methods import METHODS, cards, make_method

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
COLUMNS = ("advantage", "ratio", "trust", "aggregate")


def table() -> str:
    """One row a method: its factors without settings, a link to its card, its source."""
    lines = [f"| method | {' | '.join(COLUMNS)} | source |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in METHODS.table:
        method = make_method(name)
        parts = (getattr(method, column) for column in COLUMNS)
        cells = [f"`{cards.label(part).partition('(')[0]}`" for part in parts]
        lines.append(f"| [{name}](docs/methods.md#{name}) | {' | '.join(cells)} | {cards.source(name)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README with the table of today."""
    start, end = "<!-- methods: written by `make readme` -->", "<!-- /methods -->"
    return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", f"{start}\n{table()}\n{end}", text, flags=re.S)


def page() -> str:
    """docs/methods.md: one section a method, by what it changes."""
    lines = [
        "# Methods",
        "",
        "Written by `make readme` from the code, `methods/cards.toml` and `methods/references.toml`. In a "
        "terminal: `kalman-rl methods NAME`, with `--cite` for BibTeX and `--verify` to run its checks.",
        "",
        "`l_t = logp_t - logp_old_t` is a token's log-ratio, `w` the weight, `A` the advantage, `sg` stops "
        "the gradient.",
        "",
    ]
    for module, what in cards.CHANGES.items():
        lines += [f"Methods that change {what}:", ""]
        lines += [cards.as_markdown(name) for name in METHODS.table if cards.changes(name) == module]
    return "\n".join(lines)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(table() + "\n")
