"""Figures and widgets, for chapters and reports alike."""

from dsv3_ref.viz.style import BLUE, COLOURS, GREEN, GREY, ORANGE, PINK, figure, play, show

__all__ = ["BLUE", "COLOURS", "GREEN", "GREY", "ORANGE", "PINK", "figure", "play", "show"]
