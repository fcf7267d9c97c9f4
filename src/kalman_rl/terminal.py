"""The one way to a terminal: every line that this package prints goes through :func:`tell`, every one that it logs
through ``logger``."""

from __future__ import annotations

import logging
import os
import re
import sys

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_WIPE = "\r\x1b[2K"


def tell(text: object = "", *, error: bool = False, end: str = "\n", wipe: bool = False) -> None:
    """Print text as :func:`printable` makes it, at once.

    Args: error: to stderr. end: what follows. wipe: clear the line first, which held progress.
    """
    stream = sys.stderr if error else sys.stdout
    print(f"{_WIPE if wipe else ''}{printable(text)}", end=end, file=stream, flush=True)


def without_secrets(text: str) -> str:
    """Text in which the values of environment variables named like ``*_KEY``, ``*_TOKEN``, ``*_SECRET`` or
    ``*_PASSWORD`` are blanked out."""
    for name, secret in os.environ.items():
        if _SECRET.search(name) and len(secret) >= 8:
            text = text.replace(secret, "[redacted]")
    return text


def printable(text: object) -> str:
    r"""Text for a terminal: lines stay; control characters and those that turn the reading direction become blanks,
    and secrets of the environment are blanked out.

    >>> printable("a\n\x1b[31mb\u202e")
    'a\n [31mb '
    """
    return "".join(char if char.isprintable() or char == "\n" else " " for char in without_secrets(str(text)))


def _as_text(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


logger = logging.getLogger("kalman_rl")
logger.addFilter(_as_text)
