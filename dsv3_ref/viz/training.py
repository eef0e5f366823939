"""Plots of a training run: each takes the rows of its `metrics.jsonl` and returns a figure.

Rows that lack a key, or hold null there, are left out of the plot of that key. A plot of a key
that no row has raises `ValueError`; check `has(rows, key)` first. Axes of arrays here: `n` rows,
`l` MoE layers, `e` experts.
"""

import gzip
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from dsv3_ref.config import ceil_div
from dsv3_ref.viz.style import BLUE, COLORS, GRAY, LINE_STYLES, ORANGE, figure

LOAD_COLORS = LinearSegmentedColormap.from_list("uneven", [BLUE, "#FFFFFF", "#D55E00"])
MAX_ROW = 1 << 24  # bytes of a row of loads; those of V3 have 300 KB
LOAD_EXPANSION = 200  # of a compressed file; rows of numbers shrink to a tenth
MIN_LOAD_BYTES = 1 << 28  # bytes that any file may expand to
MAX_PANELS = 64  # layers; V3 has 59 with experts
MAX_LINES = 8  # more lines than this cannot be told apart

# ── Rows ──


def read_metrics(path: Path | str) -> list[dict]:
    """Return the rows of a `metrics.jsonl`, sorted by step; of a repeated step the last row.

    The last line of a running or killed run may be half written; it is skipped silently. An invalid
    line elsewhere is skipped with a warning. Loads of many experts come from the folder
    `expert_load` beside the file.
    """
    lines = Path(path).read_text(errors="replace", encoding="utf-8").splitlines()
    rows = {}
    for number, line in enumerate(lines, start=1):
        if (row := as_row(line)) is not None:
            rows[row["step"]] = row
        elif line.strip() and number < len(lines):
            warnings.warn(
                f"{path}, line {number} is not a metrics row; it is skipped", stacklevel=2
            )
    for row in read_expert_load(Path(path).parent / "expert_load"):
        if row["step"] in rows:
            rows[row["step"]] |= row
    return [rows[step] for step in sorted(rows)]


def read_expert_load(folder: Path) -> Iterator[dict]:
    """Yield the rows of the gzipped files of a folder, in the order in which they were written.

    A file may end in the middle of a row, if the run was killed. One that expands too much, or has
    a longer row than any run writes, is read up to there: it may come from a stranger.
    """
    for path in filter(Path.is_file, sorted(folder.glob("step_*.jsonl.gz"))):
        left = max(MIN_LOAD_BYTES, LOAD_EXPANSION * path.stat().st_size)
        with suppress(EOFError, OSError, zlib.error), gzip.GzipFile(path) as file:
            while left > 0 and (line := file.readline(MAX_ROW)):
                left -= len(line) if line.endswith(b"\n") else left
                if (row := as_row(line)) is not None:
                    yield row


def as_row(line: str | bytes) -> dict | None:
    """Parse a line of `metrics.jsonl`; return None if it is not a row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def has(rows: list[dict], key: str) -> bool:
    """Return whether any row has a value under `key`."""
    return any(filled(row.get(key)) for row in rows)


def filled(value: Any) -> bool:
    """Return whether a value holds a number; null, [] and [[], []] do not."""
    return any(map(filled, value)) if isinstance(value, list) else value is not None


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps (n,) and values (n, …) of the rows that have `key`, as float arrays."""
    if not has(rows, key):
        raise ValueError(f"no row has {key!r}")
    with_key = [row for row in rows if filled(row.get(key))]
    steps = np.array([row["step"] for row in with_key], dtype=float)
    return steps, np.array([row[key] for row in with_key], dtype=float)


def smooth(value_n: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Return the running mean over ± n·share rows, skipping values that are not finite.

    Near the start the window narrows on both sides, so that a steep beginning is not delayed.
    """
    n = len(value_n)
    known = np.isfinite(value_n)
    total = np.append(0.0, np.cumsum(np.where(known, value_n, 0.0)))
    count = np.append(0, np.cumsum(known))
    i = np.arange(n)
    reach = np.minimum(round(n * share), i)
    low, high = i - reach, np.minimum(i + reach, n - 1) + 1
    num_known = count[high] - count[low]
    mean_n = (total[high] - total[low]) / np.maximum(num_known, 1)
    return np.where(num_known > 0, mean_n, np.nan)


def last(rows: list[dict], key: str) -> float:
    """Return the last value of the running mean of a noisy curve."""
    return float(smooth(series(rows, key)[1])[-1])


# ── Parts of plots ──


def draw_smoothed(
    ax: Axes, step_n: np.ndarray, value_n: np.ndarray, label: str, color: str, line: str = "-"
) -> None:
    """Draw every value in a pale color and the running mean on top."""
    marker = "o" if len(step_n) == 1 else None  # a line needs two points
    many = len(step_n) > 3000
    ax.plot(step_n, value_n, color=color, alpha=0.3, linewidth=0.8, rasterized=many)
    ax.plot(step_n, smooth(value_n), line, color=color, label=label, marker=marker, rasterized=many)


def label_axes(ax: Axes, title: str, ylabel: str, legend: bool = False) -> None:
    """Add a title, axis labels and a light grid; used by every plot against steps."""
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    ax.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.6)
    ax.locator_params(axis="x", integer=True)
    if legend:
        ax.legend(loc="best", ncols=2)


def clip_view(ax: Axes, value_n: np.ndarray) -> None:
    """Fit the y axis to the curve; only the highest 0.5 % of the values may lie outside."""
    value_n = value_n[np.isfinite(value_n)]
    if len(value_n) < 50:
        return
    low, high = value_n.min(), np.quantile(value_n, 0.995)
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def peak_and_end(value_n: np.ndarray) -> tuple[float, float]:
    """Return the highest and the last value of the running mean."""
    mean = smooth(value_n)
    return float(np.nanmax(mean)), float(mean[-1])


def average_rows(value_ne: np.ndarray, max_bins: int = 200) -> np.ndarray:
    """Average consecutive rows into at most `max_bins` rows, as many as a screen resolves."""
    parts = np.array_split(value_ne, min(max_bins, len(value_ne)))
    return np.stack([part.mean(0) for part in parts])


def layer_names(count: int, names: Sequence[str] | None = None) -> list[str]:
    """Return `count` names of layers: the given ones, then `MoE layer 3` and so on."""
    names = list(names or [])[:count]
    return names + [f"MoE layer {i}" for i in range(len(names), count)]


# ── Loss ──


def plot_loss(rows: list[dict]) -> Figure:
    """Plot training, validation and MTP loss against steps in nats per token, raw and smoothed."""
    fig, ax = figure(height=3.6)
    step, loss = series(rows, "loss")
    draw_smoothed(ax, step, loss, "training", BLUE)
    title = f"Loss at step {step[-1]:,.0f}: training {last(rows, 'loss'):.3f}"
    curves = [loss]
    if has(rows, "val_loss"):
        val_step, value = series(rows, "val_loss")
        ax.plot(val_step, value, "D", color="#D55E00", markersize=4, label="validation", zorder=3)
        title += f", validation {value[-1]:.3f}"
        curves.append(value)
    if has(rows, "val_loss_ema"):
        val_step, value = series(rows, "val_loss_ema")
        ax.plot(val_step, value, "o", mfc="none", color=GRAY, label="validation, averaged weights")
        curves.append(value)
    if has(rows, "mtp_loss"):
        step, mtp = series(rows, "mtp_loss")
        for k, color in zip(range(mtp.shape[1]), [COLORS[2], COLORS[3], GRAY] * mtp.shape[1]):
            draw_smoothed(ax, step, mtp[:, k], f"MTP, depth {k + 1}", color, LINE_STYLES[1 + k % 3])
            curves.append(mtp[:, k])
    clip_view(ax, np.concatenate(curves))
    label_axes(ax, title, "nats per token", legend=True)
    return fig


# ── Balance ──


def plot_expert_load(rows: list[dict], layer: int = 0, name: str = "") -> Figure:
    """Plot the load of every expert of one MoE layer: its share of the tokens times E, 1 = even.

    Rows are taken to be evenly spaced in steps. The colors are on a log scale from ¼ to 4.
    """
    step, load_nle = series(rows, "expert_load")
    even_ne = load_nle[:, layer] * load_nle.shape[2]  # × E
    fig, ax = figure(height=2.9)
    half = (step[-1] - step[0]) / max(1, len(step) - 1) / 2 or 0.5
    image = ax.imshow(
        np.maximum(average_rows(even_ne), 1e-3).T,
        cmap=LOAD_COLORS, norm=LogNorm(0.25, 4), aspect="auto", origin="lower",
        interpolation="none",
        extent=(step[0] - half, step[-1] + half, -0.5, even_ne.shape[1] - 0.5),
    )  # fmt: skip
    bar = fig.colorbar(image, ax=ax, extend="both", ticks=[0.25, 0.5, 1, 2, 4])
    bar.ax.set_yticklabels(["¼", "½", "even", "2×", "4×"])
    bar.minorticks_off()
    peak, now = peak_and_end(even_ne.max(1))
    name = name or layer_names(layer + 1)[layer]
    title = f"{name}: the busiest expert gets up to {peak:.2f}× its share, {now:.2f}× at the end"
    label_axes(ax, title, "expert")
    ax.grid(False)
    ax.locator_params(axis="y", integer=True)
    return fig


def plot_expert_bias(rows: list[dict], names: Sequence[str] | None = None) -> Figure:
    """Plot the gate bias of every expert against steps, a panel per MoE layer."""
    step, bias_nle = series(rows, "expert_bias")
    layers, experts = min(MAX_PANELS, bias_nle.shape[1]), bias_nle.shape[2]
    cols = min(2, layers)
    n_rows = ceil_div(layers, cols)
    fig, axes = figure(n_rows, cols, height=2.6 * n_rows, squeeze=False, sharey=True)
    shown = np.unique(np.linspace(0, len(step) - 1, 600).astype(int))
    for i, ax in enumerate(axes.flat):
        if i >= layers:
            ax.remove()
            continue
        draw_biases(ax, step[shown], bias_nle[shown, i], rasterized=experts > 32)
        ends = f"{bias_nle[-1, i].min():+.3f} to {bias_nle[-1, i].max():+.3f}".replace("-", "−")
        title = f"{layer_names(layers, names)[i]}: biases {ends}"
        label_axes(ax, title, "" if i % cols else "gate bias")
    low, high = np.nanmin(bias_nle), np.nanmax(bias_nle)
    span = max(high - low, 1e-6)
    axes[0, 0].set_ylim(low - 0.05 * span, high + 0.3 * span)  # room for the legend above
    return fig


def draw_biases(ax: Axes, step_n: np.ndarray, bias_ne: np.ndarray, rasterized: bool) -> None:
    """Draw a thin line per expert, and a thick, labeled one for each of the two extremes."""
    marker = "o" if len(step_n) == 1 else None
    ax.plot(step_n, bias_ne, color=GRAY, alpha=0.5, linewidth=0.8, rasterized=rasterized)
    extremes = [(int(bias_ne[-1].argmax()), BLUE, "-"), (int(bias_ne[-1].argmin()), ORANGE, "--")]
    for e, color, line in extremes:
        ax.plot(step_n, bias_ne[:, e], line, color=color, marker=marker, label=f"expert {e}")
    ax.legend(
        loc="upper left",
        ncols=2,
        fontsize=9,
        handlelength=1.4,
        columnspacing=0.9,
        borderaxespad=0.2,
    )


def plot_max_vio(rows: list[dict], names: Sequence[str] | None = None) -> Figure:
    """Plot the running mean of MaxVio (busiest load / mean load − 1) of every MoE layer."""
    step, vio_nl = series(rows, "max_vio")
    fig, ax = figure()
    if vio_nl.shape[1] > MAX_LINES:
        low, middle, high = (smooth(v) for v in np.nanquantile(vio_nl, [0, 0.5, 1], axis=1))
        ax.fill_between(step, low, high, color=BLUE, alpha=0.2, label="all layers")
        ax.plot(step, middle, color=BLUE, label="median layer")
    else:
        for i, name in enumerate(layer_names(vio_nl.shape[1], names)):
            line = LINE_STYLES[i % len(LINE_STYLES)]
            marker = "o" if len(step) == 1 else None
            color = COLORS[i % len(COLORS)]
            ax.plot(step, smooth(vio_nl[:, i]), line, color=color, label=name, marker=marker)
    ax.set_ylim(bottom=0)
    peak, now = peak_and_end(vio_nl.mean(1))
    title = f"MaxVio, mean over layers: up to {peak:.2f}, {now:.2f} at the end (0 = even)"
    label_axes(ax, title, "max load / mean load − 1", legend=True)
    return fig


# ── Schedule and speed ──

SCHEDULE_PANELS = {
    "lr": ("Learning rate", "learning rate"),
    "batch_size": ("Batch", "sequences per step"),
    "bias_update_rate": ("Bias speed γ", "γ"),
    "mtp_weight": ("MTP weight λ", "λ"),
}


def plot_schedule(rows: list[dict]) -> Figure:
    """Plot learning rate, batch, γ and λ against steps, a panel per key that the rows have."""
    keys = [key for key in SCHEDULE_PANELS if has(rows, key)]
    if not keys:
        raise ValueError(f"no row has any of {', '.join(SCHEDULE_PANELS)}")
    cols = min(2, len(keys))
    n_rows = ceil_div(len(keys), cols)
    fig, axes = figure(n_rows, cols, height=2.4 * n_rows, squeeze=False)
    for ax, key in zip(axes.flat, keys):
        step, value = series(rows, key)
        title, ylabel = SCHEDULE_PANELS[key]
        ax.plot(step, value, color=BLUE, marker="o" if len(step) == 1 else None)
        ax.set_ylim(0, max(value.max() * 1.1, 1e-12))
        label_axes(ax, f"{title}: {format_course(value)}", ylabel)
    for ax in axes.flat[len(keys) :]:
        ax.remove()
    return fig


def format_course(value_n: np.ndarray) -> str:
    """Format first, highest and last value: `2.5e-05 → 0.001 → 0.0001`; equal neighbors once."""
    stops = [value_n[0], value_n.max(), value_n[-1]]
    return " → ".join(f"{v:.3g}" for i, v in enumerate(stops) if i == 0 or v != stops[i - 1])


def plot_throughput(rows: list[dict]) -> Figure:
    """Plot the throughput in tokens per second against steps."""
    step, value = series(rows, "tokens_per_s")
    fig, ax = figure(height=2.6)
    draw_smoothed(ax, step, value, "", BLUE)
    ax.set_ylim(0, 1.15 * np.nanmax(value))
    title = f"Throughput: median {np.nanmedian(value):,.0f} tokens per second"
    label_axes(ax, title, "tokens per second")
    return fig


def plot_grad_norm(rows: list[dict]) -> Figure:
    """Plot the gradient norm before clipping against steps, on a log scale."""
    step, value = series(rows, "grad_norm")
    fig, ax = figure(height=2.6)
    draw_smoothed(ax, step, value, "", BLUE)
    spikes = [(row["step"], row["grad_norm"]) for row in rows if row.get("skipped") == "spike"]
    if spikes:
        ax.plot(*zip(*spikes), "x", color=ORANGE, label="skipped")
        ax.legend(loc="best")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    label_axes(ax, f"Gradient norm before clipping: median {np.nanmedian(value):.2g}", "norm")
    return fig


# ── Compression ──


def plot_bits_per_byte(value: dict[str, float], ours: str = "this model") -> Figure:
    """Plot bits per byte of each model on the same text, best on top; `ours` is highlighted."""
    order = sorted(value, key=lambda name: value[name], reverse=True)
    fig, ax = figure(height=0.9 + 0.42 * len(order))
    color = [BLUE if name == ours else "#A9B2BD" for name in order]
    bars = ax.barh(order, [value[name] for name in order], color=color, height=0.65)
    ax.bar_label(bars, fmt="%.3f", padding=4)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == ours else "normal")
    ax.margins(x=0.12)
    best = order[-1]
    ax.set(title=f"Bits per byte on the validation text, lower is better: {best} {value[best]:.2f}",
           xlabel="bits per byte")  # fmt: skip
    return fig
