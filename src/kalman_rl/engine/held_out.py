"""The held-out evaluation of a run: measured, logged, said; the best weights kept where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.evaluation import evaluate
from kalman_rl.engine.models.load import LoadedModel
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.saving import RunTrainer
from kalman_rl.engine.tasks import Row, Task, guard_reward

REWARD = "eval/sampled_reward"
"""What the best weights are chosen by."""


class HeldOut:
    """Called with a step, it evaluates the trainer's model on the held-out rows.

    Args:
        config, run, trainer, loaded, task: of the run that trains.
        max_tokens: longest reply, in tokens.
        say: receives one line for each evaluation.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        trainer: RunTrainer,
        loaded: LoadedModel,
        task: Task,
        max_tokens: int,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.trainer, self.loaded, self.task = config, run, trainer, loaded, task
        self.max_tokens, self.say = max_tokens, say
        self.reward = guard_reward(task.reward)

    def __call__(self, step: int) -> None:
        config = self.config
        result = self._measured(self.task.test[: config.eval_prompts])
        if config.pool_prompts:
            pool = self._measured(self.task.train[: config.pool_prompts])
            result |= {name.replace("eval/", "pool/"): value for name, value in pool.items()}
        best = config.keep_best and self._is_best(result[REWARD])
        if best:  # before it is logged, so that a row never promises weights that are not there
            self.trainer.save_trained("best", self.loaded.tokenizer)
            self.run.update_manifest(best={"step": step, REWARD: result[REWARD]})
        self.run.log("eval", step, **result)
        self.say(
            f"held-out at step {step}: mean reward {result[REWARD]:.3f} and accuracy "
            f"{result['eval/sampled_accuracy']:.3f} sampled, {result['eval/greedy_reward']:.3f} and "
            f"{result['eval/greedy_accuracy']:.3f} greedy ({int(result['eval/count'])} prompts)"
            + (": the best so far" if best else "")
        )

    def _is_best(self, reward: float) -> bool:
        earlier = [row.get(REWARD) for row in read_metrics(self.run.path) if row["kind"] == "eval"]
        return all(value is None or reward > value for value in earlier)

    def _measured(self, rows: Sequence[Row]) -> dict[str, float]:
        model: Any = self.trainer.model
        return evaluate(
            model,
            self.loaded.tokenizer,
            rows,
            self.reward,
            max_completion_tokens=self.max_tokens,
            temperature=self.config.temperature,
            samples=self.config.eval_samples,
            ask=self.task.ask,
            stops=self.loaded.stop_texts,
        )
