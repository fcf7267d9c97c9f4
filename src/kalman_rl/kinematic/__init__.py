"""Kinematic tokens: position, velocity, acceleration and jerk of a noisy series, with how sure they are.

Built after arXiv:2601.09949 (Kearney 2026). The paper's constants are not published, so nothing here reproduces it.
"""

from kalman_rl.kinematic.tokenizer import KinematicTokenizer

__all__ = ["KinematicTokenizer"]
