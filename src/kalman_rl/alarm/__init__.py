"""Early warning of collapse: the library's own filter on the metrics of a run."""

from kalman_rl.alarm.fall import Fall
from kalman_rl.alarm.metrics import WATCHED, Metric
from kalman_rl.alarm.rule import Alarm, Judge, Rule, Token, false_alarm_rate
from kalman_rl.alarm.watch import Surprise, Watch, WatchOptions

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
