"""Words: numbers and lists as a reader wants them."""

from __future__ import annotations

from collections.abc import Sequence


def decimal(value: float, places: int = 2) -> str:
    """A number with a real minus sign and no negative zero.

    >>> decimal(-0.444), decimal(-0.001)
    ('−0.44', '0.00')
    """
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign."""
    text = decimal(value)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def listing(names: Sequence[str], join: str = "and") -> str:
    """
    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    return f" {join} ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "none"


def counted(number: int, thing: str, plural: str = "") -> str:
    """A count in words up to ten, with its noun."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[number] if number < len(words) else number} {thing if number == 1 else plural or thing + 's'}"


def duration(seconds: float) -> str:
    """
    >>> duration(62.4), duration(3.21), duration(7300)
    ('1 min 2 s', '3.2 s', '2 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
