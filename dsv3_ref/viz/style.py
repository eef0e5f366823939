"""The look of every figure: a palette for color-blind readers, thin axes; and widgets."""

import sys
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
GRAY = "#6B7280"
COLORS = [BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#D55E00", GRAY]
# used beside color: for prints and for color-blind readers
LINE_STYLES: list[Any] = ["-", "--", "-.", ":", (0, (8, 2, 1, 2)), (0, (1, 3))]
ZERO_WIDTH_SPACE = "\u200b"
RC_PARAMS: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def figure(
    rows: int = 1, cols: int = 1, width: float = 8.0, height: float = 3.2, **kwargs: Any
) -> tuple[Figure, Any]:
    """Call `plt.subplots` with the style of this package; width and height are in inches.

    The style stays set: matplotlib reads line widths, titles and legends only when it draws them.
    """
    plt.rcParams.update(RC_PARAMS)
    return plt.subplots(rows, cols, figsize=(width, height), layout="constrained", **kwargs)


def plain_label(name: str) -> str:
    """Return a name that a user chose, such as that of a file, as a label that stands as it is.

    matplotlib reads $ as the start of a formula, refuses bytes that are not UTF-8, and leaves
    labels that begin with an underscore out of legends.
    """
    label = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f"{ZERO_WIDTH_SPACE}{label}" if label.startswith("_") else label


def in_notebook() -> bool:
    """Return whether this code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def show(fig: Figure) -> None:
    """Display a figure below its cell and close it; a script draws it without showing it."""
    if in_notebook():
        from IPython.display import display

        display(fig)
    else:
        fig.canvas.draw()
    plt.close(fig)


def play(draw: Callable, **controls: Any) -> None:
    """Show controls for `draw(**values)` in a notebook; in a script call it once with defaults.

    Controls are those of `ipywidgets.interact`: (low, high, step), a list of choices, a bool or a
    widget.
    """
    if in_notebook():
        from ipywidgets import interact

        interact(draw, **controls)
    else:
        draw(**{name: default_value(control) for name, control in controls.items()})


def default_value(control: Any) -> Any:
    """Return the initial value that `interact` would choose for a control."""
    if hasattr(control, "value"):
        return control.value
    if isinstance(control, tuple):
        low, high = control[:2]
        return (low + high) // 2 if isinstance(low + high, int) else (low + high) / 2
    return control[0] if isinstance(control, list) else control
