"""What happens around the training loop: metrics to disk, evaluation, traces, progress, stopping."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.tasks import prompt_text
from kalman_rl.hosts.trl import TokenBatch
from kalman_rl.terminal import tell


class WriteMetrics(TrainerCallback):
    """Append every log of the trainer to the run's ``metrics.jsonl`` and show it as progress.

    The trainer's own list of them, 3 kB a step that every checkpoint would hold again, keeps the last one only.
    """

    def __init__(self, run: Run, show: Callable[[int, dict[str, float]], None]) -> None:
        self.run, self.show = run, show

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        del state.log_history[:-1]
        if not logs or "train_runtime" in logs:
            return
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
        numbers |= used_memory()
        if state.is_world_process_zero:
            self.run.log("train", state.global_step, **numbers)
            self.show(state.global_step, numbers)


def used_memory() -> dict[str, float]:
    """Memory in GB, by the names of metrics: the most that this process took so far, and its tensors on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    used = {"memory/process_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        used["memory/device_most"] = torch.cuda.max_memory_allocated() / 1e9
    return used


class NoSignal(TrainerCallback):
    """Say once that in ``patience`` generation batches in a row no prompt had completions with different rewards."""

    def __init__(self, say: Callable[[str], None], patience: int = 5) -> None:
        self.say, self.patience, self.equal, self.said = say, patience, 0, False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        share = (logs or {}).get("frac_reward_zero_std")
        if share is None:  # no generation in this step
            return
        self.equal = self.equal + 1 if share == 1 else 0
        if self.equal == self.patience and not self.said:
            self.said = True
            self.say(
                f"warning: in {self.patience} generation batches no prompt had completions with different rewards, so "
                "there was nothing to compare and a group's advantages are 0; the prompts are all too hard or too "
                "easy, or the reward never changes (kalman-rl doctor tries it)"
            )


class Evaluate(TrainerCallback):
    """Evaluate every ``every`` optimizer steps; the first and last evaluation are the caller's."""

    def __init__(self, evaluate: Callable[[int], None], every: int) -> None:
        self.evaluate, self.every = evaluate, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.evaluate(state.global_step)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the current generation batch, save, stop. A second one stops at once.

    The stop waits for the end of the generation batch because TRL's checkpoints do not hold the rollouts:
    resumed inside a batch, a run would generate for the same prompts again. Outside of training nothing is lost, so
    the first one raises KeyboardInterrupt.

    Attributes:
        requested: whether a signal came.
        at_once: whether KeyboardInterrupt was raised for one, which a library may turn into an error of its own.
        step: optimizer steps done.
        ended: set when only the end is left to write down; signals are ignored from then on.
    """

    def __init__(self, cycle: int) -> None:
        self.cycle, self.requested, self.ended, self.step = cycle, False, False, 0
        self.at_once = False
        self._training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the host decides about signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.ended:
            return
        if self.requested or not self._training:
            self.requested = self.at_once = True
            raise KeyboardInterrupt
        self.requested = True
        tell("\nstopping after this generation batch; once more to stop at once", error=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.at_once:  # and a library went on as if nothing had come
            raise KeyboardInterrupt
        self._training, self.step = True, state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        if self.requested and state.global_step % self.cycle == 0:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False


class Progress:
    """One line per logged step on stderr: step, reward, loss, ratio spread, speed, time left."""

    def __init__(self, total: int, *, quiet: bool = False, prefix: str = "") -> None:
        self.total, self.quiet, self.prefix = total, quiet, prefix
        self.start = time.monotonic()
        self.first_step: int | None = None
        self.live = sys.stderr.isatty() and not prefix  # several processes would overwrite each other

    def say(self, text: str) -> None:
        """A separate line, before which a live line is cleared."""
        if not self.quiet:
            tell(f"{self.prefix}{text}", error=True, wipe=self.live)

    def begin(self) -> None:
        """Start the clock of the estimate, after whatever came before training."""
        self.start = time.monotonic()

    def __call__(self, step: int, logs: dict[str, float]) -> None:
        if self.quiet:
            return
        if self.first_step is None:
            self.first_step = step - 1
        done = max(step - self.first_step, 1)
        seconds = (time.monotonic() - self.start) / done
        left = int(seconds * max(self.total - step, 0))
        width = len(str(self.total))
        fields = [f"{self.prefix}step {step:>{width}}/{self.total}"]
        for label, name, form in (
            ("reward", "reward", ".3f"),
            ("loss", "loss", "+.4f"),
            ("log-ratio var", "ratio/raw_log_variance", ".1e"),
            ("filtered", "ratio/filtered_log_variance", ".1e"),
            ("kept", "trust/kept", ".0%"),
        ):
            value = logs.get(name, math.nan)
            if not math.isnan(value):
                fields.append(f"{label} {value:{form}}")
        fields.append(f"{seconds:.2f} s/step")
        fields.append(f"{left // 60}:{left % 60:02d} left")
        line = "  ".join(fields)
        if self.live:
            tell(line, error=True, wipe=True, end="" if step < self.total else "\n")
        elif step == self.total or step % max(self.total // 20, 1) == 0:
            tell(line, error=True)


class TraceTokens:
    """Observer of the trainer: keep a few completions per step, token by token, and write them as Parquet.

    Args: answers: what is expected of a prompt, by its ``prompt_id``, where that is known.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: Any,
        per_step: int,
        every: int = 1,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.tokenizer, self.per_step, self.every = run, tokenizer, per_step, max(every, 1)
        self.answers = answers or {}
        self.step = -1

    def __call__(self, batch: TokenBatch) -> None:
        step = batch.step + 1  # the step that this micro-batch belongs to
        if not self.per_step or step == self.step or step % self.every:
            return
        self.step = step
        columns: dict[str, list[Any]] = {}
        for row in range(min(self.per_step, len(batch.logp))):
            for name, values in self._sequence(batch, row, step).items():
                columns.setdefault(name, []).extend(values)
        if columns.get("step"):
            self.run.write_traces(step, columns)

    def _sequence(self, batch: TokenBatch, row: int, step: int) -> dict[str, list[Any]]:
        rollouts, tokens = batch.rollouts, batch.loss.tokens
        keep = rollouts.mask[row]
        ids = batch.inputs["completion_ids"][row][keep].tolist()
        pick: Callable[[torch.Tensor], list[Any]] = lambda values: values[row][keep].tolist()  # noqa: E731
        missing = [None] * len(ids)
        reward = float(batch.inputs["rewards"][row])
        return {
            "step": [step] * len(ids),
            "sequence": [row] * len(ids),
            "prompt_id": [str(batch.inputs["prompt_id"][row])] * len(ids),
            "prompt": [prompt_text(batch.inputs["prompt"][row])] * len(ids),
            "completion": [self.tokenizer.decode(ids)] * len(ids),
            "position": keep.nonzero().flatten().tolist(),
            "token_id": ids,
            "token": [self.tokenizer.decode([i]) for i in ids],
            "logp_old": pick(rollouts.logp_old),
            "logp_behaviour": missing if rollouts.logp_behaviour is None else pick(rollouts.logp_behaviour),
            "logp": pick(batch.logp),
            "log_ratio": pick(tokens.log_ratio),
            "filtered_log_ratio": pick(tokens.log_weight),
            "gain": missing if tokens.gain is None else pick(tokens.gain),
            "coefficient": pick(tokens.coefficient),
            "kept": pick(tokens.kept),
            "advantage": [float(batch.inputs["advantages"][row].float().flatten()[0])] * len(ids),
            "reward": [None if math.isnan(reward) else reward] * len(ids),
            "answer": [self.answers.get(str(batch.inputs["prompt_id"][row])) or None] * len(ids),
        }


class WriteBeliefs:
    """Observer of a tracked run: append what is believed of the prompts to ``beliefs.jsonl``."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, record: dict[str, Any]) -> None:
        self.run.append("beliefs.jsonl", record)
