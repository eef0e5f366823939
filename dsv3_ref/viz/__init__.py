"""Figures, widgets and exercises for chapters and reports."""

from dsv3_ref.viz.exercise import attempt, checker
from dsv3_ref.viz.style import BLUE, COLORS, GRAY, GREEN, ORANGE, PINK, figure, play, show

__all__ = [
    "BLUE", "COLORS", "GREEN", "GRAY", "ORANGE", "PINK", "attempt", "checker", "figure", "play",
    "show",
]  # fmt: skip
