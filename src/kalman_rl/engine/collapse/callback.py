"""The alarm inside a training run: a callback for TRL's trainers.

from kalman_rl.engine.collapse import CollapseAlarm

KalmanGRPOTrainer(..., callbacks=[CollapseAlarm("stop")])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from kalman_rl.engine.collapse.rule import (
    MAX_SHOWN_TOKENS,
    Alarm,
    Fall,
    Token,
    append_alarm,
    keep_alarms,
    read_number,
)
from kalman_rl.errors import ConfigError, one_line, quote
from kalman_rl.terminal import logger

ACTIONS = ("warn", "checkpoint", "stop")


class CollapseAlarm(TrainerCallback, ExportableState):
    """Watch the logged reward and act when it has fallen: see :class:`kalman_rl.engine.collapse.rule.Fall`.

    It tells of a collapse and does not foresee one. An alarm names the tokens with the largest |log-ratio| in the
    updates since the reward before.

    Every rank sees the same logged numbers and decides alike; the main one writes and warns. Its state is part of
    ``trainer_state.json``, so a resumed run goes on where the saved one was. A fault in here is logged once and
    switches the alarm off; it never stops training.

    Args:
        action: warn; checkpoint, which also saves after the generation batch; stop, which saves and stops there.
        folder: where ``alarms.jsonl`` goes; default: the trainer's output directory.
        say: what a warning is given to; default: this package's logger.

    Raises: ConfigError for an unknown action.
    """

    def __init__(
        self,
        action: str = "warn",
        folder: str | Path | None = None,
        *,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if action not in ACTIONS:
            raise ConfigError(f"action: got {quote(action)}, expected one of {', '.join(ACTIONS)}")
        self.action, self.folder = action, None if folder is None else Path(folder)
        self.alarms: list[Alarm] = []
        self.stopped = False
        self.saved: dict[str, Any] | None = None  # set by transformers where it restores callbacks itself
        self._say = say or (lambda text: logger.warning("%s", text))
        self._fall = Fall()
        self._pending, self._broken, self._cycle = False, False, 1
        self._tokens: list[tuple[int, int, str, float]] = []  # the largest since the last reward

    def state(self) -> dict[str, Any]:
        """What transformers puts into ``trainer_state.json``: how to build it, and where it is."""
        saved = {"fall": self._fall.state_dict(), "tokens": [list(token) for token in self._tokens]}
        return {
            "args": {
                "action": self.action,
                "folder": None if self.folder is None else str(self.folder),
            },
            "attributes": {"saved": saved},
        }

    def observe(self, batch: Any) -> None:
        """Observer of the trainer: note the tokens with the largest |log-ratio| since the last reward.

        The reward is logged with the first update after sampling, whose log-ratios are zero; what moved the policy
        are the updates before it.
        """
        if self._broken:
            return
        ratio = torch.where(batch.rollouts.mask, batch.loss.tokens.log_ratio.detach().float(), 0.0)
        place = ratio.abs().flatten().topk(min(MAX_SHOWN_TOKENS, ratio.numel())).indices
        width = ratio.shape[1]
        for index, value in zip(place.tolist(), ratio.flatten()[place].tolist()):
            row, position = divmod(index, width)
            token = int(batch.inputs["completion_ids"][row, position])
            self._tokens.append((token, position, str(_entry(batch.inputs.get("prompt_id"), row)), value))
        self._tokens = sorted(self._tokens, key=lambda token: -abs(token[3]))[:MAX_SHOWN_TOKENS]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._cycle = _cycle(args)
        self._fall, self._tokens = Fall(), []
        self._pending, self.stopped = False, False
        if self.folder is None:
            self.folder = Path(args.output_dir)
        with _Guard(self):
            if state.is_world_process_zero:
                keep_alarms(self.folder, state.global_step)
            if state.global_step > 0:
                self._restore(state)
        if isinstance(
            state.stateful_callbacks, dict
        ):  # a checkpoint from before this callback has no place for it
            state.stateful_callbacks[type(self).__name__] = self.state()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._broken or not logs or "loss" not in logs or "train_runtime" in logs:
            return
        with _Guard(self):
            step = state.global_step
            alarm = self._fall.see(step, logs)
            if alarm is not None:
                alarm = dataclasses.replace(alarm, tokens=self._named(kwargs.get("processing_class")))
                self.alarms.append(alarm)
                self._pending = self._pending or self.action != "warn"
                if state.is_world_process_zero:
                    self._say(f"alarm: {alarm.sentence()}")
                    assert self.folder is not None
                    append_alarm(self.folder, alarm, self.action)
            if read_number(logs, "reward") is not None:
                self._tokens = []
        self._act(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._act(state, control)

    def _act(self, state: TrainerState, control: TrainerControl) -> None:
        """Save, or save and stop, but only between generation batches: checkpoints hold no rollouts."""
        if self._pending and state.global_step % self._cycle == 0:
            self._pending = False
            control.should_save = True
            if self.action == "stop":
                control.should_training_stop = self.stopped = True

    def _restore(self, state: TrainerState) -> None:
        saved = self.saved
        if saved is None:
            entry = (state.stateful_callbacks or {}).get(type(self).__name__)
            saved = entry["attributes"]["saved"] if isinstance(entry, dict) else None
        if saved is None:
            logger.warning("alarm: the checkpoint has no state of it, so level and best start anew")
            return
        self._fall.load_state_dict(saved["fall"])
        self._tokens = [
            (token, position, prompt, value) for token, position, prompt, value in saved["tokens"]
        ]

    def _named(self, tokenizer: Any) -> tuple[Token, ...]:
        named = []
        for token, position, prompt, value in self._tokens:
            text = tokenizer.decode([token]) if hasattr(tokenizer, "decode") else str(token)
            named.append(Token(text, value, prompt, position))
        return tuple(named)


class _Guard:
    """Turns a fault of the alarm into one warning and no more alarms."""

    def __init__(self, alarm: CollapseAlarm) -> None:
        self.alarm = alarm

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.alarm._broken = True
        logger.warning("alarm: %s: %s; the run goes on without it", kind.__name__, one_line(error))
        return True


def _cycle(args: Any) -> int:
    """Optimizer steps from one sampling to the next."""
    micro = getattr(args, "steps_per_generation", None) or 1
    share = max(int(getattr(args, "gradient_accumulation_steps", 1) or 1), 1)
    return max(-(-int(micro) // share), 1) * max(int(getattr(args, "num_iterations", 1) or 1), 1)


def _entry(values: Any, row: int) -> Any:
    return "" if values is None or values[row] is None else values[row]
