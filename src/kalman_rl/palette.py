"""Colours of every picture and page: eight that stay apart for every kind of colour vision, for light and for dark.

After Okabe and Ito, Color Universal Design (2008); black is a dark grey here, and yellow is darker on paper.
"""

from __future__ import annotations

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#a79a00", "#3b3f46")
"""On paper: blue, orange, green, amber, pink, sky, olive, grey."""
DARK = ("#4ba3dc", "#ee7b30", "#2bbd92", "#e9af3a", "#dc92bb", "#96d0f3", "#f0e442", "#d6d4ce")
"""The same on a dark page."""
INK, MUTED, RULE = "#1f2328", "#5f6670", "#e3ded2"
"""Text, labels and grid lines of pictures, which are on paper."""
