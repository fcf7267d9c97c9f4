"""The machine: does torch's build fit its devices, do they compute, is there memory and disk, how long may it take?"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalman_rl.instruments.doctor.finding import Finding, Plan, explain

GB = 1e9
KEPT_CHECKPOINTS = 4  # train keeps three and writes the next one before it removes the oldest
INSTALL_TORCH = "install torch as https://pytorch.org/get-started shows for this machine"


def device(plan: Plan) -> Iterator[Finding]:
    """Build of torch against the devices that are there, then a small product on each of them."""
    import torch

    yield build(torch.version.cuda or torch.version.hip, torch.cuda.is_available(), gpu_present())
    names = [
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)),
    ]
    for name in names:
        yield product(torch, name)


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


def product(torch: Any, name: str) -> Finding:
    """A 64 x 64 product in float32 and bfloat16 on one device, against float64 on the CPU."""
    try:
        about = _about(torch, name)
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        exact = left @ right
        for kind, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 4e-2)):  # TF32 has 10 bits, bf16 8
            found = (left.to(name, kind) @ right.to(name, kind)).double().cpu()
            error = float((found - exact).abs().max() / exact.abs().max())
            if not error <= tolerance:
                wrong = f"{about}: a product in {kind} is off by {error:.1g} of its largest entry"
                return Finding(
                    name, "problem", wrong, "the device or the build of torch is broken; " + INSTALL_TORCH
                )
    except Exception as error:
        return Finding(name, "problem", f"a small product failed: {explain(error)}", INSTALL_TORCH)
    if name != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(
            name, "warning", f"{about}; no bfloat16 in hardware", "train with bf16=False (--dtype float32)"
        )
    return Finding(name, "ok", f"{about}; products in float32 and bfloat16 are right")


def _about(torch: Any, name: str) -> str:
    if name == "cpu":
        return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    free, total = torch.cuda.mem_get_info(name)
    return f"{torch.cuda.get_device_name(name)}, {free / GB:.0f} of {total / GB:.0f} GB free"


def memory(plan: Plan) -> Iterator[Finding]:
    """Main memory that is free for this process, within the limits of a container."""
    free = available_memory()
    if free is None:
        yield Finding("memory", "ok", "this system does not say how much is free")
    elif free < 2 * GB:
        advice = "a 135M model trains in about 4 GB: close something, or take a smaller model or batch"
        yield Finding("memory", "warning", f"{free / GB:.1f} GB available", advice)
    else:
        yield Finding("memory", "ok", f"{free / GB:.1f} GB available")


def available_memory(
    proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Bytes that can still be taken: MemAvailable, or less where a control group limits it; None if unknown."""
    amounts = []
    try:
        lines = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        amounts.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        amounts.append(float(limit - used))
    except (OSError, ValueError):  # "max": no limit
        pass
    return min(amounts, default=None)


def disk(plan: Plan) -> Iterator[Finding]:
    """Room and right to write where the run goes; with a model of known size, what its checkpoints need."""
    folder = plan.run.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("disk", "problem", f"{folder} cannot be written to", "name another folder with --run")
        return
    free = shutil.disk_usage(folder).free
    needed = checkpoint_bytes(plan.settings)
    found = f"{free / GB:.1f} GB free for {plan.run}"
    if needed is not None:
        found += f"; estimate for {KEPT_CHECKPOINTS} checkpoints and the model: {needed / GB:.1f} GB"
    if free < max(needed or 0, 0.2 * GB):
        yield Finding("disk", "problem", found, "make room, or name another folder with --run")
    elif free < 2 * GB:
        yield Finding("disk", "warning", found, "checkpoints of larger models will not fit")
    else:
        yield Finding("disk", "ok", found)


def checkpoint_bytes(settings: Any) -> float | None:
    """Bytes of the checkpoints of a full training of a local model; None where its size is not known here.

    Weights as stored, two float32 moments per weight, taking two bytes per stored weight; times the checkpoints kept
    at once, and the final model.
    """
    if settings is None or settings.lora_rank or not settings.save_every or not Path(settings.model).is_dir():
        return None
    weights = sum(path.stat().st_size for path in Path(settings.model).glob("*.safetensors"))
    return (KEPT_CHECKPOINTS * (1 + 8 / 2) + 1) * weights if weights else None


def duration(plan: Plan) -> Iterator[Finding]:
    """How long the planned steps may take: from steps that an earlier run measured, else from rewards alone."""
    if plan.settings is None:
        from kalman_rl.engine.config import TrainConfig

        plan.settings = TrainConfig()
    settings = plan.settings
    earlier = measured_steps(plan.run)
    if earlier is not None:
        folder, seconds, count = earlier
        found = (
            f"{settings.steps} steps * {seconds:.2g} s = {in_words(settings.steps * seconds)}: estimate, the median "
            f"of {count} steps of {folder}, right only if model, task and batch are like that run's"
        )
    elif plan.seconds_per_reward is not None:
        cycle = settings.updates_per_generation * settings.iterations
        batch = settings.prompts_per_generation * settings.completions_per_prompt
        calls = -(-settings.steps // cycle) * batch
        found = (
            f"{calls} rewards * {plan.seconds_per_reward:.2g} s = {in_words(calls * plan.seconds_per_reward)} for "
            f"rewards alone in {settings.steps} steps: a lower bound, sampling and training were not measured"
        )
    else:
        found = "nothing measured yet: no earlier run in that folder, and no reward was tried"
    yield Finding("time", "ok", found)


def measured_steps(run: Path) -> tuple[Path, float, int] | None:
    """Newest run in or below a folder, its median seconds per step, and of how many steps; None if there is none."""
    files = [*run.glob("metrics.jsonl"), *run.glob("*/metrics.jsonl")]
    for file in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        points = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["kind"] == "train":
                    points.append((int(row["step"]), float(row["time"])))
            except (ValueError, KeyError, TypeError):  # a torn line
                continue
        pace = [
            (t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(points) if s1 > s0 and t1 > t0
        ]
        if pace:
            return file.parent, statistics.median(pace), len(pace)
    return None


def in_words(seconds: float) -> str:
    """A duration in the unit a person would take.

    >>> in_words(42.4), in_words(3000), in_words(90_000)
    ('42 s', '50 min', '25.0 h')
    """
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
