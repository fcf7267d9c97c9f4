"""Several processes: when one of them dies or hangs, the others stop with a sentence that contains what to do.

torchrun and ``accelerate launch`` stop all ranks of a node within seconds of the first death and name it. Without
their agent, and across nodes, the survivors find out in a collective: at once where the connection breaks (gloo),
else after ``ddp_timeout``. torch then raises an error about sockets; here it becomes a RunError.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kalman_rl.errors import KalmanRLError, RunError, quote
from kalman_rl.hosts.state import broken_tensor, load_state
from kalman_rl.hosts.trl.candidates import CandidatesTrainer


class RanksTrainer(CandidatesTrainer):
    """GRPOTrainer whose ``train`` reports which step lost another process, and from which checkpoint to continue."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's. Raises: RunError when another process of the group is gone or does not answer."""
        if self.accelerator.num_processes > 1 and self.args.device.type == "cpu":
            _mend_cpu(self.args)
        with named_loss(self):
            return super().train(*args, **kwargs)


def _mend_cpu(args: Any) -> None:
    """What transformers (5.10) leaves out for several processes on CPU: the limit of collectives, which stays at half
    an hour, and a device that torch.load accepts when the optimizer is read back ("cpu:0" is not one)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta, dist.group.WORLD)
    args.__dict__["_setup_devices"] = torch.device("cpu")  # the cache behind args.device


@contextlib.contextmanager
def named_loss(trainer: Any) -> Iterator[None]:
    """Turn torch's error about a lost process into a RunError with rank, step, and the last good checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if trainer.accelerator.num_processes == 1 or not lost_process(error):
            raise
        good = last_good_checkpoint(trainer.args.output_dir)
        go_on = (
            f"train(resume_from_checkpoint={quote(str(good), 5000)})"
            if good
            else "from the start: nothing was saved"
        )
        rank = trainer.accelerator.process_index
        raise RunError(
            f"rank {rank}: got no answer from another process of {trainer.accelerator.num_processes} at step "
            f"{trainer.state.global_step}, expected all to be alive; it was killed, crashed or hangs (limit "
            f"ddp_timeout = {trainer.args.ddp_timeout} s; its own log has the reason: {str(error)[:200]}); start all "
            f"again, {go_on}"
        ) from error


def lost_process(error: BaseException) -> bool:
    """Whether a torch error means that another process is gone or hangs.

    >>> lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
    True
    >>> lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, KalmanRLError):  # a reward's time-out is not a rank's
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """Newest ``checkpoint-N`` in a folder with all its parts: trainer state, finite weights, our state.

    TRL writes checkpoints in place, so a process killed while saving leaves a torn one; transformers'
    ``get_last_checkpoint`` goes by the number alone. Ours is the last file of a save.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    newest_first = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in newest_first if _whole(path)), None)


def _whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text())
        return broken_tensor(folder) is None and load_state(folder) is not None
    except (OSError, ValueError):
        return False
