"""Reports: run directories become one HTML page that opens from disk, and one picture for documents."""

from kalman_rl.errors import extra

with extra("app", __name__):
    from kalman_rl.instruments.report.page import write_report
    from kalman_rl.instruments.report.picture import write_figure

__all__ = ["write_figure", "write_report"]
