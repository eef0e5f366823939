"""Figures, widgets and exercises, for chapters and reports alike."""

from dsv3_ref.viz.exercise import attempt, checker
from dsv3_ref.viz.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PINK, figure, play, show

__all__ = [
    "BLUE", "COLOURS", "GREEN", "GREY", "ORANGE", "PINK", "attempt", "checker", "figure", "play",
    "show",
]  # fmt: skip
