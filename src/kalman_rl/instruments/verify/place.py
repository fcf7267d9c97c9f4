"""Where the checks run: a device, and the precision it has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, quote

DEVICES = ("cpu", "cuda", "mps")
SINGLE = 2e-5
"""Tolerance of the checks on a device without float64."""


class Place(NamedTuple):
    """A device, and the type of the numbers on it."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float64

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, its floating-point numbers in the place's type."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def tolerance(self, value: float) -> float:
        """A tolerance meant for float64, as far as the place's type can meet it."""
        return value if self.dtype == torch.float64 else max(value, SINGLE)


CPU = Place()


def place_of(device: str) -> Place:
    """The place on this machine: float64, float32 on MPS, which has nothing longer.

    Raises: ConfigError for a device that is unknown or absent.

    >>> place_of("cpu").dtype
    torch.float64
    """
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device):
        present = " or ".join(name for name in DEVICES if usable[name])
        raise ConfigError(f"device: got {quote(device)}, expected {present}, which PyTorch sees on this machine; "
                          "choose another device")  # fmt: skip
    return Place(torch.device(device), torch.float32 if device == "mps" else torch.float64)
