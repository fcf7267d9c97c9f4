"""Content security policies of the pages: nothing is loaded, and only what is named by its hash counts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence


def policy(scripts: Sequence[str], style: str, *more: str) -> str:
    """The policy of a page with these scripts and this style, and no other.

    >>> policy([], "p {}", "frame-ancestors 'none'").split("; ")[-1]
    "frame-ancestors 'none'"

    Args: more: further directives.
    """
    hashes = " ".join(map(_hash, scripts)) or "'none'"
    parts = ["default-src 'none'", f"script-src {hashes}", f"style-src {_hash(style)}"]
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'", *more])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
