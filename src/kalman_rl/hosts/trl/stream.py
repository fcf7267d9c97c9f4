"""A stream of prompts in TRL: what is sampled is drawn when it is sampled, from what the belief knows by then.

Not in a sampler of the data loader: accelerate fetches each batch while the one before it is trained on, and workers
run further ahead, so that a sampler would always draw from a belief of one batch ago. The loader goes on as TRL built
it and counts the steps and passes; its rows give way to the drawn ones. The draw needs no message between ranks: each
has the same belief and the same generator, which is saved with the belief.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from trl import GRPOConfig

from kalman_rl.errors import quote
from kalman_rl.hosts.trl.prompts import Row, names_in, note_all_sources, take_priors
from kalman_rl.sampling.stream import PromptStream
from kalman_rl.sampling.tracking import Tracking

Features = Callable[[Sequence[Hashable]], Tensor | None]


def look_ahead(tracking: Tracking, dataset: Any, args: GRPOConfig) -> NamedRows | None:
    """Read a whole dataset before training, where settings ask for it: absorb its solve rates, open the stream.

    Returns: the rows that the stream draws from; None without a stream.
    Raises: ConfigError for a dataset without length, names, sources or priors, and what ``NamedRows`` refuses.
    """
    prior, select = getattr(args, "prior_column", None), tracking.budget.select
    if prior is None and select == "passes":
        return None
    names = names_in(dataset, f"select={quote(select)}" if prior is None else f"prior_column={quote(prior)}")
    note_all_sources(tracking.sources, getattr(args, "source_column", None), dataset)
    if prior is not None:
        take_priors(tracking, names, dataset, prior)
    return None if select == "passes" else NamedRows(tracking, names, dataset, args)


class NamedRows:
    """The rows of a dataset that a stream draws from, by ``prompt_id``.

    Args: tracking: its stream is opened here. names: of the dataset's rows. args: of the trainer.
    Raises: ConfigError for a dataset without rows, or with fewer prompts than a batch has.
    """

    def __init__(self, tracking: Tracking, names: Sequence[Hashable], dataset: Any, args: GRPOConfig) -> None:
        self._dataset = dataset
        self._place = {name: i for i, name in reversed(list(enumerate(names)))}
        group = int(args.num_generations or 1)
        count = int(args.generation_batch_size or 1) // group
        tracking.open_stream(list(dict.fromkeys(names)), count, group=group, seed=args.seed)

    def row(self, name: Hashable) -> Row:
        """The dataset's row of a prompt."""
        found: Row = self._dataset[self._place[name]]
        return found

    def draw(
        self, trainer: Any, stream: PromptStream, inputs: list[Row], step: int, features: Features
    ) -> tuple[list[Row], Tensor]:
        """This rank's rows of the next batch, and the weight of every row of all ranks.

        Args:
            trainer: how many ranks and completions per prompt there are.
            stream: of the pool; a draw further afterwards.
            inputs: the loader's rows, as many as this rank samples, with the columns that it samples with.
            step, features: as :meth:`~kalman_rl.sampling.stream.PromptStream.draw` takes them.
        """
        group, size = trainer.num_generations, len(inputs)
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        drawn = stream.draw(step=step, count=size * ranks // group, features=features)
        names = [stream.pool[i] for i in drawn.place.tolist() for _ in range(group)]
        mine = names[rank * size : (rank + 1) * size]
        rows = {name: self.row(name) for name in dict.fromkeys(mine)}
        chosen = [{column: rows[name].get(column) for column in inputs[0]} for name in mine]
        return chosen, drawn.weight.repeat_interleave(group)
