"""The README as a package index shows it, where links and pictures beside the file lead nowhere.

Hatchling calls :class:`PyPIReadme` (``tool.hatch.metadata.hooks.custom``). With a ``Source`` among the project's URLs
they become absolute; without one a link is its words and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
MARKS = re.compile(r"<!--.*?-->\n?")


def absolute(text: str, source: str | None) -> str:
    """Markdown whose links and pictures need no file beside it.

    >>> absolute("see [docs](docs/a.md#b) ![curve](docs/a.png)", "https://example.org/us/it")
    'see [docs](https://example.org/us/it/blob/main/docs/a.md#b) ![curve](https://example.org/us/it/raw/main/docs/a.png)'
    >>> absolute("see [docs](docs/a.md), [paper](https://example.org)![curve](a.png)", None)
    'see docs, [paper](https://example.org)'
    """

    def one(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        if source is None:
            return "" if picture else words
        return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/main/{target})"

    return LINK.sub(one, MARKS.sub("", text))


class PyPIReadme(MetadataHookInterface):
    """Hands the README on to the metadata of sdist and wheel."""

    def update(self, metadata: dict) -> None:
        """Set ``readme``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata.get("urls", {}).get("Source"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
