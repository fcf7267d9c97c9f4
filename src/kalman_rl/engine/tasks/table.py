"""The embedded tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kalman_rl.engine.tasks.gym import GYM, gym_task
from kalman_rl.engine.tasks.sorting import sorting, sorting_mixed, sorting_peeled, sorting_spread
from kalman_rl.engine.tasks.task import Task
from kalman_rl.errors import unknown_name

TASKS: dict[str, Callable[..., Task]] = {
    **{name: partial(gym_task, name) for name in GYM},
    "sort12": partial(sorting, 12),
    "sort16": partial(sorting, 16),
    "sort_mixed": sorting_mixed,
    "sort_peel": sorting_peeled,
    "sort_spread": sorting_spread,
}


def load_task(
    name: str, *, seed: int = 0, train_size: int | None = None, test_size: int | None = None
) -> Task:
    """Task of the table `TASKS`.

    Args:
        name: key of `TASKS`.
        seed: which questions are drawn and their order. Which questions may be tested does not depend on it.
        train_size: number of training rows; the task's own default when None.
        test_size: number of test rows; the task's own default when None.

    Raises:
        ConfigError: the name is unknown, or more rows are asked for than there are different questions.
        AdapterError: the task needs reasoning-gym and it is not installed.

    >>> load_task("sort12", train_size=1, test_size=1).max_completion_tokens
    13
    """
    if not isinstance(name, str) or name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name](seed=seed, train_size=train_size, test_size=test_size)
