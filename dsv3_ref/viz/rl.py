"""Plots of reinforcement learning: what is rewarded, and what to watch meanwhile."""

import numpy as np

from dsv3_ref.viz.style import COLORS, GRAY, figure
from dsv3_ref.viz.training import LINES, draw_smoothed, finish, has, series

WATCHED = {  # key of a row → (title, unit)
    "kl_k1": ("KL to the first model: mean log π/π_ref", "nats a token"),
    "kl": ("The same, estimated by k₃", "nats a token"),
    "entropy": ("Entropy of the next token", "nats"),
    "length": ("Length of an answer", "tokens"),
    "clip_ratio": ("Tokens that the clip silenced", "share"),
    "frac_reward_zero_std": ("Groups whose answers agree", "share"),
    "sampling_logp_difference": ("|log π| as written − as learnt from", "nats"),
}


def rewards(rows: list[dict], before: dict | None = None):
    """Mean reward of each domain's answers, and of the likeliest answers to held-out problems."""
    names = sorted({name for row in rows for name in row.get("reward_by") or {}})
    if not names:
        raise ValueError("no row has 'reward_by'")
    fig, ax = figure(height=3.2)
    for i, name in enumerate(names):
        seen = [(r["step"], r["reward_by"][name]) for r in rows if name in (r["reward_by"] or {})]
        color, line = COLORS[i % len(COLORS)], LINES[i % len(LINES)]
        draw_smoothed(ax, *map(np.array, zip(*seen)), name, color, line)
        held = [(0, before[name])] if name in (before or {}) else []
        held += [
            (r["step"], r["held_out"][name]) for r in rows if name in (r.get("held_out") or {})
        ]
        if held:
            at, value = zip(*((step, h["greedy"]) for step, h in held))
            ax.plot(at, value, "D", color=color, markersize=5, zorder=3)
    ax.set_ylim(-0.02, 1.02)
    finish(ax, "Reward; diamonds: held-out problems, likeliest answer", "mean reward", legend=True)
    return fig


def watched(rows: list[dict]):
    """KL, entropy, length and the like, those that the rows have, a panel each."""
    keys = [key for key in WATCHED if has(rows, key)]
    if not keys:
        raise ValueError("no row has any of " + ", ".join(WATCHED))
    n = -(-len(keys) // 2)
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
