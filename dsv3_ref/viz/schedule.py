"""A pipeline schedule as a picture: time to the right, a row per rank."""

import math
from collections.abc import Collection, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_ref.dualpipe import Span
from dsv3_ref.viz.style import GREEN, ORANGE, figure

COLORS = {"F": "#56A0D8", "B": GREEN, "I": "#CC79A7", "W": ORANGE}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


def draw(
    spans: Sequence[Span], title: str, first: Collection[int] = (), width: float = 10.0,
    until: float = math.inf,
) -> Figure:  # fmt: skip
    """Draw a timeline of `simulate`; a pair of actions shares its rank's row.

    Micro-batches in `first` are pale, and actions that begin at `until` or later almost invisible.
    """
    ranks = 1 + max(span.rank for span in spans)
    end = max(span.end for span in spans)
    fig, ax = figure(1, 1, width, 0.9 + 0.3 * ranks)
    small = 0.42 * width * 72 / end  # points that a unit of time has for its number
    for span in spans:
        height = 0.9 / len(span.step)
        for i, op in enumerate(span.step):
            corner = span.start, span.rank - 0.45 + i * height
            pale = (0.5 if op.microbatch in first else 1.0) * (1 if span.start < until else 0.12)
            ax.add_patch(Rectangle(corner, span.end - span.start, height, facecolor=COLORS[op.kind],
                                   alpha=pale, edgecolor="white", lw=0.6))  # fmt: skip
            if small > 3 and span.start < until:
                ax.text(corner[0] + (span.end - span.start) / 2, corner[1] + height / 2,
                        str(op.microbatch), ha="center", va="center", fontsize=min(8, small, 15 * height))  # fmt: skip
    if until < end:
        ax.axvline(until, color="black", lw=1)
    ax.set(xlim=(0, end), ylim=(ranks - 0.5, -0.5), xlabel="time", ylabel="rank", title=title)
    ax.set_yticks(range(ranks))
    drawn = set().union(*({op.kind for op in span.step} for span in spans))
    kinds = [kind for kind in COLORS if kind in drawn]
    handles = [Patch(color=COLORS[k], label=NAMES[k]) for k in kinds]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.42 / (0.9 + 0.3 * ranks)
              * 2), ncols=len(kinds))  # fmt: skip
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return fig
