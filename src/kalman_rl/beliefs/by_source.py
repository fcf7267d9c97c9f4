"""One belief per source of prompts: the noise of a maths set contains no information about a code set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.base import FORMAT, TableBelief, check_features, check_kind
from kalman_rl.beliefs.groups import check_id, group_rewards, unique_ids
from kalman_rl.beliefs.protocol import Advantages, Observed
from kalman_rl.checks import expect, is_whole, reading, saved
from kalman_rl.errors import ConfigError, ShapeError, quote
from kalman_rl.numerics.kalman import Gaussian


class BySource:
    """A belief that sends every prompt to the belief of its source, made when the source is first updated.

    Args:
        make: creates the belief of a source; all sources get the same options.
        source: prompt id -> hashable name of its source; it must always give the same answer for an id.

    The ``scale`` of its advantages has one number per completion, (n,). All sources are checked before any is
    written.

    Raises: what the beliefs raise, and ShapeError for a source that cannot be hashed.

    >>> from kalman_rl.beliefs.gaussian import GaussianBelief
    >>> belief = BySource(GaussianBelief, lambda name: name.partition("/")[0])
    >>> _ = belief.update(["maths/1", "code/1"], torch.tensor([1.0, 0.0]), step=0)
    >>> sorted(belief.sources)
    ['code', 'maths']
    """

    def __init__(self, make: Callable[[], TableBelief], source: Callable[[Any], Hashable]) -> None:
        self._make, self._source = make, source
        self.sources: dict[Hashable, TableBelief] = {}
        self._unseen = make()

    def __repr__(self) -> str:
        return f"<BySource({self._unseen!r}), sources: {len(self.sources)}, prompts: {len(self)}>"

    def __len__(self) -> int:
        """Number of prompts that were visited."""
        return sum(len(belief) for belief in self.sources.values())

    def predict(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """See :class:`~kalman_rl.beliefs.protocol.Belief`."""
        return self._gathered(ids, step, features, "predict")

    def predictive(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """See :class:`~kalman_rl.beliefs.protocol.Belief`."""
        return self._gathered(ids, step, features, "predictive")

    def advantages(
        self, ids: Sequence[Hashable], reward: Tensor, *, step: int, features: Tensor | None = None
    ) -> Advantages:
        """See :class:`~kalman_rl.beliefs.protocol.Belief`; ``scale`` is (n,)."""
        split = self._split(ids, features, reward)
        out = torch.zeros(3, len(ids), dtype=torch.float64)
        for name, rows in split.items():
            belief = self.sources.get(name, self._unseen)
            part = belief.advantages(
                [ids[i] for i in rows], reward[rows], step=step, features=_of(features, rows)
            )
            out[:, rows] = torch.stack((part.advantage, part.baseline, part.scale.expand(len(rows))))
        return Advantages(*out)

    def update(
        self,
        ids: Sequence[Hashable],
        reward: Tensor,
        *,
        step: int,
        features: Tensor | None = None,
        part: int = 0,
    ) -> Observed:
        """See :class:`~kalman_rl.beliefs.protocol.Belief`; ids come out source by source."""
        batches = []
        for name, rows in self._split(ids, features, reward).items():
            belief = self.sources[name] if name in self.sources else self._make()
            mine, own = [ids[i] for i in rows], _of(features, rows)
            belief.check(mine, reward[rows], step=step, features=own, part=part)
            batches.append((name, belief, mine, reward[rows], own))
        seen = []
        for name, belief, mine, values, own in batches:
            seen.append(belief.update(mine, values, step=step, features=own, part=part))
            if seen[-1].ids:  # a source that has shown nothing is still unseen
                self.sources[name] = belief
        return Observed([name for o in seen for name in o.ids], *(torch.cat(f) for f in list(zip(*seen))[1:]))

    def state_dict(self) -> dict[str, Any]:
        """The state of every source; see :class:`~kalman_rl.beliefs.protocol.Belief`."""
        states = [(name, belief.state_dict()) for name, belief in self.sources.items()]
        return {"format": FORMAT, "kind": type(self).__name__, "sources": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved beliefs; see :class:`~kalman_rl.beliefs.protocol.Belief`."""
        with reading("belief state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        check_kind(state, type(self).__name__)
        new: dict[Hashable, TableBelief] = {}
        sources = saved("belief state", state, "sources")[0]
        expect("belief state", "sources", isinstance(sources, list), sources, "a list")
        for name, state_of in sources:
            check_id("belief state", name)
            new[name] = self._make()
            new[name].load_state_dict(state_of)
        self.sources = new

    def _split(
        self, ids: Sequence[Hashable], features: Tensor | None, reward: Tensor | None = None
    ) -> dict[Hashable, list[int]]:
        """Rows of each source. Raises: ShapeError, NumericError for a batch that no belief would take."""
        names, index = unique_ids(ids) if reward is None else group_rewards(ids, reward)[:2]
        check_features(features, len(index))
        sources = [self._source(name) for name in names]
        out: dict[Hashable, list[int]] = {}
        try:
            for row, place in enumerate(index.tolist()):
                out.setdefault(sources[place], []).append(row)
        except TypeError as error:
            raise ShapeError(
                f"source: got a name that cannot be hashed ({error}), expected int or str"
            ) from error
        return out

    def _gathered(self, ids: Sequence[Hashable], step: int, features: Tensor | None, what: str) -> Gaussian:
        split = self._split(ids, features)
        out = torch.zeros(2, len(ids), dtype=torch.float64)
        for name, rows in split.items():
            ask = getattr(self.sources.get(name, self._unseen), what)
            out[:, rows] = torch.stack(ask([ids[i] for i in rows], step=step, features=_of(features, rows)))
        return Gaussian(*out)


class Sources:
    """The source of every prompt seen so far: a function for ``make_belief(source=...)`` that a dataset fills.

    Args:
        setting: who names the column that sources are read from, for messages.

    >>> sources = Sources()
    >>> sources.note(["a", "b", "a"], ["maths", "code", "maths"])
    >>> sources("a")
    'maths'
    """

    def __init__(self, setting: str = "source") -> None:
        self.setting = setting
        self._of: dict[Hashable, Hashable] = {}

    def __call__(self, name: Hashable) -> Hashable:
        """The source of a prompt. Raises: ConfigError for one that was never noted."""
        if name not in self._of:
            raise ConfigError(
                f"{self.setting}: got prompt {quote(name)} before its source, expected note() to name it first"
            )
        return self._of[name]

    def note(self, ids: Sequence[Hashable], sources: Sequence[Any]) -> None:
        """Learn the source of each prompt; ids may repeat.

        Raises: ConfigError for what is no text or integer, and for a prompt of two sources. Nothing has changed then.
        """
        new: dict[Hashable, Hashable] = {}
        for name, source in zip(ids, sources, strict=True):
            if not isinstance(source, str) and not is_whole(source, -(2**63)):
                raise ConfigError(
                    f"{self.setting}: got {quote(source, 80)} for prompt {quote(name)}, expected a text or "
                    "integer in every row of the dataset"
                )
            known = self._of.get(name, new.setdefault(name, source))
            if source != known:
                raise ConfigError(
                    f"{self.setting}: got {quote(source)} for prompt {quote(name)}, which was of "
                    f"{quote(known)} before, expected one "
                    "source per prompt because beliefs are kept by source; give the prompt another id"
                )
        self._of |= new

    def state_dict(self) -> list[tuple[Hashable, list[Hashable]]]:
        """Every source with its prompts, for :meth:`load_state_dict`."""
        prompts: dict[Hashable, list[Hashable]] = {}
        for name, source in self._of.items():
            prompts.setdefault(source, []).append(name)
        return list(prompts.items())

    def load_state_dict(self, state: Any) -> None:
        """Become the saved table. Raises: ConfigError for one that note() would refuse."""
        table = Sources(self.setting)
        with reading("sources", state):
            for source, names in state:
                expect("sources", "prompts", isinstance(names, list), names, "a list")
                for name in names:
                    check_id("sources", name)
                table.note(names, [source] * len(names))
        self._of = table._of


def _of(features: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if features is None else features[rows]
