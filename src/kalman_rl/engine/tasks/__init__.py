"""Tasks: what is asked, what is kept aside, and how a reply is scored."""

from kalman_rl.engine.tasks.rewards import from_verl, guard_reward, load_reward, with_noise
from kalman_rl.engine.tasks.rows import rows
from kalman_rl.engine.tasks.table import TASKS, load_task
from kalman_rl.engine.tasks.task import Reward, Row, Task

__all__ = [
    "TASKS",
    "Reward",
    "Row",
    "Task",
    "from_verl",
    "guard_reward",
    "load_reward",
    "load_task",
    "rows",
    "with_noise",
]
