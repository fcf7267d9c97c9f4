"""From a name and options, as they come from a command line or a file, to an object.

A name is a key of a table, an entry point of an installed package, or ``module:function``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from kalman_rl.errors import ConfigError, KalmanRLError, did_you_mean, quote, unknown_name

T = TypeVar("T")


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """Builders by name: the table of this package, then the entry points of installed packages.

    Iteration gives the names and imports no package; ``registry[name]`` imports the one it needs, and takes
    ``module:function`` too, looked for from the current directory on.

    Args:
        kind: what a builder makes, the first word of every error.
        table: our own builders.
        group: name of the entry points' group.
        result: class or protocol of what a builder returns.
    """

    def __init__(self, kind: str, table: Mapping[str, Callable[..., T]], group: str, result: type) -> None:
        self.kind, self.table, self.group, self.result = kind, table, group, result

    @cached_property
    def _claims(self) -> dict[str, list[EntryPoint]]:
        claims: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            claims.setdefault(entry.name, []).append(entry)
        return claims

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self.table, *sorted(self._claims)])

    def __len__(self) -> int:
        return len(self.table.keys() | self._claims.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self._claims

    def __getitem__(self, name: str) -> Callable[..., T]:
        """The builder. Raises: ConfigError for a name that is unknown, claimed twice or cannot be imported."""
        claims = self._claims.get(name, []) if isinstance(name, str) else []
        if len(claims) + (isinstance(name, str) and name in self.table) > 1:
            holders = sorted({f"package {quote(_package(entry))}" for entry in claims})
            holders += ["kalman_rl itself"] if name in self.table else []
            raise ConfigError(
                f"{self.kind}: got {quote(name)}, claimed by {' and by '.join(holders)} (entry points of "
                f"{self.group}); expected one owner; rename it in the package, or uninstall the package"
            )
        if isinstance(name, str) and name in self.table:
            return self.table[name]
        if claims:
            return self._loaded(claims[0])
        if isinstance(name, str) and ":" in name:
            builder: Callable[..., T] = imported(self.kind, name)
            return builder
        raise unknown_name(self.kind, name, self)

    def origin(self, name: str) -> str:
        """Where a name comes from: "kalman_rl", "package tiny-foreign 0.1" or "module my_methods"; imports nothing."""
        if name in self.table:
            return "kalman_rl"
        if name in self._claims:
            return "package " + " and ".join(
                f"{_package(entry)} {entry.dist.version if entry.dist else ''}".strip()
                for entry in self._claims[name]
            )
        return f"module {name.partition(':')[0]}"

    def make(self, name: str, options: Mapping[str, object]) -> T:
        """Build with options whose names and types the builder's signature knows, see :func:`make`."""
        builder = self[name]
        return self.built(name, **read_options(self.kind, name, builder, options))

    def built(self, name: str, **options: Any) -> T:
        """Build with options as they are.

        Raises: ConfigError for a name as above and, where the builder is not ours, for an exception in it and
            for a result of another type; ours raise what they raise.
        """
        builder = self[name]
        if name in self.table:
            return builder(**options)
        whose, wanted = f"{quote(name)} of {self.origin(name)}", self.result.__name__
        try:
            result = builder(**options)
        except KalmanRLError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{self.kind}: got {type(error).__name__} ({error}) from {whose}, expected a {wanted}"
            ) from error
        if not isinstance(result, self.result):
            raise ConfigError(f"{self.kind}: got {type(result).__name__} from {whose}, expected a {wanted}")
        return result

    def _loaded(self, entry: EntryPoint) -> Callable[..., T]:
        whose = f"entry point {entry.name} = {entry.value} of package {quote(_package(entry))}"
        try:
            builder = entry.load()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{self.kind}: got {type(error).__name__} ({error}) while importing the {whose}; expected one that "
                "imports; repair or uninstall the package"
            ) from error
        if not callable(builder):
            raise ConfigError(
                f"{self.kind}: got {type(builder).__name__} from the {whose}, expected a function"
            )
        found: Callable[..., T] = builder
        return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module


def make(kind: str, table: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, object]) -> T:
    """Call ``table[name]`` with options whose names and types its signature knows.

    Options are numbers; one whose default is None may be None; one whose default is true or false takes
    true, false, 1 or 0; one whose default is a text takes a text.

    Raises: ConfigError for an unknown name or option, naming the nearest one, for another type, and for an
    option without a default that was not given.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name](**read_options(kind, name, table[name], options))


def read_options(
    kind: str, name: str, builder: Callable[..., object], options: Mapping[str, object]
) -> dict[str, Any]:
    """The options as the builder's signature wants them. Raises: ConfigError, see :func:`make`."""
    known = {
        option: parameter
        for option, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    read: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            raise unknown_option(kind, name, option, known)
        default = known[option].default
        if isinstance(default, bool):
            legal, expected = (
                isinstance(value, (bool, int, float)) and value in (0, 1),
                "true or false (1 or 0)",
            )
            value = bool(value) if legal else value
        elif isinstance(default, str):
            legal, expected = isinstance(value, str), "a text"
        else:
            legal = isinstance(value, (int, float)) and not isinstance(value, bool)
            legal, expected = legal or (value is None and default is None), "a number"
        if not legal:
            raise ConfigError(f"{kind} option {option}: got {quote(value)} for {name}, expected {expected}")
        read[option] = value
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in read:
            raise ConfigError(f"{kind} option {option}: got nothing for {name}, expected a number")
    return read


def unknown_option(kind: str, name: str, option: str, known: Collection[str]) -> ConfigError:
    """Error for an option that is none of the known ones, pointing at the nearest one."""
    choice = f"one of {', '.join(known)}" if known else "none, it has no options"
    return ConfigError(
        f"{kind} option: got {quote(option)} for {name}, expected {choice}{did_you_mean(option, known)}"
    )


def source_digest(function: Any) -> str | None:
    """SHA-256 of the file that holds a function; None where there is no such file."""
    module = sys.modules.get(getattr(inspect.unwrap(function), "__module__", None) or "")
    try:
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()  # type: ignore[union-attr]
    except (AttributeError, OSError):
        return None


def imported(kind: str, name: str) -> Callable[..., Any]:
    """The function ``"module:function"``, looked for from the current directory on.

    Raises: ConfigError where the name has another form, the module cannot be imported, or the function is
        missing or no function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name or "/" in module_name or module_name.endswith(".py"):
        raise ConfigError(
            f"{kind}: got {quote(name)}, expected module:function, e.g. my_{kind}s:mine for my_{kind}s.py"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        where = (
            f"in {os.getcwd()} or among the installed packages"
            if own
            else f"as {quote(module_name)} imports it"
        )
        raise ConfigError(
            f"{kind}: got {quote(name)}, found no module {quote(error.name)}; expected it {where}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind}: got {type(error).__name__} ({error}) while importing {quote(module_name)}; expected a "
            "module that imports without error"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ConfigError(
            f"{kind}: got {quote(name)}, expected a function of {quote(module_name)} ({module.__file__}); it has "
            f"{', '.join(known) or 'no functions'}"
        )
    found: Callable[..., Any] = function
    return found
