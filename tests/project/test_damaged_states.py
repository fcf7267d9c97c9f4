"""Saved states with one damaged entry: refused by a KalmanRLError, and the object is as it was."""

from __future__ import annotations

import copy
import enum
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kalman_rl import KalmanPreferenceTracker
from kalman_rl.beliefs import Sources, make_belief
from kalman_rl.errors import ConfigError, KalmanRLError, ShapeError
from kalman_rl.hosts.state import load_state, save_state
from kalman_rl.kinematic import KinematicTokenizer
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.price import Price
from kalman_rl.sampling.stream import PromptStream
from kalman_rl.sampling.tracking import Tracking
from tests.project.test_borders import WORDED

IDS = ["a", "b", "c", "d"] * 3


def taught(name: str, width: int = 0, **options: Any) -> Any:
    belief, generator = make_belief(name, **options), torch.Generator().manual_seed(0)
    for step in range(3):
        real = name in ("auto", "gaussian")
        reward = torch.randn(12, generator=generator) if real else torch.rand(12, generator=generator).round()
        given = {"features": torch.eye(4, width).repeat(3, 1)} if width else {}
        belief.update(IDS, reward, step=step, **given)
    return belief


def tracker(width: int) -> KalmanPreferenceTracker:
    made = KalmanPreferenceTracker(dim=4)
    made.update(torch.eye(8, width), torch.arange(8.0))
    return made


def tracking() -> Tracking:
    sources = Sources()
    sources.note(["a", "b", "c"], ["maths", "code", "maths"])
    made = Tracking(taught("auto"), Budget(), sources)
    made.coverage.visit(["a", "b"], step=1)
    made.skipped, made.last_step = {"c"}, 2
    made.features = {"a": torch.ones(2), "b": torch.zeros(2)}
    return made


def tokenizer() -> KinematicTokenizer:
    made = KinematicTokenizer(lag=2).fit(torch.randn(2, 9, generator=torch.Generator().manual_seed(0)))
    for value in (0.5, 0.7, 0.1, 0.4):
        made.update(torch.tensor([value, -value]))
    return made


def visited() -> Coverage:
    made = Coverage(4)
    made.visit(["a", ("b", 1)], step=3)
    return made


MAKERS: dict[str, Callable[[], Any]] = {
    "auto": lambda: taught("auto"),
    "auto, features": lambda: taught("auto", width=9, dimension=4),
    "beta": lambda: taught("beta"),
    "gaussian": lambda: taught("gaussian"),
    "spo": lambda: taught("spo"),
    "by source": lambda: taught("auto", source=lambda name: name < "c"),
    "tracker": lambda: tracker(4),
    "tracker, wide": lambda: tracker(9),
    "tracking": tracking,
    "tokenizer": tokenizer,
    "coverage": visited,
    "stream": lambda: PromptStream(taught("beta"), ["a", "b", "c"], 2),
    "price": lambda: Price(8.0, value=0.1, balance=2.0, steps=3),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of every dictionary inside a state."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        if isinstance(value, dict):
            yield (*path, key)
        yield from places(part, (*path, key))
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from places(part, (*path, i))


def damages(value: Any) -> Iterator[Any]:
    """What may stand in an entry's place after damage, other than it."""
    yield object()
    yield {"x": 1}
    if isinstance(value, Tensor):
        yield value.tolist()
        yield torch.zeros(3, 5, 7)
        yield value[None].repeat(2, *[1] * value.dim())
        yield value.to(torch.complex64)
        if value.is_floating_point() and value.numel():
            for wrong in (math.nan, math.inf, -math.inf):
                bad = value.clone(memory_format=torch.contiguous_format)
                bad.view(-1)[0] = wrong
                yield bad
    elif isinstance(value, float):
        yield from (math.nan, math.inf, -math.inf, "x", None)
    elif isinstance(value, int):
        yield from (math.nan, math.inf, "x")


def replaced(state: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a state with another entry, or without it where ``new`` is Ellipsis."""
    if not path:
        return new
    key, *rest = path
    if isinstance(state, dict):
        if not rest and new is ...:
            return {k: v for k, v in state.items() if k != key}
        return {k: replaced(v, tuple(rest), new) if k == key else v for k, v in state.items()}
    parts = [replaced(v, tuple(rest), new) if i == key else v for i, v in enumerate(state)]
    return type(state)(parts)


SETTINGS = {"price": {"budget", "rate"}}
"""Entries that say how the object was built; loading leaves its own."""


@pytest.mark.parametrize("kind", MAKERS)
def test_every_damaged_entry_is_refused_and_changes_nothing(kind: str) -> None:
    made = MAKERS[kind]()
    state, before, accepted = made.state_dict(), repr(made.state_dict()), []
    for path in places(state):
        if path[-1] in SETTINGS.get(kind, ()):
            continue
        value = state
        for key in path:
            value = value[key]
        for new in (..., *damages(value)):
            if (
                isinstance(new, Tensor)
                and (kind, path[-1]) == ("gaussian", "variance")
                and (new == math.inf).any()
            ):
                continue  # an unknown value has no finite variance
            if kind == "price" and new is None:
                continue  # a price that is not yet known
            try:
                made.load_state_dict(copy.copy(replaced(state, path, new)))
            except KalmanRLError as error:
                assert re.match(WORDED, str(error)), error
            else:
                accepted.append((path, repr(new)[:60]))
                made.load_state_dict(state)
            assert repr(made.state_dict()) == before, (path, new)
    assert not accepted


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Path and value of everything inside a state that holds nothing else."""
    if not isinstance(value, dict | list | tuple):
        yield path, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(part, (*path, key))


def beside(value: Any) -> Any:
    """Another value that might stand there as well; None where none is known."""
    if isinstance(value, Tensor):
        return torch.nextafter(value, torch.full_like(value, 1e9)) if value.is_floating_point() else None
    if isinstance(value, float):
        return math.nextafter(value, 1e9)
    return value + 1 if type(value) is int else None


@pytest.mark.parametrize("kind", MAKERS)
def test_every_entry_comes_back_as_it_was_saved(kind: str) -> None:
    """Whatever a state that is taken holds: nothing is read from elsewhere, or left at its start."""
    made, taken = MAKERS[kind](), 0
    for path, value in leaves(made.state_dict()):
        new = beside(value)
        if new is None or path[-1] in SETTINGS.get(kind, ()):
            continue
        try:
            made.load_state_dict(replaced(made.state_dict(), path, new))
        except KalmanRLError:
            continue
        taken += 1
        found = dict(leaves(made.state_dict()))[path]
        assert torch.equal(found, new) if isinstance(new, Tensor) else found == new, path
    assert taken


@pytest.mark.parametrize("path, wrong", [
    (("scale", "count"), -1.0), (("scale", "squares"), -1.0), (("noise", "freedom"), -1.0),
    (("noise", "second"), 1e300), (("noise", "rate"), 2.0), (("noise", "rate"), 2**70),
    (("noise", "surprise"), -math.inf), (("reward", 0), 1e300), (("reward", 1), -1.0), (("reward", 1), 1e300),
])  # fmt: skip
def test_sums_that_no_batch_leaves_behind_are_refused(path: tuple[Any, ...], wrong: float) -> None:
    """Finite ones: they would fail later, as a root of a negative number or a Cholesky factor that does not exist."""
    made = taught("auto")
    before = repr(made.state_dict())
    with pytest.raises(ConfigError, match="^belief state: got"):
        made.load_state_dict(replaced(made.state_dict(), path, wrong))
    assert repr(made.state_dict()) == before


@pytest.mark.parametrize("kind", MAKERS)
def test_a_whole_state_survives_both_ways_of_saving(kind: str, tmp_path: Any) -> None:
    made = MAKERS[kind]()
    torch.save(made.state_dict(), tmp_path / "state.pt")
    save_state(tmp_path, {"state": made.state_dict()})
    before = repr(made.state_dict())
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), load_state(tmp_path)["state"]):
        made.load_state_dict(state)
        assert repr(made.state_dict()) == before


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize("name", [np.int64(3), np.float32(1), np.str_("a"), Colour.RED, Number.ONE, frozenset("ab"),
                                  b"a", ("a", np.int64(1))])  # fmt: skip
def test_names_that_a_checkpoint_would_change_are_refused(name: Any) -> None:
    belief = make_belief("auto")
    with pytest.raises(ShapeError, match="^ids: got .* as a name, expected int, str or a tuple"):
        belief.update([name, "b"], torch.tensor([1.0, 0.0]), step=0)
    assert len(belief) == 0


@pytest.mark.parametrize("name", [math.nan, ("a", math.nan)])
def test_nan_is_no_name(name: Any) -> None:
    """A belief would take it for a new prompt every time, and its own saved state would be refused."""
    belief = make_belief("auto")
    with pytest.raises(ShapeError, match="^ids: got NaN as a name"):
        belief.update([name, "b"], torch.tensor([1.0, 0.0]), step=0)
    assert len(belief) == 0


@pytest.mark.parametrize("name", [3, "a", ("a", 1, ("b",)), True, 0.5, None, -(2**70)])
def test_names_that_survive(name: Any, tmp_path: Any) -> None:
    belief, other = make_belief("beta"), make_belief("beta")
    belief.update([name, "z"], torch.tensor([1.0, 0.0]), step=0)
    torch.save(belief.state_dict(), tmp_path / "state.pt")
    save_state(tmp_path, {"state": belief.state_dict()})
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), load_state(tmp_path)["state"]):
        other.load_state_dict(state)
        assert other.state_dict()["table"]["ids"] == [name, "z"]
        assert type(other.state_dict()["table"]["ids"][0]) is type(name)
