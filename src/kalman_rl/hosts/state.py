"""What a checkpoint of the trainer holds beyond TRL's: one safetensors file, no code on loading.

Tensors are stored as they are; the rest (numbers, texts, lists, prompt ids) as JSON in a tensor of bytes. Not in
the file's header, where format 1 had it: safetensors allows 100 MB there, which a few million prompts fill.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kalman_rl.errors import ConfigError, RunError, quote

STATE_FILE = "kalman_rl.safetensors"
FORMAT = 2
_JSON = "json"
"""Name of the tensor of bytes; paths of the others begin with a slash."""


def save_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write a nested dictionary of tensors, numbers, texts and lists into a checkpoint folder, whole or not at all.

    Raises: ConfigError for a state of anything else; RunError if the folder cannot be made or written.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(dict(state), "", tensors)
    try:
        text = json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"checkpoint: got a state_dict with something else in it ({error}), expected tensors, numbers, texts, "
            "lists and dictionaries"
        ) from error
    tensors[_JSON] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    header = {"kalman_rl": json.dumps({"format": FORMAT})}
    temporary = folder / f".tmp-{STATE_FILE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(temporary), metadata=header)
        _sync(temporary)
        os.replace(temporary, folder / STATE_FILE)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder / STATE_FILE}: cannot write: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make the content of a file or the entries of a folder durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(folder: str | Path) -> dict[str, Any] | None:
    """Read it back; None if the checkpoint has no such file.

    Raises: RunError if the file is damaged or of another format.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kalman_rl", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") == FORMAT:
            header["state"] = json.loads(tensors.pop(_JSON).numpy().tobytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: cannot be read: {error}; take an older checkpoint") from None
    if header.get("format") not in (1, FORMAT):
        raise RunError(f"{path}: got format {quote(header.get('format'))}, expected 1 or {FORMAT}")
    state: dict[str, Any] = _with_tensors(header["state"], "", tensors)
    return state


def broken_tensor(folder: str | Path) -> str | None:
    """Name of a weight with NaN or infinity in a checkpoint's safetensors, or None; our own state is not looked at.

    Raises: RunError for a file that cannot be read.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name == STATE_FILE:
            continue
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.float().isfinite().all():
                        return str(name)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path}: cannot be read: {error}; take an older checkpoint") from None
    return None


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor moved to ``tensors`` and a mark in its place."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[k, _without_tensors(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_without_tensors(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    return value


def _with_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_key(k): _with_tensors(v, path, tensors) for k, v in content}
    parts = [_with_tensors(v, path, tensors) for v in content]
    return tuple(parts) if kind == "tuple" else parts


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
