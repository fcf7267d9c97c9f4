"""Early warning of collapse: the library's own filter on the metrics of a run."""

from kalman_rl.engine.collapse.fall import Fall
from kalman_rl.engine.collapse.metrics import WATCHED, Metric
from kalman_rl.engine.collapse.rule import Alarm, Judge, Rule, Token, false_alarm_rate
from kalman_rl.engine.collapse.watch import Surprise, Watch, WatchOptions

__all__ = [
    "WATCHED",
    "Alarm",
    "Fall",
    "Judge",
    "Metric",
    "Rule",
    "Surprise",
    "Token",
    "Watch",
    "WatchOptions",
    "false_alarm_rate",
]
