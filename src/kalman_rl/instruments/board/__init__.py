"""The board: the report of a run, served on this machine and renewed while the run goes on."""

from kalman_rl.errors import extra

with extra("board", "kalman-rl board"):
    from kalman_rl.instruments.board.app import BoardApp
    from kalman_rl.instruments.board.serve import serve

__all__ = ["BoardApp", "serve"]
