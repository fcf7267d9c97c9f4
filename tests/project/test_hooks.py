"""Private names of other libraries: every one that the sources use is declared, and the declarations hold here."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kalman_rl.engine import hooks as engine_hooks
from kalman_rl.errors import AdapterError
from kalman_rl.hooks import HookedMethod, Host, check, moved
from kalman_rl.hosts.trl import hooks as trl_hooks
from kalman_rl.hosts.verl import hooks as verl_hooks
from kalman_rl.kernels import hooks as kernel_hooks

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kalman_rl"
LISTS = {"kernels": kernel_hooks, "hosts/trl": trl_hooks, "hosts/verl": verl_hooks, "engine": engine_hooks}
HOSTS = {folder: [h for h in vars(m).values() if isinstance(h, Host)] for folder, m in LISTS.items()}
EVERY = [(folder, host) for folder, hosts in HOSTS.items() for host in hosts]
LIBRARIES = ("accelerate", "numba", "peft", "torch", "transformers", "triton", "trl", "verl")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
STANDARD = {"_asdict", "_exit", "_fields", "_make", "_replace"}  # documented: a NamedTuple's, and os._exit
ASKING = {"getattr", "hasattr", "setattr", "delattr"}


def declared(folder: str) -> set[str]:
    """Names, and modules that hold them, in the list of a folder."""
    hosts = [host for name, hosts in HOSTS.items() if folder.startswith(name) for host in hosts]
    pairs = [(owner.partition(":"), names) for host in hosts for owner, names in host.hooks.items()]
    found = {name for _, names in pairs for name in names}
    for (module, _, owner), names in pairs:
        found |= {module, f"{module}.{owner}", *(f"{module}.{name}" for name in names)}
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: classes, functions, variables, fields, and what it assigns on self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_self(node):
            found.add(node.attr)
    return found


def on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def foreign_names(tree: ast.AST) -> set[str]:
    """Names that a file imports from other libraries."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "kalman_rl").startswith("kalman_rl"):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found - {"kalman_rl"}


def asked_for(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names that are written as texts: in getattr and its like, directly or in a loop, and in __dict__."""
    loops: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
            loops.setdefault(node.target.id, []).extend(ast.walk(node.iter))
    for node in ast.walk(tree):
        texts: list[ast.AST] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            name = node.args[1]
            texts = loops.get(name.id, []) if isinstance(name, ast.Name) else [name]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            texts = [node.slice] if node.value.attr == "__dict__" else []
        for text in texts:
            if isinstance(text, ast.Constant) and PRIVATE.fullmatch(str(text.value)):
                yield node.lineno, str(text.value)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Modules and names of other libraries that are private: with an underscore, or deep inside a host."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            targets = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in targets:
            root, *parts = module.split(".")
            if root in ("kalman_rl", "__future__"):
                continue
            deep = root in ("trl", "verl", "transformers", "accelerate") and len(parts) > 1
            if deep or any(PRIVATE.fullmatch(part) for part in parts):
                yield node.lineno, f"{module}.{name}" if name else module
            if PRIVATE.fullmatch(name):
                yield node.lineno, name


def undeclared(path: Path, text: str | None = None) -> list[str]:
    """Private names of others in a file that the list of its folder lacks."""
    place = path.relative_to(SOURCE)
    tree = parsed(path) if text is None else ast.parse(text)
    known = declared(place.parent.as_posix()) | STANDARD
    foreign = foreign_names(tree)
    ours = {name for file in path.parent.glob("*.py") for name in own_names(parsed(file))} | own_names(tree)
    wrong = []
    mine = {
        id(inner): names
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and (names := names_on_self(node))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        root = ast.unparse(node).partition(".")[0]
        private = PRIVATE.fullmatch(node.attr) is not None
        if isinstance(node.ctx, ast.Store) and root in foreign and node.attr not in known:
            wrong.append((node.lineno, ast.unparse(node)))  # a patch of somebody else's object
        elif private and root in foreign:
            path_of = ast.unparse(node)
            if node.attr not in known and not any(k.startswith(path_of) for k in known):
                wrong.append((node.lineno, path_of))
        elif private and node.attr not in known | (mine.get(id(node), ours) if on_self(node) else ours):
            wrong.append((node.lineno, ast.unparse(node)))
    names = [*asked_for(tree), *imported(tree)]
    wrong += [(line, name) for line, name in names if name not in known | ours]
    return [f"{place}:{line}: {name}" for line, name in wrong]


@functools.cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """Classes of this package by name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def names_on_self(node: ast.ClassDef) -> set[str]:
    """What a class of ours and its bases in this package define."""
    bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
    above = [each for base in bases - {node.name} for each in classes().get(base, [])]
    return own_names(node).union(*map(names_on_self, above))


def test_every_private_name_of_a_host_is_declared() -> None:
    wrong = [text for path in sorted(SOURCE.rglob("*.py")) for text in undeclared(path)]
    assert not wrong, "declare these in the hooks.py of their folder, or do without them:\n" + "\n".join(
        wrong
    )


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("trainer._new_thing", "trainer._new_thing"),
        ("class T:\n def f(self): return self._new_thing", "self._new_thing"),
        ("import torch\ntorch._C._new_thing()", "torch._C._new_thing"),
        ("from torch._inductor import config", "torch._inductor.config"),
        ("from verl.workers.actor.dp_actor import X", "verl.workers.actor.dp_actor.X"),
        ("from trl import _new_thing", "_new_thing"),
        ("getattr(trainer, '_new_thing', None)", "_new_thing"),
        ("for name in ('_new_thing',):\n getattr(trainer, name)", "_new_thing"),
        ("args.__dict__['_new_thing'] = 1", "_new_thing"),
        ("import trl\ntrl.GRPOTrainer.train = print", "trl.GRPOTrainer.train"),
    ],
)
def test_an_undeclared_name_is_found(code: str, found: str) -> None:
    texts = undeclared(SOURCE / "hosts" / "trl" / "new.py", code)
    assert any(text.endswith(f": {found}") for text in texts), texts


def test_nothing_is_declared_that_is_not_used() -> None:
    for folder, host in EVERY:
        text = "".join(p.read_text() for p in (SOURCE / folder).rglob("*.py") if p.name != "hooks.py")
        names = {name for hooks in host.hooks.values() for name in hooks}
        assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set(), host.name


@pytest.mark.parametrize(("folder", "host"), EVERY, ids=[f"{folder}: {host.name}" for folder, host in EVERY])
def test_the_installed_host_has_them(folder: str, host: Host) -> None:
    pytest.importorskip(host.name)
    assert moved(host) == []


def test_ranges_are_the_declared_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["trl"]]
    lines += project["optional-dependencies"]["verl"]
    ranges = {item.name: item.specifier for item in map(Requirement, lines)}
    for _, host in EVERY:
        assert SpecifierSet(host.tested) == ranges[host.name], host.name


def test_what_our_subclasses_define_is_theirs_or_declared() -> None:
    """A name of ours that the host has too replaces the host's: meant where it is declared, else an accident."""
    trl = pytest.importorskip("trl")
    from kalman_rl.hosts.trl import KalmanGRPOTrainer
    from kalman_rl.hosts.trl.ranks import RanksTrainer

    pairs: list[tuple[str, type, type]] = [
        ("hosts/trl", KalmanGRPOTrainer, trl.GRPOTrainer),
        ("hosts/trl", RanksTrainer, trl.GRPOTrainer),
    ]
    if importlib.util.find_spec("verl") is not None:
        from verl.trainer.ppo.v1 import PPOTrainerSync

        from kalman_rl.hosts.verl import KalmanPPOTrainer

        pairs.append(("hosts/verl", KalmanPPOTrainer, PPOTrainerSync))
    for folder, ours, theirs in pairs:
        tree = ast.parse(Path(sys.modules[ours.__module__].__file__ or "").read_text(encoding="utf-8"))
        node = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == ours.__name__)
        assigned = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and on_self(n)
                    and isinstance(n.ctx, ast.Store)}  # fmt: skip
        names = {name for name in {*vars(ours), *assigned} if not name.startswith("__")}
        place = f"{theirs.__module__}:{theirs.__name__}"
        there = {n for n in names if not moved(Host("host", "", {place: {n: None}}))}
        public = {"train", "num_generations", "_abc_impl"}  # documented; the last is Python's
        assert there - public <= declared(folder), ours.__name__


def test_a_moved_hook_is_refused() -> None:
    gone = Host("torch", ">=2.7", {"torch.nn:Module": {"forward_all": HookedMethod(("x",))}})
    with pytest.raises(AdapterError, match=r"torch: got version \S+ with Module\.forward_all: got no such"):
        check(gone)
    assert moved(Host("torch", ">=2.7", {"torch.nowhere": {"x": None}}))[0].startswith("torch.nowhere: got ")
