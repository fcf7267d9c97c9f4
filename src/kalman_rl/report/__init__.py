"""Reports: run directories become one HTML page that opens from disk, and one picture for documents."""

from kalman_rl.report.figure import write_figure
from kalman_rl.report.page import write_report

__all__ = ["write_figure", "write_report"]
