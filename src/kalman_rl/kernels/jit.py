"""Plain Python loops compiled by numba, where it is installed.

A kernel is an ordinary function over one-dimensional arrays and numbers. It is compiled at its first call
(a second or two, the fused objective eleven), and the machine code is kept beside the source, or in the user's cache.
``KALMAN_RL_NO_NUMBA=1`` in the environment switches every kernel off.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kalman_rl.hooks import moved
from kalman_rl.kernels.hooks import TORCH

SWITCH = "KALMAN_RL_NO_NUMBA"
EXACT = frozenset({"contract", "nsz"})
FREEDOMS = EXACT | {"arcp"}
REORDER = FREEDOMS | {"reassoc"}


def usable(*tensors: Any) -> bool:
    """True if numba is there and every tensor among the arguments is plain memory of this machine.

    Not while torch traces a graph or carries derivatives forward: a kernel's memory accesses are invisible
    to both.
    """
    if os.environ.get(SWITCH, "0") not in ("", "0") or torch.compiler.is_compiling() or _numba() is None:
        return False
    if (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False  # inside torch.func.jvp, vmap, grad, ...
    return all(_plain(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))


def _plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)  # a subclass may mean anything
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and not tensor.is_neg()
    )


@functools.cache
def _numba() -> Any | None:
    try:
        import numba
    except Exception:  # not installed, or installed for another numpy: numba raises several kinds
        return None
    return None if numba.config.DISABLE_JIT or moved(TORCH) else numba


@functools.cache
def module(name: str) -> ModuleType:
    """A module of kernels by its name in this package; importing one imports its compiler."""
    return importlib.import_module(f"kalman_rl.kernels.{name}")


def inner(function: Callable[..., Any], freedoms: frozenset[str] = FREEDOMS) -> Callable[..., Any]:
    """A part of kernels, compiled into each of them; needs numba when it is defined."""
    return _njit(
        function, freedoms, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )  # half the time to compile


@functools.cache
def compiled(function: Callable[..., Any], freedoms: frozenset[str] = FREEDOMS) -> Callable[..., Any]:
    """The kernel in machine code: releases the interpreter's lock, starts no threads.

    Fused multiply-adds are allowed, dividing by way of a reciprocal, and treating -0 as 0; NaN and infinity keep
    their meaning. ``EXACT`` divides by division; ``REORDER`` also lets sums be taken in another order, as every
    matrix product does.
    """
    # numba looks at one file to see if machine code is still right; a kernel has parts in several.
    function.__qualname__ = f"{function.__name__}_{_sources()}"
    try:
        return _njit(function, freedoms, cache=True)
    except RuntimeError:  # neither the source's directory nor the user's cache can be written
        return _njit(function, freedoms)


def _njit(function: Callable[..., Any], freedoms: frozenset[str], **options: bool) -> Callable[..., Any]:
    numba: Any = _numba()
    kernel: Callable[..., Any] = numba.njit(
        nogil=True, error_model="numpy", fastmath=set(freedoms), **options
    )(function)
    return kernel


@functools.cache
def _sources() -> str:
    """Digest of the sources of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
