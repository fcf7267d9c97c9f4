"""verl's whole training on a CPU, to try a configuration before it goes to a cluster: ``VERL_PLATFORM=cpu``.

One rank trains with FSDP2 over gloo, and a transformers model in a Ray actor samples. All else is verl's own code.
"""

from __future__ import annotations

import os


def chosen() -> bool:
    """Whether this process was started with ``VERL_PLATFORM=cpu``."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
