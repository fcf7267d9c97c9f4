"""What a run saves: checkpoints that are whole or absent, the newest of them kept; a full disk ends a run cleanly."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from kalman_rl.engine.models.stops import StopTexts
from kalman_rl.engine.runs.files import FULL, replacing
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import NoSpaceError
from kalman_rl.hosts.trl import KalmanGRPOTrainer

SMALL_FILES = 65_536
"""Bytes of a checkpoint's states and settings, about."""


class RunTrainer(KalmanGRPOTrainer):
    """The trainer of a run: seals each checkpoint once all of it is written, and only then drops older ones.

    Args:
        run: that is written to.
        keep: checkpoints that stay.
        stop_texts: longer texts that end a completion, or None.
        Everything else as in KalmanGRPOTrainer.
    """

    def __init__(
        self, *args: Any, run: Run, keep: int = 3, stop_texts: StopTexts | None = None, **kwargs: Any
    ) -> None:
        self.run, self.keep, self.stop_texts = run, keep, stop_texts
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completions, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.stop_texts is not None:
            completions = [self.stop_texts.cut(tokens) for tokens in completions]
        return completions, logprobs

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        if self.stop_texts is not None:  # TRL takes a completion without its end token for one cut short
            _, completions, *_ = output
            ended = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            whole = [len(ids) for ids in completions if ids[-1] in ended or self.stop_texts.ends(ids)]
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["completions/clipped_ratio"][-1] = 1 - len(whole) / len(completions)
            for name, of in (("mean", fmean), ("min", min), ("max", max)):
                metrics[f"completions/{name}_terminated_length"][-1] = float(of(whole or [0]))
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.run.path / "checkpoints" / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder, ignore_errors=True)  # a save that was cut short, or a damaged one
        with whole_or_absent(folder, lambda: checkpoint_bytes(self)):
            super()._save_checkpoint(model, trial)
            self.run.seal_checkpoint(folder)
        self.run.retain(self.keep, folder)

    def save_trained(self, name: str, tokenizer: Any) -> None:
        """Write the weights and their tokenizer to the folder ``name`` of the run, in place of older ones."""
        target = self.run.path / name
        shutil.rmtree(target, ignore_errors=True)
        with whole_or_absent(target, lambda: model_bytes(self)), replacing(target) as temporary:
            self.save_model(str(temporary))
            tokenizer.save_pretrained(str(temporary))


def check_room(trainer: RunTrainer, saves: bool, best: bool = False) -> None:
    """Raise NoSpaceError, before anything is trained, if a checkpoint and the trained model do not fit on the disk.

    Args: saves: whether checkpoints are written at all. best: whether the best weights are kept too.
    """
    needed = model_bytes(trainer) * (1 + best) + (checkpoint_bytes(trainer) if saves else 0)
    free = shutil.disk_usage(trainer.run.path).free
    if free < needed:
        parts = "a checkpoint and the trained model" if saves else "the trained model"
        raise NoSpaceError(
            f"{trainer.run.path}: got {free:,} bytes free, expected at least {needed:,} for {parts}; make room, or "
            "name another disk with --run"
        )


def model_bytes(trainer: RunTrainer) -> int:
    """Bytes of the weights that are saved (of adapters alone, where there are some) and of the tokenizer, about."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
    backend = getattr(trainer.processing_class, "backend_tokenizer", None)
    words = 0 if backend is None else len(backend.to_str())
    return sum(p.numel() * p.element_size() for p in saved) + words + SMALL_FILES


def checkpoint_bytes(trainer: RunTrainer) -> int:
    """Bytes of a checkpoint, about: the weights, and AdamW's two moments of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return model_bytes(trainer) + 2 * trained


@contextlib.contextmanager
def whole_or_absent(folder: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn a full disk while ``folder`` is written into a NoSpaceError, and remove what was written of it.

    Args: needed: bytes of the whole folder, asked only then.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error, folder.parent, needed):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        raise NoSpaceError(
            f"{folder}: cannot write: no space left on the disk; needed about {needed():,} bytes, free {free:,}; what "
            "was written of it is removed"
        ) from error


def is_full(error: BaseException | None, place: Path, needed: Callable[[], int]) -> bool:
    """Whether a full disk is behind an error: safetensors says so in words, torch's writer that its stream broke."""
    while error is not None:
        text = str(error)
        if isinstance(error, NoSpaceError) or getattr(error, "errno", None) in FULL:
            return True
        if any(f"(os error {number})" in text for number in FULL):
            return True
        if any(word in text for word in ("inline_container", "iostream", "PytorchStreamWriter")):
            return shutil.disk_usage(place).free < needed()
        error = error.__cause__ or error.__context__
    return False
