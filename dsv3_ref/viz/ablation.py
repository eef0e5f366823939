"""Tables and figures from results of `dsv3 ablate`; the runs of a variant differ by their seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv3_ref.viz.style import COLORS, GRAY, LINE_STYLES

RESULTS_DIR = Path(__file__).parents[2] / "notebooks" / "results"  # in a checkout

Key = str | Callable[[dict], Any]


def load_ablation(name: str) -> dict:
    """Read the committed results of an ablation."""
    return load_result(f"ablate_{name}")


def load_result(name: str) -> dict:
    """Read a JSON file of notebooks/results; `name` has no suffix."""
    return json.loads((RESULTS_DIR / f"{name}.json").read_text(encoding="utf-8"))


def read_key(record: dict, key: Key) -> Any:
    """Return a value of a run or of a point of its curve; a callable `key` computes it."""
    return key(record) if callable(key) else record[key]


def values_by_variant(result: dict, key: Key = "val_loss") -> dict[str, np.ndarray]:
    """Return the values of each variant in the order of the seeds; `key` as in `read_key`."""
    runs = sorted(result["runs"], key=lambda run: run["seed"])
    values: dict[str, list] = {name: [] for name in result["variants"]}
    for run in runs:
        values[run["variant"]].append(read_key(run, key))
    return {name: np.array(x, dtype=float) for name, x in values.items()}


def mean_std(value_n: np.ndarray, digits: int = 3) -> str:
    """Return mean and standard deviation over seeds: `2.253 ± 0.004`."""
    return f"{np.mean(value_n):.{digits}f} ± {np.std(value_n, ddof=1):.{digits}f}"


def print_table(result: dict, against: str, key: Key = "val_loss") -> None:
    """Print a line per variant: its value, and its difference from `against` on the same seeds."""
    values = values_by_variant(result, key)
    width = max(map(len, values))
    for name, value_n in values.items():
        line = f"{name:{width}}  {mean_std(value_n)}"
        if name != against:
            line += f"   {mean_std(value_n - values[against])} against {against}"
        print(line)


def plot_dots(ax: Axes, values: dict[str, np.ndarray], title: str, xlabel: str) -> None:
    """Draw a row per variant, the first on top: a dot per seed, a bar at the mean.

    Gray lines connect the dots of a seed.
    """
    ax.plot(np.array(list(values.values())), range(len(values)), color=GRAY, alpha=0.4, lw=0.8)
    for y, (value_n, color) in enumerate(zip(values.values(), COLORS)):
        ax.plot(value_n, [y] * len(value_n), "o", color=color, alpha=0.6, ms=5)
        ax.plot(value_n.mean(), y, "|", color=color, ms=18, mew=2.5)
    ax.set_yticks(range(len(values)), list(values))
    ax.set(title=title, xlabel=xlabel, ylim=(len(values) - 0.5, -0.5))
    ax.grid(axis="x", color=GRAY, alpha=0.25, linewidth=0.6)
    ax.locator_params(axis="x", nbins=5)


def plot_curves(ax: Axes, result: dict, key: Key, title: str, ylabel: str) -> None:
    """Draw a curve per variant over steps: the mean, and a band from lowest to highest seed.

    `key` is applied to the points of the curves, as in `read_key`.
    """
    for i, name in enumerate(result["variants"]):
        curves = [r["curve"] for r in result["runs"] if r["variant"] == name]
        step_n = [point["step"] for point in curves[0]]
        rows = [[read_key(point, key) for point in curve] for curve in curves]
        value_rn = np.array(rows, dtype=float)
        if np.isnan(value_rn).all():
            continue
        ax.plot(step_n, value_rn.mean(0), ls=LINE_STYLES[i], color=COLORS[i], label=name)
        ax.fill_between(step_n, value_rn.min(0), value_rn.max(0), color=COLORS[i], alpha=0.15)
    ax.set(title=title, xlabel="step", ylabel=ylabel)
