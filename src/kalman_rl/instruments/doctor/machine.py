"""The machine: does torch's build fit its devices, and is there room where the run goes?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kalman_rl.instruments.doctor.finding import Finding, PlannedRun

GB = 1e9


def device(plan: PlannedRun) -> Iterator[Finding]:
    """Build of torch against the devices that are there (device files of NVIDIA or ROCm), unless they are hidden."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    present = not hidden and any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd"))
    yield build(torch.version.cuda or torch.version.hip, torch.cuda.is_available(), present)


def build(platform: str | None, available: bool, present: bool) -> Finding:
    """What torch was built for (CUDA or ROCm version, None: CPU only) against what there is."""
    name = f"torch built for {platform or 'CPU only'}"
    if platform and available:
        return Finding("gpu build", "ok", f"{name}, and it sees a GPU")
    if present:
        advice = (
            "install torch as https://pytorch.org/get-started shows for this machine; nvidia-smi shows whether the "
            "driver is older than the build"
        )
        return Finding("gpu build", "problem", f"{name}; a GPU is there but torch cannot use it", advice)
    found = f"{name}; no GPU is visible: everything runs on the CPU"
    if platform:
        return Finding(
            "gpu build", "warning", found, "check CUDA_VISIBLE_DEVICES and, in a container, --gpus"
        )
    return Finding("gpu build", "ok", found)


def disk(plan: PlannedRun) -> Iterator[Finding]:
    """Room and right to write where the run goes."""
    folder = plan.run.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("disk", "problem", f"{folder} cannot be written to", "name another folder with --run")
        return
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.1f} GB free for {plan.run}"
    if free < 0.2 * GB:
        yield Finding("disk", "problem", found, "make room, or name another folder with --run")
    elif free < 2 * GB:
        yield Finding("disk", "warning", found, "checkpoints of larger models will not fit")
    else:
        yield Finding("disk", "ok", found)
