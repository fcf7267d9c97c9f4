"""Private names of other libraries that this package relies on: how they are declared, and which of them moved.

``hooks.py`` in ``kernels``, ``hosts/trl``, ``hosts/verl`` and ``engine`` list them. The adapters read the lists when
they are loaded, ``kalman-rl doctor`` reads the same ones, and a test refuses a private name that is in none of them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from kalman_rl.errors import AdapterError


class HookedMethod(NamedTuple):
    """A function: leading parameters after self, in order, and names that it must accept anywhere."""

    leading: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


class Host(NamedTuple):
    """A library, the versions that were tested, and its hooks.

    Args:
        name: of the library.
        tested: range of versions, as pip reads it.
        hooks: by owner, ``module`` or ``module:Class``: names to a HookedMethod, or to None for what is no function.
        otherwise: what happens where one of them moved; empty: the adapter refuses to load.
    """

    name: str
    tested: str
    hooks: Mapping[str, Mapping[str, HookedMethod | None]]
    otherwise: str = ""


def moved(host: Host) -> list[str]:
    """One sentence for every hook that is missing or has other parameters.

    >>> moved(Host("json", ">=2", {"json:JSONDecoder": {"decode": HookedMethod(("text",)), "_memory": None}}))[1]
    'JSONDecoder._memory: got no such name, expected one'
    >>> moved(Host("json", ">=2", {"json:JSONDecoder": {"decode": HookedMethod(("text",))}}))
    ['JSONDecoder.decode: got (s, _w), expected (text, ...)']
    """
    texts = []
    for place, hooks in host.hooks.items():
        module, _, name = place.partition(":")
        try:
            owner = importlib.import_module(module)
            owner = getattr(owner, name) if name else owner
        except (ImportError, AttributeError) as error:
            texts.append(f"{place}: got {type(error).__name__} ({error}), expected it to import")
            continue
        texts += [text for hook in hooks.items() if (text := _moved(name or module, owner, *hook))]
    return texts


def check(*hosts: Host) -> None:
    """Raise AdapterError for the first hook that moved."""
    for host in hosts:
        for text in moved(host):
            try:
                found = version(host.name)
            except PackageNotFoundError:
                found = "unknown"
            raise AdapterError(
                f"{host.name}: got version {found} with {text} as in {host.name}{host.tested}; "
                f"pip install '{host.name}{host.tested}'"
            )


def _moved(place: str, owner: Any, name: str, hook: HookedMethod | None) -> str:
    static = inspect.getattr_static(owner, name, None)
    if hook is None:
        there = static is not None or hasattr(owner, name) or _assigned(owner, name)
        return "" if there else f"{place}.{name}: got no such name, expected one"
    expected = ", ".join((*hook.leading, *hook.names, "..."))
    if static is None:
        return f"{place}.{name}: got no such method, expected ({expected})"
    found = _parameters(owner, name, static)
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
    fits = tuple(found)[: len(hook.leading)] == hook.leading and (anything or set(hook.names) <= set(found))
    return "" if fits else f"{place}.{name}: got ({', '.join(found)}), expected ({expected})"


def _parameters(owner: Any, name: str, static: Any) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(getattr(owner, name)).parameters)
    except (TypeError, ValueError):
        return {}
    if isinstance(owner, type) and not isinstance(static, (staticmethod, classmethod)):
        parameters.pop(next(iter(parameters), ""), None)  # self
    return parameters


def _assigned(owner: Any, name: str) -> bool:
    """Whether a method of the class assigns ``self.name``, in its source."""
    pattern = re.compile(rf"self\.{name}\b(?=\s*[:=,])")
    return any(pattern.search(text) for text in _sources(getattr(owner, "__mro__", ())))


def _sources(classes: Iterable[type]) -> Iterable[str]:
    for module in dict.fromkeys(each.__module__ for each in classes if each is not object):
        try:
            yield inspect.getsource(sys.modules[module])
        except (KeyError, OSError, TypeError):  # compiled
            continue
