"""Notice that a run has collapsed: its reward has fallen. Warn, save a checkpoint, or stop.

``CollapseAlarm`` is imported when it is first used: the report reads alarms without transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalman_rl.engine.collapse.rule import Alarm, Fall, Token, read_alarms

if TYPE_CHECKING:
    from kalman_rl.engine.collapse.callback import CollapseAlarm

__all__ = ["Alarm", "CollapseAlarm", "Fall", "Token", "read_alarms"]


def __getattr__(name: str) -> Any:
    if name == "CollapseAlarm":
        from kalman_rl.engine.collapse.callback import CollapseAlarm

        return CollapseAlarm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
