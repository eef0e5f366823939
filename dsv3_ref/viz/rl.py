"""Plots of reinforcement learning: rewards, and the metrics that show a run going wrong."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_ref.config import ceil_div
from dsv3_ref.viz.style import COLORS, GRAY, LINE_STYLES, figure, plain_label
from dsv3_ref.viz.training import draw_smoothed, label_axes, has, series

RL_PANELS = {  # key of a row → (title, y label)
    "kl_k1": ("KL to the reference model: mean log π/π_ref", "nats per token"),
    "kl": ("KL to the reference model, k₃ estimate", "nats per token"),
    "entropy": ("Entropy of the next token", "nats"),
    "length": ("Length of a completion", "tokens"),
    "clip_ratio": ("Tokens whose gradient was clipped", "share"),
    "frac_reward_zero_std": ("Groups with equal rewards", "share"),
    "sampling_logp_difference": ("|log π| difference, sampler − trainer", "nats"),
}


def plot_rewards(rows: list[dict], before: dict[str, dict] | None = None) -> Figure:
    """Plot the mean reward of each task, and of greedy completions of held-out problems.

    before: per task, the held-out measures of the model before the first step.
    """
    before = before or {}
    names = sorted(set().union(*(row.get("reward_by") or {} for row in rows)))
    if not names:
        raise ValueError("no row has 'reward_by'")
    fig, ax = figure(height=3.2)
    for i, name in enumerate(names):
        points = [(r["step"], r["reward_by"][name]) for r in rows if name in (r["reward_by"] or {})]
        color, line = COLORS[i % len(COLORS)], LINE_STYLES[i % len(LINE_STYLES)]
        step_n = np.array([step for step, _ in points])
        rewards = np.array([reward for _, reward in points])
        draw_smoothed(ax, step_n, rewards, plain_label(name), color, line)
        held_out = [(0, before[name])] if name in before else []
        held_out += [
            (r["step"], r["held_out"][name]) for r in rows if name in (r.get("held_out") or {})
        ]
        if held_out:
            steps = [step for step, _ in held_out]
            values = [result["greedy"] for _, result in held_out]
            ax.plot(steps, values, "D", color=color, markersize=5, zorder=3)
    ax.set_ylim(-0.02, 1.02)
    label_axes(ax, "Reward; diamonds: held-out problems, greedy", "mean reward", legend=True)
    return fig


def plot_rl_metrics(rows: list[dict]) -> Figure:
    """Plot KL, entropy, length and other metrics of `RL_PANELS`, a panel per key in the rows."""
    keys = [key for key in RL_PANELS if has(rows, key)]
    if not keys:
        raise ValueError("no row has any of " + ", ".join(RL_PANELS))
    n = ceil_div(len(keys), 2)
    fig, axes = figure(n, 2, 8, 2.2 * n, squeeze=False)
    for ax, key in zip(axes.flat, keys):
        draw_smoothed(ax, *series(rows, key), "", COLORS[0])
        label_axes(ax, *RL_PANELS[key])
    for ax in axes.flat[len(keys) :]:
        ax.set_visible(False)
    for ax in axes.flat:
        ax.title.set_size(10)
        ax.tick_params(colors=GRAY)
    return fig
