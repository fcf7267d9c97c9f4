"""What the host libraries say and send by themselves, switched off."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any


def no_telemetry() -> None:
    """The environment variable comes too late where the hub's library was imported before this module."""
    if hub := sys.modules.get("huggingface_hub.constants"):
        hub.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet_third_parties() -> Any:
    """Keep known, harmless warnings of the host libraries off the user's screen."""
    with warnings.catch_warnings():
        for module in ("torch", "transformers", "trl", "peft", "accelerate"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        yield
