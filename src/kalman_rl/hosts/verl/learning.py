"""What a method learns while verl trains: noises from past optimizer steps, bounds from the step under way.

verl's engine takes an optimizer step in ``train_batch``, one micro-batch after another, on every rank, and shows the
loss nothing of it. Around that call, bounds are found by a pass over the micro-batches without gradient, and noises are
absorbed when the step is over. They are written beside the engine's own checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalman_rl.hooks import moved
from kalman_rl.hosts.state import load_state, save_state
from kalman_rl.hosts.verl.config import choice_for
from kalman_rl.hosts.verl.hooks import ENGINE
from kalman_rl.hosts.verl.settings import PREFIX
from kalman_rl.objectives.learning import LearnedState, step_statistics
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.terminal import logger

ENGINES = "verl.workers.engine.base"
"""The module with verl's table of engines. Importing it costs seconds where Megatron is installed."""

FOLDER = "kalman_rl"
"""In an engine's checkpoint, with a folder for every rank."""


class Step:
    """One optimizer step of one rank, while the engine takes it."""

    def __init__(self, learned: LearnedState) -> None:
        self.learned, self.now = learned, learned.now
        self.looking = "trust" in learned.method.learns
        """Whether the micro-batches are only being looked at."""
        self.statistics: Tensor | None = None

    def applied(self, method: Method) -> Method:
        """The method with the ratio and the trust region of this step."""
        return dataclasses.replace(method, ratio=self.now.ratio, trust=self.now.trust)

    def look(self, method: Method, rollouts: Rollouts, logp: Tensor, advantage: Tensor) -> None:
        """Add what a micro-batch says about the bounds."""
        found = step_statistics(self.applied(method), rollouts, logp, advantage=advantage)
        assert found is not None
        self.statistics = found if self.statistics is None else self.statistics + found

    def choose(self) -> None:
        """Take the bounds that the micro-batches of all ranks lead to."""
        self.now, self.looking = self.learned.with_bounds(self.statistics), False


STEP: ContextVar[Step | None] = ContextVar("STEP", default=None)
"""The optimizer step that the loss is called in; None for a method that learns nothing, and outside verl's engines."""


class EngineLearning:
    """Stands around an engine of verl: its steps, and its checkpoints.

    Args: engine: a ``BaseEngine``, whose three methods are replaced.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.learned: LearnedState | None = None
        self.loaded: dict[str, Any] | None = None
        """What a checkpoint held; empty after one without anything that was learned."""
        self.inner = {
            name: getattr(engine, name) for name in ("train_batch", "save_checkpoint", "load_checkpoint")
        }
        for name in self.inner:
            setattr(engine, name, getattr(self, name))

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        learned = self.learns(loss_function)
        if learned is None:
            return self.inner["train_batch"](data, loss_function)
        step = Step(learned)
        token = STEP.set(step)
        try:
            if step.looking:
                self.engine.infer_batch(data, loss_function)
                step.choose()
            found = self.inner["train_batch"](data, loss_function)
        finally:
            STEP.reset(token)
        learned.end_step()
        return found

    def learns(self, loss_function: Callable[..., Any]) -> LearnedState | None:
        """The state of the loss's method, which verl binds to its configuration; None where nothing is learned."""
        config = getattr(loss_function, "keywords", {}).get("config")
        mode = getattr(getattr(config, "policy_loss", None), "loss_mode", None)
        if not isinstance(mode, str) or not mode.startswith(PREFIX):
            return None
        method = choice_for(mode.removeprefix(PREFIX), config).method
        if not method.learns:
            return None
        if self.learned is None or self.learned.method != method:
            self.learned = LearnedState(method, self.over_ranks)
            if self.loaded:
                self.learned.load_state_dict(self.loaded)
            elif self.loaded is not None and self.learned.state is not None:
                logger.warning(
                    "%s: got a checkpoint without what was learned, expected its noises; they start anew",
                    method.name,
                )
        return self.learned

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum over data-parallel ranks."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return values
        from verl.utils.device import get_device_id

        total = values.to(get_device_id())
        torch.distributed.all_reduce(total, group=self.engine.get_data_parallel_group())
        return total.to(values.device)

    def save_checkpoint(self, local_path: str, *others: Any, **options: Any) -> Any:
        found = self.inner["save_checkpoint"](local_path, *others, **options)
        learned = self.loaded if self.learned is None else self.learned.state_dict()
        if learned:
            save_state(folder(local_path), {"learned": learned})
        return found

    def load_checkpoint(self, local_path: str | None, *others: Any, **options: Any) -> Any:
        state = (
            None if local_path is None else load_state(folder(local_path))
        )  # verl may delete it after reading
        found = self.inner["load_checkpoint"](local_path, *others, **options)
        if local_path is not None:
            self.loaded, self.learned = {} if state is None else state["learned"], None
        return found


def folder(local_path: str) -> Path:
    """Where this rank keeps what was learned: other nodes may have other disks."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return Path(local_path) / FOLDER / f"rank_{rank}"


def watch_engines() -> None:
    """Put an :class:`EngineLearning` around every language model of verl's engines, once they are imported."""
    if ENGINES in sys.modules:
        _wrap(sys.modules[ENGINES])
    elif not any(isinstance(finder, _Engines) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Engines())


class _Engines(importlib.abc.MetaPathFinder):
    """Waits for verl's module of engines to be imported."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != ENGINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: Any) -> None:
    if changed := moved(ENGINE):
        logger.warning("verl: %s; %s", changed[0], ENGINE.otherwise)
        return
    registry = module.EngineRegistry
    inner = registry.new
    if hasattr(inner, "kalman_rl"):
        return

    def new(model_type: str, backend: str, *others: Any, **options: Any) -> Any:
        engine = inner(model_type, backend, *others, **options)
        if model_type == "language_model":
            EngineLearning(engine)
        return engine

    new.kalman_rl = True  # type: ignore[attr-defined]
    registry.new = staticmethod(new)
