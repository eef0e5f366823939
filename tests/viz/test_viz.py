"""Plots of a run: every plot shows its data, also where rows lack keys."""

import json
import warnings
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dsv3_ref.dualpipe import ActionCosts, schedule, simulate
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.viz import decoding, page, rl, routing, style, training
from dsv3_ref.viz import schedule as timeline
from dsv3_ref.viz.training import read_metrics, series, smooth

LAYERS, EXPERTS = 3, 8


def fake_rows(steps: int, layers: int = LAYERS, experts: int = EXPERTS) -> list[dict]:
    """Return rows of a training run: expert loads drift apart and the biases pull them back."""
    rng = np.random.default_rng(0)
    liked_le, bias_le = rng.normal(0, 0.8, (layers, experts)), np.zeros((layers, experts))
    rows = []
    for step in range(1, steps + 1):
        pull = liked_le * min(1, step / 20) + 10 * bias_le + rng.normal(0, 0.05, bias_le.shape)
        load_le = np.exp(pull) / np.exp(pull).sum(1, keepdims=True)
        bias_le = bias_le + 2e-3 * np.sign(1 / experts - load_le)
        loss = 3 + 5 * np.exp(-step / 30) + rng.normal(0, 0.05)
        due = step % 20 == 0
        rows.append({
            "step": step, "tokens": 4096 * step, "loss": loss, "loss_total": 1.3 * loss,
            "mtp_loss": [loss + 0.5, loss + 0.8], "val_loss": loss + 0.1 if due else None,
            "val_bpb": loss / 3 if due else None, "lr": 1e-3 * min(1, step / 10),
            "grad_norm": rng.lognormal(), "tokens_per_s": 2400.0, "batch_size": 8 + 8 * (step > 20),
            "bias_update_rate": 2e-3, "mtp_weight": 0.3, "seconds": 1.7 * step,
            "expert_load": load_le.tolist(),
            "max_vio": (load_le.max(1) * experts - 1).tolist(), "expert_bias": bias_le.tolist(),
        })  # fmt: skip
    return rows


def rl_rows(steps: int) -> list[dict]:
    """Return rows of a GRPO run with two tasks; some steps lack one, and some keys are null."""
    rng, rows = np.random.default_rng(1), fake_rows(steps)
    for row in rows:
        part = row["step"] / steps
        by = {"sums": 0.2 + 0.6 * part, "writing": 0.3} if row["step"] % 3 else {"sums": part}
        held = {name: {"greedy": part, "sampled": part / 2, "length": 20.0} for name in by}
        del row["expert_bias"]
        row |= {"reward": np.mean(list(by.values())), "reward_by": by, "kl_k1": part, "kl": part,
                "entropy": 1 - part, "length": 20 + rng.normal(), "clip_ratio": None,
                "frac_reward_zero_std": part, "sampling_logp_difference": 1e-7,
                "held_out": held if row["step"] % 20 == 0 else None}  # fmt: skip
    return rows


PLOTS = {
    "loss": training.plot_loss,
    "expert_load": training.plot_expert_load,
    "expert_bias": training.plot_expert_bias,
    "max_vio": training.plot_max_vio,
    "lr": training.plot_schedule,
    "tokens_per_s": training.plot_throughput,
    "grad_norm": training.plot_grad_norm,
}


@pytest.fixture(autouse=True)
def closed():
    """Turn warnings into errors, and close all figures after a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def pixels(fig):
    fig.canvas.draw()
    return np.array(fig.canvas.buffer_rgba())[..., :3]


def ink(fig) -> int:
    """Count the pixels that the data add to a figure's frame, titles and legends."""
    with_data = pixels(fig)
    for ax in fig.axes:
        for artist in [*ax.lines, *ax.collections, *ax.images, *ax.patches]:
            artist.set_visible(False)
    return int((with_data != pixels(fig)).any(-1).sum())


# ── Reading ──


def test_a_half_written_last_line_is_skipped(tmp_path):
    rows, path = fake_rows(3), tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    cut = whole.rindex("\n", 0, -1) + 1
    for end in range(cut, len(whole) - 2, 97):
        path.write_text(whole[:end])
        assert read_metrics(path) == rows[:2]
    path.write_text(whole[:-1])  # only the newline is missing
    assert read_metrics(path) == rows


def test_a_broken_line_in_the_middle_warns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line 2"):
        assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_a_resumed_run_counts_a_repeated_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": {x}}}\n' for s, x in [(1, 9), (2, 8), (2, 7)]))
    assert series(read_metrics(path), "loss")[1].tolist() == [9, 7]


def test_empty_values_count_as_missing():
    rows = [{"step": 1, "mtp_loss": [], "expert_bias": [[], []], "val_loss": None, "loss": 0.0}]
    assert [
        k for k in ("mtp_loss", "expert_bias", "val_loss", "lr", "loss") if training.has(rows, k)
    ] == ["loss"]


# ── Smoothing ──


def test_smoothing_keeps_lines_and_skips_nonfinite_values():
    assert np.allclose(smooth(np.full(99, 2.5)), 2.5)
    line = np.arange(200.0)
    assert np.allclose(smooth(line, 0.05)[:190], line[:190])  # both-sided: no lag
    assert np.allclose(smooth(np.array([1.0, np.nan, np.inf, 1.0]), 0.5), 1.0)
    assert np.isnan(smooth(np.array([np.nan]))).all()


def test_smoothing_reduces_noise():
    noise = np.random.default_rng(0).normal(0, 1, 2000)
    assert smooth(noise)[-1] == pytest.approx(noise[-41:].mean())
    assert smooth(noise)[100:-100].std() < 0.25


# ── Plots ──


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.full), 500])
@pytest.mark.parametrize("key", PLOTS)
def test_every_plot_shows_its_data(key, steps):
    fig = PLOTS[key](fake_rows(steps))
    assert ink(fig) > (20 if steps == 1 else 200)
    for ax in fig.axes:
        assert ax.get_title() and ax.get_xlabel() or ax.get_label() == "<colorbar>"


@pytest.mark.parametrize("key", PLOTS)
def test_rows_without_the_key_raise(key):
    names = training.SCHEDULE_PANELS if key == "lr" else [key]
    rows = [{k: v for k, v in row.items() if k not in names} for row in fake_rows(5)]
    with pytest.raises(ValueError, match="no row has"):
        PLOTS[key](rows)


@pytest.mark.parametrize("key", PLOTS)
def test_rows_with_only_the_key_are_enough(key):
    assert ink(PLOTS[key]([{"step": r["step"], key: r[key]} for r in fake_rows(40)])) > 200


@pytest.mark.parametrize("key", PLOTS)
def test_titles_stay_inside_and_do_not_overlap(key):
    fig = PLOTS[key](fake_rows(300))
    fig.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in fig.axes if ax.get_title()]
    assert all(b.x0 >= 0 and b.x1 <= fig.bbox.x1 and b.y1 <= fig.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.full), 60])
@pytest.mark.parametrize("plot", [rl.plot_rewards, rl.plot_rl_metrics])
def test_rl_plots_show_their_data(plot, steps):
    fig = plot(rl_rows(steps))
    assert ink(fig) > (20 if steps == 1 else 200)
    with pytest.raises(ValueError, match="no row has"):
        plot(fake_rows(3))


def test_rewards_have_a_curve_per_task_and_diamonds_for_held_out_problems():
    ax = rl.plot_rewards(rl_rows(60), {"sums": {"greedy": 0.1}}).axes[0]
    assert ax.get_legend_handles_labels()[1] == ["sums", "writing"]
    diamonds = [line.get_xdata() for line in ax.lines if line.get_marker() == "D"]
    assert [list(x) for x in diamonds] == [[0, 20, 40, 60], [20, 40]]
    assert ink(rl.plot_rewards([{"step": s, "reward_by": {"sums": 1.0}} for s in range(9)])) > 200


def test_only_keys_of_the_rows_get_a_panel():
    shown = [ax.get_title() for ax in rl.plot_rl_metrics(rl_rows(9)).axes if ax.get_visible()]
    assert len(shown) == len(rl.RL_PANELS) - 1 and rl.RL_PANELS["clip_ratio"][0] not in shown


def test_loss_has_a_curve_for_each_part():
    _, labels = training.plot_loss(fake_rows(60)).axes[0].get_legend_handles_labels()
    assert labels == ["training", "validation", "MTP, depth 1", "MTP, depth 2"]


def test_loss_survives_divergence():
    rows = fake_rows(60)
    rows[-1]["loss"] = float("nan")
    rows[-2]["loss"] = float("inf")
    assert ink(training.plot_loss(rows)) > 200


def test_heatmap_is_load_times_experts():
    rows = fake_rows(50)
    shown = training.plot_expert_load(rows, layer=1).axes[0].images[0].get_array()
    assert shown.shape == (EXPERTS, 50)
    assert np.allclose(shown.T, np.array([r["expert_load"][1] for r in rows]) * EXPERTS)


def test_even_load_is_white_and_a_dead_expert_is_not():
    even, dead = [1 / 4] * 4, [0.0, 1 / 3, 1 / 3, 1 / 3]
    rows = [{"step": s, "expert_load": [even, dead]} for s in range(9)]
    images = [training.plot_expert_load(rows, i).axes[0].images[0] for i in range(2)]
    even_rgba, dead_rgba = (i.to_rgba(i.get_array()) for i in images)
    assert np.allclose(even_rgba, 1, atol=0.01)
    assert np.allclose(dead_rgba[0], images[1].cmap(0.0)) and dead_rgba[0, 0, 0] < 0.1


def test_a_long_run_is_averaged_not_thinned():
    rows = [{"step": s, "expert_load": [[s % 2, 1 - s % 2]]} for s in range(1000)]
    shown = training.plot_expert_load(rows).axes[0].images[0].get_array()
    assert shown.shape[1] <= 200
    assert np.allclose(shown.mean(1), 1, atol=0.01) and shown.max() < 1.3


def test_bias_plots_label_the_extremes():
    rows = [{"step": s, "expert_bias": [[0.0, 0.01 * s, -0.02 * s, 0.005 * s]]} for s in range(10)]
    (ax,) = training.plot_expert_bias(rows, ["layers.1.ffn"]).axes
    assert ax.get_legend_handles_labels()[1] == ["expert 1", "expert 2"]
    assert ax.get_title() == "layers.1.ffn: biases −0.180 to +0.090"


def test_many_layers_become_a_band():
    fig = training.plot_max_vio(fake_rows(80, layers=58))
    assert len(fig.axes[0].lines) == 1 and len(fig.axes[0].collections) == 1
    assert ink(training.plot_expert_bias(fake_rows(80, layers=5, experts=64))) > 200


def test_layers_are_labeled_by_name():
    fig = training.plot_max_vio(fake_rows(20), names=["a", "b"])
    assert fig.axes[0].get_legend_handles_labels()[1] == ["a", "b", "MoE layer 2"]


def test_schedule_titles_show_the_course():
    titles = [ax.get_title() for ax in training.plot_schedule(fake_rows(60)).axes]
    assert titles[:2] == ["Learning rate: 0.0001 → 0.001", "Batch: 8 → 16"]
    assert training.format_course(np.array([1.0, 3.0, 2.0])) == "1 → 3 → 2"
    assert training.format_course(np.array([2.0, 2.0])) == "2"


def test_bits_are_ordered_best_on_top():
    fig = training.plot_bits_per_byte({"gzip": 2.66, "this model": 1.5, "bzip2": 1.89})
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["gzip", "bzip2", "this model"]
    assert [b.get_width() for b in fig.axes[0].patches] == [2.66, 1.89, 1.5]


# ── Style and pages ──


def test_the_style_reaches_lines_and_legends():
    fig, ax = style.figure()
    ax.plot([0, 1], label="x")
    assert ax.lines[0].get_linewidth() == style.RC_PARAMS["lines.linewidth"]
    assert not ax.legend().get_frame_on()


def test_show_closes_its_figure():
    fig, _ = style.figure()
    style.show(fig)
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize(
    "control, value", [((0, 10, 2), 5), ((0.0, 1.0), 0.5), (["a", "b"], "a"), (True, True)]
)
def test_play_starts_from_the_middle(control, value):
    seen = []
    style.play(lambda x: seen.append(x), x=control)
    assert seen == [value]


def test_svg_uses_the_text_color_and_unique_ids():
    one, two = (page.svg(training.plot_max_vio(fake_rows(9)), n, "a < b") for n in ("one", "two"))
    assert 'aria-label="a &lt; b"' in one and "#000000" not in one
    ids = [{part.split('"')[0] for part in code.split(' id="')[1:]} for code in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = {part.split('"')[0] for part in one.split('href="#')[1:]}
    assert used and used <= ids[0]


def test_the_same_figure_gives_the_same_svg():
    svgs = [page.svg(training.plot_loss(fake_rows(30)), "loss", "loss") for _ in range(2)]
    assert svgs[0] == svgs[1]


def test_text_is_escaped_and_numbers_are_formatted():
    assert page.text("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert page.text(["<i>"]) == "[&quot;&lt;i&gt;&quot;]"
    values = [1234567, 0.00022, 1.0, True, None]
    assert [page.text(v) for v in values] == ["1,234,567", "0.00022", "1", "true", "null"]


# ── Explorers ──


def test_a_bias_shifts_choices_and_is_restored(micro):
    model = Transformer(micro)
    (layer,) = [n for n in moe_layers(model) if not n.startswith("mtp")][:1]
    gate = moe_layers(model)[layer].gate
    before, tokens = gate.bias.clone(), list(range(8))
    plain = routing.trace_route(model, tokens, layer)
    far = routing.trace_route(model, tokens, layer, 1, 5.0)
    shut = routing.trace_route(model, tokens, layer, 1, -5.0)
    assert torch.equal(gate.bias, before) and torch.equal(plain.scores_bse, far.scores_bse)
    assert (far.topk_ids_bsk == 1).any(-1).all() and not (shut.topk_ids_bsk == 1).any()


def test_routing_is_drawn_token_by_token(micro):
    model = Transformer(micro)
    r = routing.trace_route(model, [1, 2, 3], next(iter(moe_layers(model))))
    fig = routing.draw_routing(r, ["a", "$b", "c\n"], 2)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["a", "$b", "c\\n"]
    at = fig.axes[0].collections[0].get_offsets()
    assert at[:, 0].tolist() == r.topk_ids_bsk.flatten().tolist()
    assert sum(bar.get_height() for bar in fig.axes[1].patches) == r.topk_ids_bsk.numel()
    assert ink(fig) > 200


def test_accepted_and_rejected_drafts_are_drawn():
    rounds = [("a", 0, None), (list("bc"), 1, "x"), (list("de"), 1, None), (["f"], 0, "\n")]
    ax = decoding.draw_trace(rounds, 4).axes[0]
    texts = {
        (t.get_position()[0] - 0.5, round(t.get_position()[1], 1)): t.get_text() for t in ax.texts
    }
    assert [texts[i, 0.0] for i in range(4)] == list("abcd") and texts[2, 1.0] == "x"
    assert texts[0, 2.4] == "e" and texts[1, 2.4] == "f" and texts[1, 3.4] == "⏎"
    boxes = [tuple(round(v, 1) for v in box.get_xy()) for box in ax.patches]
    assert boxes == [(1, -0.5), (2, 0.5), (3, -0.5), (1, 2.9)]  # b and d accepted, x and ⏎ not


def test_actions_after_the_cutoff_are_pale():
    spans = simulate(schedule("1f1b", 2, 4), ActionCosts())
    whole = timeline.draw(spans, "x").axes[0].patches
    half = timeline.draw(spans, "x", until=4.0).axes[0].patches
    assert {p.get_alpha() for p in whole} == {1.0}
    pale = [p.get_alpha() < 0.5 for p in half]
    assert pale == [p.get_x() >= 4.0 for p in half] and any(pale) and not all(pale)
