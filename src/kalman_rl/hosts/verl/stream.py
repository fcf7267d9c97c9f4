"""verl's dataset as a pool that a stream draws from, and as a table of what is known before training.

verl 0.9.1 chooses prompts by its own sampler, shuffled or in order, with no hook for another; the trainer draws in its
place when it asks for the next batch, by then with the rewards of the last one.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from kalman_rl.errors import ConfigError, quote
from kalman_rl.hosts.verl.tracker import PromptNames, TrackerSettings
from kalman_rl.sampling.priors import absorb_priors, read_priors
from kalman_rl.sampling.tracking import Tracking


class NamedPrompts:
    """All prompts of a dataset, by name.

    Args:
        tracking: sources are noted, priors absorbed, and the stream opened where the settings ask for it.
        settings: under ``algorithm.kalman_rl``.
        dataset: verl's, with a ``dataframe`` of columns, or any whose rows have the columns asked for.
        count: prompts of a batch. group: ``rollout.n``. seed: of the draws.

    Raises: ConfigError for a column that is missing, two rows of one name, a prior that is none, an empty dataset or
        one with fewer prompts than a batch has.
    """

    def __init__(
        self,
        tracking: Tracking,
        settings: TrackerSettings,
        dataset: Any,
        *,
        count: int,
        group: int,
        seed: int,
    ) -> None:
        key = PromptNames(settings.prompt_key)
        self.names = key.of({name: column(dataset, name) for name in key.key})
        self.dataset, self.weight = dataset, {name: 1.0 for name in self.names}
        if tracking.sources is not None and settings.source_key is not None:
            tracking.sources.note(self.names, column(dataset, settings.source_key))
        if settings.prior_key is not None:
            setting = f"algorithm.kalman_rl.prior_key={settings.prior_key}"
            absorb_priors(tracking, read_priors(self.names, column(dataset, settings.prior_key), setting))
        if settings.select != "passes":
            tracking.open_stream(self.names, count, group=group, seed=seed)

    def draw(self, tracking: Tracking, count: int, step: int) -> Any:
        """verl's batch of the prompts that are drawn next; their weights are kept until the next draw."""
        assert tracking.stream is not None
        drawn = tracking.stream.draw(step=step, count=count)
        places = drawn.place.tolist()
        self.weight = {self.names[i]: w for i, w in zip(places, drawn.weight.tolist(), strict=True)}
        batch = collate_fn([self.dataset[i] for i in places])
        batch["uid"] = np.array([str(uuid.uuid4()) for _ in places], dtype=object)
        return tu.get_tensordict(batch)


def column(dataset: Any, name: str) -> Sequence[Any]:
    """One value per row, as verl's rows have it: ``index`` stands in ``extra_info``. Raises: ConfigError."""
    table = getattr(dataset, "dataframe", None)
    known = list(getattr(table, "column_names", ()))
    if name == "index" and "extra_info" in known:
        assert table is not None
        return [(info or {}).get("index", 0) for info in table["extra_info"]]
    if table is not None and name in known:
        return list(table[name])
    rows = [dataset[i] for i in range(len(dataset))]
    if any(name not in row for row in rows):
        raise ConfigError(
            f"algorithm.kalman_rl: got column {quote(name)}, expected one of the dataset, which has "
            f"{', '.join(rows[0])}"
        )
    return [row[name] for row in rows]
