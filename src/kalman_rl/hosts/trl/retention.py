"""Which checkpoints stay where ``save_total_limit`` is set: the newest by step, once the new one is complete."""

from __future__ import annotations

import shutil
from pathlib import Path


def keep_newest(saved: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the checkpoints of the lowest steps beyond ``limit``, never the one just saved.

    By step, because a clock that was set back and a folder that was copied have other times. Checkpoints of later steps
    are of a run that went further; they neither count nor go.

    Args:
        saved: ``checkpoint-N``, complete.
        limit: how many stay; None or 0 = all.
        best: one that stays in any case.
    """
    if not limit or limit < 0:
        return
    names = [path.name.rpartition("-") for path in saved.parent.glob("checkpoint-*")]
    steps = sorted(int(step) for kind, _, step in names if kind == "checkpoint" and step.isdigit())
    until = [step for step in steps if step <= int(saved.name.rpartition("-")[2])]
    spared = None if best is None else Path(best).name
    others = [step for step in until if f"checkpoint-{step}" != spared]
    for step in others[: -max(limit - (len(until) - len(others)), 1)]:
        shutil.rmtree(saved.parent / f"checkpoint-{step}", ignore_errors=True)
