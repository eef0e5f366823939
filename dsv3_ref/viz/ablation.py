"""What `dsv3 ablate` found, as numbers and drawn; the runs of a variant differ by their seed."""

import json
from pathlib import Path

import numpy as np

from dsv3_ref.viz.style import COLORS, GRAY

RESULTS_DIR = Path(__file__).parents[2] / "notebooks" / "results"  # of a checkout
LINES = ["-", "--", "-.", ":", (0, (8, 2, 1, 2)), (0, (1, 3))]


def load_ablation(name: str) -> dict:
    """The file of an ablation that this checkout holds."""
    return load_result(f"ablate_{name}")


def load_result(name: str) -> dict:
    """A small file of results that this checkout holds."""
    return json.loads((RESULTS_DIR / f"{name}.json").read_text())


def values_by_variant(result: dict, key="val_loss") -> dict[str, np.ndarray]:
    """Variant → a value of each seed, by seed; `key` names it or makes it from a run."""
    read = key if callable(key) else lambda run: run[key]
    runs = sorted(result["runs"], key=lambda run: run["seed"])
    found = {v: [read(r) for r in runs if r["variant"] == v] for v in result["variants"]}
    return {v: np.array(x, dtype=float) for v, x in found.items()}


def mean_std(value_n, digits: int = 3) -> str:
    """`2.253 ± 0.004`: mean and standard deviation over seeds."""
    return f"{np.mean(value_n):.{digits}f} ± {np.std(value_n, ddof=1):.{digits}f}"


def print_table(result: dict, against: str, key="val_loss") -> None:
    """Print a line a variant: its value, and its differences to another on the same seeds."""
    found = values_by_variant(result, key)
    width = max(map(len, found))
    for name, value_n in found.items():
        gap = (
            "" if name == against else f"   {mean_std(value_n - found[against])} against {against}"
        )
        print(f"{name:{width}}  {mean_std(value_n)}{gap}")


def plot_dots(ax, found: dict[str, np.ndarray], title: str, xlabel: str) -> None:
    """A line a variant, first on top: a dot a seed, a bar at their mean; gray joins a seed's."""
    ax.plot(np.array(list(found.values())), range(len(found)), color=GRAY, alpha=0.4, lw=0.8)
    for y, (value_n, color) in enumerate(zip(found.values(), COLORS)):
        ax.plot(value_n, [y] * len(value_n), "o", color=color, alpha=0.6, ms=5)
        ax.plot(value_n.mean(), y, "|", color=color, ms=18, mew=2.5)
    ax.set_yticks(range(len(found)), list(found))
    ax.set(title=title, xlabel=xlabel, ylim=(len(found) - 0.5, -0.5))
    ax.grid(axis="x", color=GRAY, alpha=0.25, linewidth=0.6)
    ax.locator_params(axis="x", nbins=5)


def plot_curves(ax, result: dict, key, title: str, ylabel: str) -> None:
    """A curve a variant over steps: the mean, and a band from the lowest to the highest seed.

    `key` names a number of a point of the curves, or makes it from a point.
    """
    read = key if callable(key) else lambda point: point[key]
    for i, name in enumerate(result["variants"]):
        curves = [r["curve"] for r in result["runs"] if r["variant"] == name]
        step_n = [point["step"] for point in curves[0]]
        value_rn = np.array([[read(point) for point in curve] for curve in curves], dtype=float)
        if np.isnan(value_rn).all():
            continue
        ax.plot(step_n, value_rn.mean(0), ls=LINES[i], color=COLORS[i], label=name)
        ax.fill_between(step_n, value_rn.min(0), value_rn.max(0), color=COLORS[i], alpha=0.15)
    ax.set(title=title, xlabel="step", ylabel=ylabel)
