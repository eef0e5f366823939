"""A figure of speculative decoding: accepted and rejected drafts, token by token."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_ref.config import ceil_div
from dsv3_ref.viz.style import GREEN, figure

ACCEPTED, REJECTED = "#BFE5D6", "#F8D9B8"  # pale green, underlined; pale orange, struck through


def draw_trace(
    rounds: Sequence[tuple[list[str], int, str | None]], width: int = 50, title: str = ""
) -> Figure:
    """Draw text in lines of `width` tokens: accepted drafts are marked, rejected ones stand below.

    rounds: (texts of the tokens, how many of them were drafts, the rejected draft or None).
    """
    cells: list[tuple[str, bool, str | None]] = []
    for texts, num_accepted, rejected in rounds:
        cells += [(text, i < num_accepted, None) for i, text in enumerate(texts[:-1])]
        cells.append((texts[-1], len(texts) <= num_accepted, rejected))
    lines = ceil_div(len(cells), width)
    fig, ax = figure(1, 1, 9.5, 0.62 * lines + 0.9)
    for i, (text, is_accepted, rejected) in enumerate(cells):
        x, y = i % width, 2.4 * (i // width)
        if is_accepted:
            ax.add_patch(Rectangle((x, y - 0.5), 1, 1, facecolor=ACCEPTED))
            ax.plot([x + 0.1, x + 0.9], [y + 0.44] * 2, color=GREEN, lw=1.6)
        write_token(ax, x, y, text)
        if rejected is not None:
            ax.add_patch(Rectangle((x, y + 0.5), 1, 1, facecolor=REJECTED))
            ax.plot([x + 0.1, x + 0.9], [y + 1] * 2, color="#B35900", lw=0.9)
            write_token(ax, x, y + 1, rejected)
    ax.set(xlim=(0, width), ylim=(2.4 * lines - 0.7, -0.7), title=title)
    ax.axis("off")
    handles = [
        Patch(color=ACCEPTED, label="draft, accepted"),
        Patch(color=REJECTED, label="rejected"),
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8)
    return fig


def write_token(ax: Axes, left: float, middle: float, text: str) -> None:
    """Write a token into its cell; spaces and line breaks become visible symbols."""
    visible = {" ": "·", "\n": "⏎"}.get(text, text)
    ax.text(left + 0.5, middle, visible, ha="center", va="center", fontsize=8, family="monospace",
            parse_math=False)  # fmt: skip
