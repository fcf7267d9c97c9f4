"""Tasks: what is asked, what is kept aside, and how a reply is scored."""

from kalman_rl.engine.tasks.rewards import from_verl, guard_reward, load_reward, supervised_reward, with_noise
from kalman_rl.engine.tasks.rows import rows
from kalman_rl.engine.tasks.scoring import by_row, score_replies, trainer_rows
from kalman_rl.engine.tasks.table import TASKS, load_task
from kalman_rl.engine.tasks.task import Prompt, Reward, Row, Task, plain_prompt, prompt_text
from kalman_rl.engine.tasks.weighted import WeightedReward, parts_of

__all__ = [
    "TASKS",
    "Prompt",
    "Reward",
    "Row",
    "Task",
    "WeightedReward",
    "by_row",
    "from_verl",
    "guard_reward",
    "load_reward",
    "load_task",
    "parts_of",
    "plain_prompt",
    "prompt_text",
    "rows",
    "score_replies",
    "supervised_reward",
    "trainer_rows",
    "with_noise",
]
