"""The timeline of a pipeline schedule: time to the right, a row per rank; a figure and a page."""

import math
from collections.abc import Collection, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_ref.dualpipe import Span
from dsv3_ref.viz.component import document
from dsv3_ref.viz.style import GREEN, ORANGE, figure

ACTION_COLORS = {"F": "#56A0D8", "B": GREEN, "I": "#CC79A7", "W": ORANGE}
ACTION_NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


def draw(
    spans: Sequence[Span], title: str, first: Collection[int] = (), width: float = 10.0,
    until: float = math.inf,
) -> Figure:  # fmt: skip
    """Draw the timeline of `simulate`; two overlapped actions share the row of their rank.

    first: micro-batches to draw pale. until: time from which on actions are nearly invisible.
    """
    ranks = 1 + max(span.rank for span in spans)
    end = max(span.end for span in spans)
    fig, ax = figure(1, 1, width, 0.9 + 0.3 * ranks)
    unit_pt = 0.42 * width * 72 / end  # points per unit of time, for the labels
    for span in spans:
        height = 0.9 / len(span.step)
        duration = span.end - span.start
        for i, op in enumerate(span.step):
            left, top = span.start, span.rank - 0.45 + i * height
            alpha = (0.5 if op.microbatch in first else 1.0) * (1 if span.start < until else 0.12)
            ax.add_patch(Rectangle((left, top), duration, height, facecolor=ACTION_COLORS[op.kind],
                                   alpha=alpha, edgecolor="white", lw=0.6))  # fmt: skip
            if unit_pt > 3 and span.start < until:
                ax.text(left + duration / 2, top + height / 2, str(op.microbatch), ha="center",
                        va="center", fontsize=min(8, unit_pt, 15 * height))  # fmt: skip
    if until < end:
        ax.axvline(until, color="black", lw=1)
    ax.set(xlim=(0, end), ylim=(ranks - 0.5, -0.5), xlabel="time", ylabel="rank", title=title)
    ax.set_yticks(range(ranks))
    kinds_drawn = set().union(*({op.kind for op in span.step} for span in spans))
    kinds = [kind for kind in ACTION_COLORS if kind in kinds_drawn]
    handles = [Patch(color=ACTION_COLORS[k], label=ACTION_NAMES[k]) for k in kinds]
    below = -0.42 / (0.9 + 0.3 * ranks) * 2  # of the axes, in their heights
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(kinds))
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return fig


def schedule_page() -> str:
    """Return a page that plays every schedule and lets its reader change one, as HTML."""
    modules = "dom.js", "schedule.js", "pipeline.js"
    return document("A pipeline, step by step", "pipeline", modules)
