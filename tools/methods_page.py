"""Write docs/methods.md, the table of methods and their cards, from the code.

Run by `make methods`; tests compare.
"""

from __future__ import annotations

from pathlib import Path

from kalman_rl.methods import METHODS, cards, make_method

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
COLUMNS = ("advantage", "ratio", "trust", "aggregate")
INTRODUCTION = """# Methods

Every method is four choices, `advantage x ratio x trust region x aggregation` ([how it works](how.md)). In a terminal:
`kalman-rl methods NAME`, with `--cite` for BibTeX and `--verify` to run its checks. Written by `make methods` from the
code, `methods/cards.toml` and `methods/references.toml`.
"""
SYMBOLS = """`l_t = logp_t - logp_old_t` is a log-ratio, `w` the weight, `A` the advantage, `sg` stops the gradient.
"""


def table(link: str = "#{}") -> str:
    """One row a method: its factors without settings, a link to its card, its source."""
    lines = [f"| method | {' | '.join(COLUMNS)} | source |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in METHODS.table:
        method = make_method(name)
        parts = (getattr(method, column) for column in COLUMNS)
        cells = [f"`{cards.label(part).partition('(')[0]}`" for part in parts]
        lines.append(f"| [{name}]({link.format(name)}) | {' | '.join(cells)} | {cards.source(name)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/methods.md: the table, then one section a method, by what it changes."""
    lines = [INTRODUCTION, table(), SYMBOLS]
    for module, what in cards.CHANGES.items():
        lines += [f"Methods that change {what}:", ""]
        lines += [cards.as_markdown(name) for name in METHODS.table if cards.changes(name) == module]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
