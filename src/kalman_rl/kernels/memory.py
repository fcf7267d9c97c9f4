"""Memory of large tensors on the CPU: large pages for large outputs, and what was freed is kept for reuse.

By default glibc maps every large tensor anew, and the first touch of each page is a fault: about a fifth of
the CPU time of a SmolLM2 training step went into the kernel that way.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes; from here on glibc asks the system for fresh pages at every allocation
PAGE = 4096
HUGE_PAGES = 14  # MADV_HUGEPAGE
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like``, with large pages for a large tensor where Linux has them.

    A fresh page costs the system more time than the filter needs for the thousand tokens on it; a large page
    is 512 of them at once. It is a hint: without such pages nothing changes.
    """
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    size, advise = out.numel() * out.element_size(), _madvise()
    if advise is not None and size >= LARGE:
        start = -(-out.data_ptr() // PAGE) * PAGE
        advise(start, (out.data_ptr() + size - start) // PAGE * PAGE, HUGE_PAGES)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a C library without it
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


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
