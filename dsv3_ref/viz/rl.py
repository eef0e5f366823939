"""Plots of reinforcement learning: what is rewarded, and what to watch meanwhile."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_ref.config import ceil_div
from dsv3_ref.viz.style import COLORS, GRAY, figure
from dsv3_ref.viz.training import LINES, draw_smoothed, finish, has, series

WATCHED = {  # key of a row → (title, unit)
    "kl_k1": ("KL to the first model: mean log π/π_ref", "nats per token"),
    "kl": ("The same, estimated by k₃", "nats per token"),
    "entropy": ("Entropy of the next token", "nats"),
    "length": ("Length of an answer", "tokens"),
    "clip_ratio": ("Tokens that the clip silenced", "share"),
    "frac_reward_zero_std": ("Groups whose answers agree", "share"),
    "sampling_logp_difference": ("|log π| as written − as learnt from", "nats"),
}


def rewards(rows: list[dict], before: dict | None = None) -> Figure:
    """Plot mean rewards of each task, and those of greedy answers to held-out problems."""
    names = sorted(set().union(*(row.get("reward_by") or {} for row in rows)))
    if not names:
        raise ValueError("no row has 'reward_by'")
    fig, ax = figure(height=3.2)
    for i, name in enumerate(names):
        points = [(r["step"], r["reward_by"][name]) for r in rows if name in (r["reward_by"] or {})]
        color, line = COLORS[i % len(COLORS)], LINES[i % len(LINES)]
        draw_smoothed(ax, *map(np.array, zip(*points)), name, color, line)
        held_out = [(0, before[name])] if name in (before or {}) else []
        held_out += [
            (r["step"], r["held_out"][name]) for r in rows if name in (r.get("held_out") or {})
        ]
        if held_out:
            steps = [step for step, _ in held_out]
            values = [result["greedy"] for _, result in held_out]
            ax.plot(steps, values, "D", color=color, markersize=5, zorder=3)
    ax.set_ylim(-0.02, 1.02)
    finish(ax, "Reward; diamonds: held-out problems, likeliest answer", "mean reward", legend=True)
    return fig


def watched(rows: list[dict]) -> Figure:
    """Plot KL, entropy, length and other metrics that the rows have, a panel each."""
    keys = [key for key in WATCHED if has(rows, key)]
    if not keys:
        raise ValueError("no row has any of " + ", ".join(WATCHED))
    n = ceil_div(len(keys), 2)
    fig, axes = figure(n, 2, 8, 2.2 * n, squeeze=False)
    for ax, key in zip(axes.flat, keys):
        draw_smoothed(ax, *series(rows, key), "", COLORS[0])
        finish(ax, *WATCHED[key])
    for ax in axes.flat[len(keys) :]:
        ax.set_visible(False)
    for ax in axes.flat:
        ax.title.set_size(10)
        ax.tick_params(colors=GRAY)
    return fig
