"""A batch of rewards sorted by prompt: duplicates merged, missing rewards marked, sums over the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError, quote

_PLAIN = {int, str, bool, float, type(None)}
LARGEST_REWARD = 1e12
"""Beyond this, precisions would leave the range of the float32 columns."""


class Groups(NamedTuple):
    """n completions of u prompts; floats are float64.

    ``ids`` u different names in order of appearance; ``place`` (n,) which of them each completion is of;
    ``reward`` (n,) with 0 where missing; ``known`` (n,) bool; ``size``, ``total`` (u,) over known rewards.
    """

    ids: list[Hashable]
    place: Tensor
    reward: Tensor
    known: Tensor
    size: Tensor
    total: Tensor

    @property
    def mean(self) -> Tensor:
        """(u,) mean of the known rewards; 0 where there are none."""
        return self.total / self.size.clamp(min=1)

    @property
    def deviation(self) -> Tensor:
        """(n,) reward minus the mean of its group; 0 where missing."""
        return torch.where(self.known, self.reward - self.mean[self.place], 0.0)

    @property
    def within(self) -> Tensor:
        """(u,) sum of squared deviations from the group's mean."""
        return torch.zeros_like(self.total).index_add_(0, self.place, self.deviation.square())

    def with_reward(self, reward: Tensor) -> Groups:
        """The same completions with other rewards, (n,), where known."""
        reward = torch.where(self.known, reward, 0.0)
        total = torch.zeros_like(self.total).index_add_(0, self.place, reward)
        return self._replace(reward=reward, total=total)


def expect_names(ids: Sequence[Hashable], what: str = "ids") -> None:
    """Raises: ShapeError if ids are a string, a tensor, or nothing that has a length."""
    if isinstance(ids, str | bytes | Tensor) or not hasattr(ids, "__len__"):
        raise ShapeError(
            f"{what}: got {type(ids).__name__}, expected a list of names"
            + (f"; use {what}.tolist()" if isinstance(ids, Tensor) else "")
        )


def places_of(ids: Sequence[Hashable], what: str = "ids") -> tuple[dict[Hashable, int], list[int]]:
    """Different ids, numbered in order of first appearance, and the number of each entry.

    Args: ids: n hashable names. what: the argument's name in errors.

    Raises: ShapeError if ids are a string, a tensor, no sequence or empty, or one of them is a tensor (two equal
        ones would be two prompts) or not hashable.
    """
    expect_names(ids, what)
    if not len(ids):
        raise ShapeError(
            f"{what}: got an empty batch, expected at least one completion; skip the call instead"
        )
    place: dict[Hashable, int] = {}
    try:
        index = [place.setdefault(name, len(place)) for name in ids]
    except TypeError as error:
        raise ShapeError(
            f"{what}: got a name that cannot be hashed ({error}), expected int, str or tuple"
        ) from error
    if Tensor in map(type, place):
        raise ShapeError(f"{what}: got tensors as names, expected int, str or tuple; use tolist()")
    if not set(map(type, place)) <= _PLAIN - {float}:
        for name in place:
            check_id(what, name)
    return place, index


def check_id(what: str, name: object) -> None:
    """Refuse a name that a saved state could not give back as it was: only plain Python survives a checkpoint.

    Raises: ShapeError for anything but int, str, bool, float, None and tuples of these, and for NaN, which equals no
        name, not even itself.

    >>> check_id("ids", ("gsm8k", 17))
    """
    if type(name) is tuple:
        for part in name:
            check_id(what, part)
    elif name != name:
        raise ShapeError(f"{what}: got NaN as a name, expected one that equals itself; give the prompt an id")
    elif type(name) not in _PLAIN:
        raise ShapeError(
            f"{what}: got {type(name).__name__} {quote(name, 60)} as a name, expected int, str or a tuple of "
            "them, which a checkpoint gives back as they were; use .item(), .value, str() or tuple(sorted())"
        )


def unique_ids(ids: Sequence[Hashable]) -> tuple[list[Hashable], Tensor]:
    """Different ids in order of first appearance, and for each entry which of them it is, (n,).

    Raises: ShapeError for what :func:`places_of` refuses.

    >>> unique_ids(["a", ("b", 1), "a"])
    (['a', ('b', 1)], tensor([0, 1, 0]))
    """
    place, index = places_of(ids)
    return list(place), torch.tensor(index)


def group_rewards(ids: Sequence[Hashable], reward: Tensor) -> Groups:
    """Sort a batch by prompt.

    Args:
        ids: n hashable names, repeats in any order.
        reward: (n,) numbers, NaN = missing.

    Raises: ShapeError for other shapes, NumericError for an infinite or huge reward.

    >>> group_rewards(["a", "b", "a"], torch.tensor([1.0, 5.0, float("nan")])).size
    tensor([1., 1.], dtype=torch.float64)
    """
    names, index = unique_ids(ids)
    if not isinstance(reward, Tensor) or reward.shape != index.shape or reward.is_complex():
        got = type(reward).__name__
        if isinstance(reward, Tensor):
            got = f"{'complex ' if reward.is_complex() else ''}{tuple(reward.shape)}"
        raise ShapeError(f"reward: got {got}, expected a real tensor ({len(index)},): one number per id")
    values = reward.detach().to(device="cpu", dtype=torch.float64)
    if (values.abs() > LARGEST_REWARD).any():
        row = int((values.abs() > LARGEST_REWARD).nonzero()[0])
        raise NumericError(
            f"reward: got {values[row].item()} at row {row}, expected a number within +-{LARGEST_REWARD:g}, "
            "or NaN for missing"
        )
    known = ~torch.isnan(values)
    values = torch.where(known, values, 0.0)
    zeros = torch.zeros(len(names), dtype=torch.float64)
    count = zeros.index_add(0, index, known.double())
    return Groups(names, index, values, known, count, zeros.index_add(0, index, values))


def only_known(groups: Groups) -> tuple[Groups, Tensor]:
    """The groups with at least one known reward, and their places (k,) among the former groups."""
    kept = (groups.size > 0).nonzero().flatten()
    if len(kept) == len(groups.ids):
        return groups, kept
    place = torch.full_like(groups.size, -1, dtype=torch.long)
    place[kept] = torch.arange(len(kept))
    rows = place[groups.place] >= 0
    names = [groups.ids[i] for i in kept.tolist()]
    index, reward, known = place[groups.place[rows]], groups.reward[rows], groups.known[rows]
    return Groups(names, index, reward, known, groups.size[kept], groups.total[kept]), kept


def sum_of_others(values: Tensor, index: Tensor) -> Tensor:
    """For each entry the sum over the *other* entries of its group, (n,): no entry touches its own sum.

    ``total - value`` would depend on the value in the last bits. Here the entries before and those after are
    added up separately, by doubling, so the result is the same to the last bit whatever the own value is.

    >>> sum_of_others(torch.tensor([1.0, 10.0, 2.0]), torch.tensor([0, 5, 0]))
    tensor([2., 0., 1.])
    """
    order = torch.argsort(index, stable=True)
    own, sorted_values = index[order], values[order]
    before = _running_sum_before(sorted_values, own)
    after = _running_sum_before(sorted_values.flip(0), own.flip(0)).flip(0)
    return torch.empty_like(values).index_copy_(0, order, before + after)


def _running_sum_before(values: Tensor, own: Tensor) -> Tensor:
    """Sum of the earlier entries with the same label; equal labels are neighbours."""
    total, reach = _shifted(values, own, 1), 1
    while True:
        added = _shifted(total, own, reach)
        if reach >= len(values) or not bool((own[reach:] == own[:-reach]).any()):
            return total
        total = total + added
        reach *= 2


def _shifted(values: Tensor, own: Tensor, by: int) -> Tensor:
    """The entry ``by`` places earlier, 0 where it belongs to another label."""
    out = torch.zeros_like(values)
    if by < len(values):
        out[by:] = torch.where(own[by:] == own[:-by], values[:-by], 0.0)
    return out
