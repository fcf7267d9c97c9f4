"""What verl's trainer uses of the package TransferQueue, kept in a dictionary; for machines where it is missing.

``install()`` also puts empty modules in the place of web packages that verl imports on the way and the driver does
not use. The real ones are taken where they are installed.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import MagicMock

import torch

UNUSED = ("cachetools", "fastapi", "fastapi.responses", "msgspec", "zmq", "zmq.asyncio")
ROWS: dict[str, dict[str, dict[str, Any]]] = {}
TAGS: dict[str, dict[str, dict[str, Any]]] = {}


@dataclass
class KVBatchMeta:
    keys: list[str]
    tags: list[dict[str, Any]]
    partition_id: str
    fields: list[str] | None = None
    extra_info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def reorder(self, index: list[int]) -> None:
        self.keys, self.tags = [self.keys[i] for i in index], [self.tags[i] for i in index]


class BatchMeta:
    pass


def kv_batch_put(keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> KVBatchMeta:
    rows, marks = ROWS.setdefault(partition_id, {}), TAGS.setdefault(partition_id, {})
    for i, key in enumerate(keys):
        marks.setdefault(key, {}).update(tags[i] if tags else {})
        if fields is not None:
            rows.setdefault(key, {}).update({name: _row(fields.get(name), i) for name in fields.keys()})  # noqa: SIM118
    return KVBatchMeta(list(keys), [marks[key] for key in keys], partition_id)


def _row(column: Any, i: int) -> Any:
    value = column.unbind()[i] if isinstance(column, torch.Tensor) and column.is_nested else column[i]
    return value if isinstance(value, torch.Tensor) else getattr(value, "data", value)


def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    rows = [ROWS[partition_id][key] for key in keys]
    names = [name for name in (select_fields or rows[0]) if name in rows[0]]  # as the real one: what there is
    return list_of_dict_to_tensordict([{name: row[name] for name in names} for row in rows])


def kv_list(partition_id: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: dict(tags) for name, tags in TAGS.items() if partition_id in (None, name)}


def kv_clear(keys: list[str], partition_id: str) -> None:
    for key in keys:
        ROWS.get(partition_id, {}).pop(key, None)
        TAGS.get(partition_id, {}).pop(key, None)


async def async_kv_put(key: str, partition_id: str, fields: Any = None, tag: Any = None) -> None:
    kv_batch_put([key], partition_id, fields, [tag or {}])


async def async_kv_batch_put(keys: list[str], fields: Any, tags: Any, partition_id: str) -> None:
    kv_batch_put(keys, partition_id, fields, tags)


def init(*args: Any) -> None:
    pass


def close() -> None:
    pass


def install() -> bool:
    """Make ``import transfer_queue`` work; True if it is the real package."""
    absent = [name for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in absent:
        sys.modules[name] = MagicMock(__path__=[], __spec__=None)
    if importlib.util.find_spec("transfer_queue") is not None:
        return True
    sys.modules["transfer_queue"] = sys.modules[__name__]
    return False
