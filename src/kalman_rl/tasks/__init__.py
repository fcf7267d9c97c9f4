"""Tasks: what is asked, what is kept aside, and how a reply is scored."""

from kalman_rl.tasks.rewards import from_verl, guard_reward, load_reward, with_noise
from kalman_rl.tasks.table import TASKS, load_task
from kalman_rl.tasks.task import Reward, Row, Task
from kalman_rl.tasks.user_rows import rows

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
