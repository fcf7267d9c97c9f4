"""A CPU as a platform of verl's, and what verl 0.9 needs besides to train on one.

Importing this module registers it, in every process, before any module of verl asks which platform there is. It is
therefore the first thing that the plugin imports. verl's own ``device="cpu"`` does not train: it looks for GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from kalman_rl.hosts.verl.cpu.settings import ENGINE


def nothing(*args: Any, **options: Any) -> None:
    """What a CPU does when it is asked to synchronize, to empty its cache or to profile."""


def zero(*args: Any, **options: Any) -> int:
    return 0


MEMORY = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
QUIET = ("empty_cache", "synchronize", "reset_peak_memory_stats", "set_rng_state", "set_device")
device_module = types.ModuleType("kalman_rl_cpu")
"""In the place of ``torch.cuda``: what verl asks of it while it trains, saves and resumes."""
vars(device_module).update(dict.fromkeys(MEMORY, zero) | dict.fromkeys(QUIET, nothing))
vars(device_module).update(
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_device_name=lambda *args: "cpu",
    get_rng_state=lambda *args: torch.get_rng_state(),
    mem_get_info=lambda *args: (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),) * 2,
)


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    """One CPU that passes for one accelerator."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return device_module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")  # verl writes tensor.to(current_device()), and 0 is a GPU

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def ray_resource_name(self) -> str:
        return "GPU"  # verl counts no other resource than GPU and NPU; settings.py pretends that Ray has one

    def ray_noset_envvars(self) -> list[str]:
        return []

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def is_ipc_supported(self) -> bool:
        return False

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    set_device = synchronize = empty_cache = set_allocator_settings = nothing
    profiler_start = profiler_stop = cudart = nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


def patch() -> None:
    """Two places where verl 0.9 takes an accelerator for granted, and our rollout in verl's two tables."""
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")  # only chooses the class of FSDP's engine
    from torch.distributed.fsdp import OffloadPolicy
    from verl.utils import distributed, fsdp_utils
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    # verl builds "cpu:gloo,cpu:gloo", and torch refuses a device that comes twice
    distributed.initialize_global_process_group_ray = functools.partial(
        distributed.initialize_global_process_group_ray, backend="gloo"
    )
    fsdp_utils.CPUOffloadPolicy = lambda **options: OffloadPolicy()  # pinned memory needs an accelerator
    home = "kalman_rl.hosts.verl.cpu.rollout"
    base._ROLLOUT_REGISTRY[ENGINE, "async"] = f"{home}.Weights"
    RolloutReplicaRegistry.register(ENGINE, _replica)


def _replica() -> type:
    from kalman_rl.hosts.verl.cpu.rollout import Replica

    return Replica


patch()
