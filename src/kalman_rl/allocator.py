"""Memory of large tensors on the CPU: keep what was freed instead of returning it to the system.

By default glibc maps every large tensor anew, and the first touch of each page is a fault: about a fifth of
the CPU time of a SmolLM2 training step went into the kernel that way.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Ask glibc to serve blocks below 1 GiB from its heap and not to shrink it; True where that worked.

    Elsewhere than on Linux with glibc nothing happens. Peak memory stays what it was; it is given back at
    exit.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
