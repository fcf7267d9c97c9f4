"""Axes: data to pixels, with ticks a reader would choose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

ZERO_ROW = 20.0
"""Height of the row of zeros below a log axis, in px."""
MAX_DECADES = 12
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A mapping of data to pixels with ticks. On a log axis, values <= 0 lie on a separate row, "0"."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: float | None = None
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        if self.log:
            if value <= 0 and self.zero is not None:
                return self.zero
            value = math.log10(max(value, 10.0**self.low))
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten that cover the range, at most ``most + 1``.

    >>> nice_ticks(0.0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    size = max(abs(low), abs(high))
    if not high - low > max(1e-9 * size, 1e-100):
        pad = size / 2 if size > 1e-100 else 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A short label: 0.05, 2.5, 1 500, 2e-05 as 2·10⁻⁵.

    >>> tick_label(2e-05), tick_label(1500.0), tick_label(-0.5)
    ('2·10⁻⁵', '1500', '−0.5')
    """
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        digits, _, power = f"{size:.2e}".partition("e")
        mantissa = f"{float(digits):g}"
        text = f"10{_superscript(power)}" if mantissa == "1" else f"{mantissa}·10{_superscript(power)}"
    else:
        text = f"{size:.10g}"
    return f"−{text}" if value < 0 else text


def _superscript(power: str) -> str:
    return str(int(power)).translate(SUPERSCRIPTS)


def linear_axis(values: Iterable[float], start: float, end: float, most: int = 5) -> Axis:
    """An axis whose ends are ticks."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    ticks = nice_ticks(min(finite), max(finite), most)
    return Axis(ticks[0], ticks[-1], start, end, ticks=[(tick, tick_label(tick)) for tick in ticks])


def step_axis(values: Iterable[float], start: float, end: float, most: int) -> Axis:
    """An axis of steps: it ends with the data, its ticks lie inside."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    low = 0.0 if 0 < low <= 0.2 * high else low
    high = high if high > low else low + 1
    ticks = [tick for tick in nice_ticks(low, high, most) if low <= tick <= high and tick == int(tick)]
    return Axis(low, high, start, end, ticks=[(tick, tick_label(tick)) for tick in ticks])


def log_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """An axis of powers of ten, with a separate row for zero if there is one (``start`` is the bottom)."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0] or [1.0]
    zero = start if any(value <= 0 for value in finite) else None
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    low = max(math.floor(math.log10(min(positive)) + 1e-9), high - MAX_DECADES)
    low = low if low < high else low - 1
    stride = math.ceil((high - low) / 5)
    ticks = [(10.0**power, f"10{_superscript(str(power))}") for power in range(high, low - 1, -stride)]
    bottom = start if zero is None else start - ZERO_ROW
    return Axis(low, high, bottom, end, True, zero, ticks + ([(0.0, "0")] if zero is not None else []))
