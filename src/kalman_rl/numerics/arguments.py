"""What filters ask of the tensors that they are given."""

from __future__ import annotations

from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError


def expect_shape(name: str, tensor: Tensor, fits: bool, expected: str) -> None:
    """Raises: ShapeError with type and shape unless ``fits``."""
    if not fits:
        raise ShapeError(f"{name}: got {tensor.dtype}, shape {tuple(tensor.shape)}, expected {expected}")


def expect_values(
    name: str, values: Tensor, fits: Tensor, expected: str, advice: str, axes: str = "(row, token)"
) -> None:
    """Raises: NumericError with the first value that does not fit, and its place, unless all do."""
    if not fits.all():
        place = tuple((~fits).nonzero()[0].tolist())
        where = f"; {axes} = {place}" if place else ""
        raise NumericError(f"{name}: got {values[place].item()}, expected {expected}{where}; {advice}")
