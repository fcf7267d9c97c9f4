"""prime-rl: a stream of tasks in the place of its task sampler (read at commit 0c771bb of its main branch, 2026).

prime-rl chooses samplers by configuration alone, so an entry point of your own puts this one where it belongs:

    from kalman_rl.hosts.recipes.prime_rl_stream import TaskStream

    class Streamed(prime_rl.orchestrator.curriculum.Curriculum):
        def __init__(self, config, tasks):
            super().__init__(config, tasks)
            self.sampler = TaskStream(tasks, count=64)

It draws ahead of rewards that are still being sampled, as prime-rl does with every sampler: the belief then lags by the
groups in flight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from kalman_rl.beliefs import make_belief
from kalman_rl.checks import expect, is_whole, reading, saved
from kalman_rl.errors import ConfigError
from kalman_rl.sampling.stream import PromptStream


class TaskStream:
    """What prime-rl calls a ``TaskSampler``: ``next`` gives a task, ``observe`` takes the group sampled of one.

    Args:
        tasks: a finite sequence, each with a ``key`` of its own.
        count: tasks drawn at once; as many groups are one step of the belief.
        belief: name of :func:`kalman_rl.beliefs.make_belief`.
        options: of :class:`~kalman_rl.sampling.stream.PromptStream`, such as ``floor``, ``most``, ``seed``.

    Raises: ConfigError for tasks without a length, and what the stream refuses.
    """

    def __init__(self, tasks: Sequence[Any], count: int, *, belief: str = "auto", **options: Any) -> None:
        if not isinstance(tasks, Sequence):
            raise ConfigError(
                f"tasks: got a {type(tasks).__name__}, expected a finite sequence because a stream draws from all of it"
            )
        self.belief = make_belief(belief)
        self.tasks = {task.key: task for task in tasks}
        self.stream = PromptStream(self.belief, [task.key for task in tasks], count, **options)
        self._waiting: list[Any] = []
        self._groups = 0

    def __iter__(self) -> TaskStream:
        return self

    def __next__(self) -> Any:
        """The next task."""
        if not self._waiting:
            place = self.stream.draw(step=self._clock()[0]).place.tolist()
            self._waiting = [self.stream.pool[i] for i in place]
        return self.tasks[self._waiting.pop(0)]

    def observe(self, group: Sequence[Any]) -> None:
        """Absorb the rewards of a group of episodes of one task; those with an error are left out."""
        rewards = [
            float(trace.reward)
            for episode in group
            if episode.ok
            for trace in episode.traces
            if not trace.has_error and trace.agent.trainable and trace.num_turns > 0
        ]
        if not rewards:
            return
        step, part = self._clock()
        self._groups += 1
        key = group[0].task.key
        self.belief.update([key] * len(rewards), torch.tensor(rewards).double(), step=step, part=part)

    def metrics(self) -> dict[str, float]:
        """How many groups have shown a reward."""
        return {"groups": float(self._groups)}

    def state_dict(self) -> dict[str, Any]:
        """Belief, generator and what was drawn but not yet handed out."""
        return {
            "belief": self.belief.state_dict(),
            "stream": self.stream.state_dict(),
            "waiting": list(self._waiting),
            "groups": self._groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the saved sampler was. Raises: ConfigError for a damaged state or other tasks."""
        with reading("task stream state", state):
            names = ("belief", "stream", "waiting", "groups")
            belief, stream, waiting, groups = saved("task stream state", state, *names)
            expect("task stream state", "groups", is_whole(groups), groups, "a count")
            legal = isinstance(waiting, list) and all(key in self.tasks for key in waiting)
            expect("task stream state", "waiting", legal, waiting, "keys of tasks")
            draws = copy.copy(self.stream)
            draws.load_state_dict(stream)
            self.belief.load_state_dict(belief)
            self.stream, self._waiting, self._groups = draws, list(waiting), int(groups)

    def _clock(self) -> tuple[int, int]:
        """(step, part) of the next group."""
        return divmod(self._groups, self.stream.count)
