"""The machine: does torch's build fit its devices, and is there room where the run goes?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kalman_rl.instruments.doctor.finding import Finding, PlannedRun

GB = 1e9
INSTALL_TORCH = "install torch as https://pytorch.org/get-started shows for this machine"


def device(plan: PlannedRun) -> Iterator[Finding]:
    """Build of torch against the devices that are there."""
    import torch

    yield build(torch.version.cuda or torch.version.hip, torch.cuda.is_available(), gpu_present())


def build(platform: str | None, available: bool, present: bool) -> Finding:
    """What torch was built for (CUDA or ROCm version, None: CPU only) against what there is."""
    name = f"torch built for {'CPU only' if platform is None else platform}"
    if platform is None and present:
        return Finding(
            "gpu build", "problem", f"{name}, but there is a GPU, which stays unused", INSTALL_TORCH
        )
    if platform is None:
        return Finding("gpu build", "ok", f"{name}, and no GPU is visible: everything runs on the CPU")
    if available:
        return Finding("gpu build", "ok", f"{name}, and it sees a GPU")
    if present:
        advice = "run nvidia-smi; a driver older than the build is the usual cause. " + INSTALL_TORCH
        return Finding("gpu build", "problem", f"{name}; a GPU is there but torch cannot use it", advice)
    found = f"{name}, but no GPU is visible: everything runs on the CPU"
    return Finding("gpu build", "warning", found, "check CUDA_VISIBLE_DEVICES and, in a container, --gpus")


def gpu_present() -> bool:
    """Whether the system shows a GPU (NVIDIA or ROCm device files), whatever torch thinks, and lets us see it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd"))


def disk(plan: PlannedRun) -> Finding:
    """Room and right to write where the run goes."""
    folder = plan.run.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("disk", "problem", f"{folder} cannot be written to", "name another folder with --run")
    free = shutil.disk_usage(folder).free
    found = f"{free / GB:.1f} GB free for {plan.run}"
    if free < 0.2 * GB:
        return Finding("disk", "problem", found, "make room, or name another folder with --run")
    if free < 2 * GB:
        return Finding("disk", "warning", found, "checkpoints of larger models will not fit")
    return Finding("disk", "ok", found)
