"""`dsv3 ablate`: errors, stored runs, and variants that differ in one thing only."""

import json
import math
from dataclasses import asdict, replace
from itertools import chain, product
from types import SimpleNamespace

import miniruns
import numpy as np
import pytest
import torch
from miniruns import MINI, override
from test_moe import slow_balance

from dsv3_ref.cli.main import main
from dsv3_ref.mla import LayerKVCache
from dsv3_ref.model import Transformer
from dsv3_ref.moe import Route, balance_loss
from dsv3_ref.optim import RECIPES
from dsv3_ref.pretrain import compute_losses
from dsv3_ref.rope import Rope
from dsv3_ref.studies import ablate
from dsv3_ref.viz import ablation, figure

NAMES = list(ablate.ABLATIONS)
CURVE_KEYS = {
    "balance": {"max_vio_global", "max_vio_sequence"},
    "mtp": {"acceptance"},
    "mla": set(),
    "fim": set(),
    "fp8": set(),
}
RUN_KEYS = {
    "balance": {"max_vio_global", "max_vio_sequence", "load"},
    "mtp": {"acceptance", "acceptance_chain"},
    "mla": set(),
    "fp8": {"losses"},
    "fim": {"psm_nats", "psm_accuracy", "left_nats", "left_accuracy", "middle_tokens"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        (folder / "mini.json").write_text(json.dumps(MINI | {"n_mtp_layers": 0, "n_heads": 4}))
        yield folder


def command(home, name: str, *more) -> list[str]:
    fixed = ["ablate", name, "--config", home / "mini.json", "--data", home / "text"]
    return override([*fixed, "--out", home / "results", "--steps", 3], more)


# ── Mistakes ──


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nothing"], "invalid choice 'nothing'"),
        (["fim", "--seeds", "0"], "--seeds and --steps must be at least 1"),
        (["fim", "--steps", "0"], "--seeds and --steps must be at least 1"),
        (["fim", "--config", "tinny"], "no config 'tinny' (did you mean tiny?): sizes are tiny"),
        (["fim", "--data", "missing.txt"], "no data at 'missing.txt'"),
        (["fim", "--rate", "1"], "Unrecognized options: --rate"),
    ],
)
def test_a_mistake_is_an_error_message(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *argv]) == 2
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output
    assert sentence in " ".join(output.replace("│", " ").split())
    assert not list(tmp_path.glob("**/*.json"))


def test_results_of_other_settings_are_not_overwritten(home, tmp_path, capsys):
    path = tmp_path / "ablate_mtp.json"
    path.write_text(json.dumps({"steps": 9, "runs": []}))
    assert main(command(home, "mtp", "--out", tmp_path)) == 2
    assert "was made with other steps: give another --out" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"steps": 9, "runs": []}


# ── Runs ──


@pytest.mark.parametrize("name", NAMES)
def test_stored_runs_are_not_repeated(name, home, monkeypatch):
    monkeypatch.setattr(ablate, "PASSAGE_CHARS", 60)
    monkeypatch.setattr(ablate, "N_INFILL_DOCUMENTS", 6)
    assert main(command(home, name, "--seeds", 1)) == 0
    path = home / "results" / f"ablate_{name}.json"
    first = json.loads(path.read_text())
    check_result(name, first)
    monkeypatch.setattr(ablate, "run_variant", lambda *a: pytest.fail("repeated"))
    assert main(command(home, name, "--seeds", 1)) == 0
    assert json.loads(path.read_text()) == first


def test_an_interrupted_ablation_resumes(home, tmp_path, monkeypatch):
    """Only the missing runs are made after an interruption."""
    argv = command(home, "mtp", "--seeds", 2, "--out", tmp_path)
    calls, real = [], ablate.run_variant

    def limited(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(ablate, "run_variant", limited)
    assert main(argv) == 130
    path = tmp_path / "ablate_mtp.json"
    half = json.loads(path.read_text())["runs"]
    assert [(r["variant"], r["seed"]) for r in half] == [("D=0", 0), ("D=1", 0)]
    monkeypatch.setattr(ablate, "run_variant", real)
    assert main(argv) == 0
    whole = json.loads(path.read_text())
    assert whole["runs"][:2] == half
    check_result("mtp", whole)


def check_result(name: str, result: dict) -> None:
    """Check that all runs are there, with all keys and finite numbers."""
    runs = [(r["variant"], r["seed"]) for r in result["runs"]]
    assert sorted(runs) == sorted(product(result["variants"], range(result["seeds"])))
    assert {"command", "commit", "versions", "threads", "steps", "data"} <= set(result)
    assert result["command"].startswith(f"dsv3 ablate {name}")
    for r in result["runs"]:
        common = {"variant", "seed", "val_loss", "val_loss_by_source", "seconds", "curve"}
        assert set(r) == common | RUN_KEYS[name]
        assert r["val_loss"] == pytest.approx(np.mean(list(r["val_loss_by_source"].values())))
        every = max(1, result["steps"] // 10)
        assert [p["step"] for p in r["curve"]] == list(range(every, result["steps"] + 1, every))
        assert all(set(p) == {"step", "loss", "val_loss"} | CURVE_KEYS[name] for p in r["curve"])
    assert all(map(math.isfinite, numbers(result["runs"])))


def numbers(x) -> list[float]:
    if isinstance(x, dict | list):
        values = x.values() if isinstance(x, dict) else x
        return list(chain.from_iterable(map(numbers, values)))
    return [x] if isinstance(x, int | float) else []


# ── Committed results ──


COMMITTED = sorted(
    p.stem.removeprefix("ablate_") for p in ablation.RESULTS_DIR.glob("ablate_*.json")
)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_are_complete_and_reproducible(name):
    path = ablation.RESULTS_DIR / f"ablate_{name}.json"
    result = ablation.load_ablation(name)
    check_result(name, result)
    assert path.stat().st_size < 60_000
    assert result["seeds"] >= (2 if name == "fp8" else 3)  # FP8 by emulation: half an hour per seed
    argv = result["command"].split()[2:]
    args = ablate.parse_options(argv)
    for key in ("steps", "seeds"):
        assert getattr(args, key) == result[key]
    assert list(args.data) == result["data"]
    base = ablate.load_config(args.config) if args.config else ablate.BASE
    current = ablate.ABLATIONS[name](base, ablate.ablation_recipe(base, args.steps))
    assert {k: ablate.variant_metadata(v) for k, v in current.items()} == result["variants"]


def test_the_committed_fp8_runs_are_within_a_quarter_of_a_percent():
    """Relative to fp32 with the same seed, losses averaged over 50 steps (§3.3, App. B.1)."""
    runs = {
        (r["variant"], r["seed"]): np.array(r["losses"])
        for r in ablation.load_ablation("fp8")["runs"]
    }
    seeds = {seed for _, seed in runs}
    smooth = {k: np.convolve(x, np.ones(50) / 50, "valid") for k, x in runs.items()}
    for seed in seeds:
        assert len(runs["fp8", seed]) >= 1000
        assert not np.array_equal(smooth["fp32", seed], smooth["fp8", seed])
        assert abs((smooth["fp8", seed] / smooth["fp32", seed] - 1).mean()) < 0.0025
    wide, narrow = (np.mean([smooth[v, s] for s in seeds], 0) for v in ("fp32", "fp8"))
    assert np.abs(narrow / wide - 1).max() < 0.0025


def test_values_are_ordered_by_seed():
    runs = [{"variant": v, "seed": s, "x": [s, 10 * s]} for s, v in product((2, 0, 1), "ab")]
    result = {"variants": {"a": {}, "b": {}}, "runs": runs}
    values = ablation.values_by_variant(result, lambda run: run["x"][1])
    assert {k: x.tolist() for k, x in values.items()} == {"a": [0, 10, 20], "b": [0, 10, 20]}
    assert ablation.mean_std(values["a"], 1) == "10.0 ± 10.0"


def test_a_figure_shows_every_seed_and_skips_what_a_variant_lacks(capsys):
    runs = []
    for seed, name in product(range(3), "ab"):
        is_b = name == "b"
        curve = [{"step": n, "x": is_b and n + seed} for n in (1, 2, 3)]
        runs.append({"variant": name, "seed": seed, "val_loss": seed + is_b, "curve": curve})
    result = {"variants": {"a": {}, "b": {}}, "runs": runs}
    _, (dots, course) = figure(1, 2)
    ablation.plot_dots(dots, ablation.values_by_variant(result), "", "")
    shown = [line.get_xdata() for line in dots.lines if line.get_marker() == "o"]
    assert shown == [pytest.approx([0, 1, 2]), pytest.approx([1, 2, 3])]
    assert [line.get_xdata().tolist() for line in dots.lines[:3]] == [[0, 1], [1, 2], [2, 3]]
    ablation.plot_curves(course, result, lambda point: point["x"] or math.nan, "", "")
    (line,) = course.lines
    assert line.get_label() == "b"
    assert line.get_ydata().tolist() == [2, 3, 4]
    ablation.print_table(result, against="a")
    assert capsys.readouterr().out.splitlines() == [
        "a  1.000 ± 1.000", "b  2.000 ± 1.000   1.000 ± 0.000 against a"
    ]  # fmt: skip


# ── Variants differ in one thing ──


def variants(name: str, steps: int = 5) -> dict:
    return ablate.ABLATIONS[name](ablate.BASE, ablate.ablation_recipe(ablate.BASE, steps))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_agree_within_a_percent(name):
    sizes = [ablate.count_main_params(v) for v in variants(name).values()]
    assert max(sizes) < 1.01 * min(sizes)
    assert name == "mla" or len(set(sizes)) == 1


def test_variants_differ_only_in_the_ablated_fields():
    varied = {
        "balance": {"bias_update_rate", "balance_loss_coeff", "balance_loss_scope"},
        "mtp": {"n_mtp_layers"},
        "mla": {"kv_lora_rank", "qk_rope_head_dim", "inter_dim", "kv_heads"}, "fim": {"fim_rate"},
        "fp8": {"precision", "micro_batch"},
    }  # fmt: skip
    for name, allowed in varied.items():
        flat = [asdict(v) for v in variants(name).values()]
        flat = [x.pop("model") | x.pop("recipe") | x for x in flat]
        assert {k for k in flat[0] if len({x[k] for x in flat}) > 1} == allowed


def test_cache_sizes_are_those_of_the_metadata():
    """`cache_bytes` is that of a cache of n·(r + v) numbers per token, which GQA fills exactly."""
    for name, v in variants("mla").items():
        c = v.model
        want = v.kv_heads * 2 * c.v_head_dim or c.kv_lora_rank + c.qk_rope_head_dim
        assert ablate.variant_metadata(v)["cache_bytes"] == 2 * c.n_layers * want
        model, tokens_bs = ablate.build_variant(v), torch.randint(c.vocab_size, (2, 7))
        cache = LayerKVCache(c, 2, 7)
        model.layers["0"].attn(
            model.embed(tokens_bs), Rope.from_positions(c, torch.arange(7)), cache
        )
        assert cache.kv_btx.shape[-1] == want and (cache.kv_btx != 0).all(), name


def test_a_seed_gives_all_variants_the_same_data(home, tmp_path):
    argv = command(home, "balance", "--out", tmp_path)[1:]
    args = ablate.parse_options(argv)
    base = ablate.load_config(args.config)
    bias, with_loss, *_ = ablate.balance_variants(base, ablate.ablation_recipe(base, 3)).values()
    batches = [
        ablate.build_variant_run(args, variant, 0).data.loader.next_batch(3)
        for variant in (bias, with_loss)
    ]
    assert torch.equal(*batches)


# ── Batch-wise balance ──


def test_the_batch_wise_loss_is_that_of_one_long_sequence():
    scores_bse = torch.rand(3, 5, 6)
    topk_ids_bsk = torch.rand(3, 5, 6).topk(2).indices
    r = Route(None, topk_ids_bsk, scores_bse)
    f_e = [6 / (2 * 15) * sum((topk_ids_bsk == e).flatten().tolist()) for e in range(6)]
    p_e = torch.zeros(6)
    for scores_e in scores_bse.flatten(0, 1):
        p_e += scores_e / scores_e.sum() / 15
    want = sum(f * p for f, p in zip(f_e, p_e))
    assert balance_loss(r, "batch").item() == pytest.approx(want.item())
    assert balance_loss(r).item() == pytest.approx(slow_balance(r))
    one = Route(None, topk_ids_bsk[:1], scores_bse[:1])
    assert torch.equal(balance_loss(one, "batch"), balance_loss(one))


def test_rows_with_their_own_experts_cost_only_the_sequence_wise_loss():
    """Two rows use one half of the experts each: balanced as a batch, not as sequences."""
    scores_bse = torch.tensor([[[0.9, 0.9, 0.1, 0.1]] * 4, [[0.1, 0.1, 0.9, 0.9]] * 4])
    r = Route(None, scores_bse.topk(2).indices, scores_bse)
    assert balance_loss(r, "batch").item() == pytest.approx(1)
    assert balance_loss(r).item() == pytest.approx(1.8)


def test_the_recipe_selects_the_balance_loss(micro):
    torch.manual_seed(0)
    model, tokens_bs = Transformer(micro), torch.randint(61, (3, 12))
    parts = {over: compute_losses(model, tokens_bs, over) for over in ("sequence", "batch")}
    for over, part in parts.items():
        want = sum(balance_loss(r, over) for r in part.routes)
        assert torch.equal(part.balance, want)
    assert not torch.equal(parts["sequence"].balance, parts["batch"].balance)
    assert RECIPES["v3"].balance_loss_scope == "sequence"


# ── Drafts ──


def test_acceptance_counts_chains(monkeypatch, micro):
    """Depth 1 is accepted at 3 of 4 positions, depth 2 at 2 of 4, both at 1 of 4."""
    hits = [torch.tensor([[1, 1, 1, 0, 1]]).bool(), torch.tensor([[1, 0, 0, 1]]).bool()]
    monkeypatch.setattr(ablate, "mtp_draft_matches", lambda model, tokens_bs: hits)

    strategy = SimpleNamespace(model=Transformer(replace(micro, n_mtp_layers=2)))
    run = SimpleNamespace(strategy=strategy, data=SimpleNamespace(val={"x": [torch.zeros(1, 7)]}))
    assert ablate.measure_acceptance(run, 1) == {
        "acceptance": [0.75, 0.5],
        "acceptance_chain": [0.75, 0.25],
    }
