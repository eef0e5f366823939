"""`dsv3 plan` beside real ranks: what they hold, what they send, how many micro-batches wait."""

import json
import re
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsv3_ref import ops
from dsv3_ref.cli.main import main
from dsv3_ref.cluster.memory import attention_buffers
from dsv3_ref.cluster.plan import (
    PlanConfig,
    estimate,
    format_estimate,
    memory_settings,
    params_by_rank,
)
from dsv3_ref.cluster.step_time import pipeline_spans, waterfall
from dsv3_ref.config import TINY, V3, UserError, count_params
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.scale import NO_OVERHEADS, wall_clock_factor
from dsv3_ref.training.objective import RowBatch
from dsv3_ref.training.settings import parse_args, validate_args

SMALL = replace(TINY, vocab_size=512, n_layers=4, embed_std=0.02)


@pytest.fixture(scope="module")
def v3():
    return estimate(PlanConfig())


# ── V3 ──


def test_every_parameter_of_v3_is_held_as_often_as_the_mesh_says():
    numbers, where = params_by_rank(PlanConfig(), V3)
    distinct = 0.0
    for of_rank in numbers:
        for (size, _), n in of_rank.items():  # experts: holders × dp; dense: holders × dp × ep
            distinct += n * 64 / (size / 2) if size < 64 else n / (size / 128)
    biases = 59 * 256  # of the gates, MTP's too: buffers
    assert distinct == count_params(V3).total + count_params(V3).mtp - biases
    assert where[0] == (0, 15)


def test_dualpipe_holds_one_micro_batch_more_than_stages(v3):
    assert v3.in_flight == [17] * 16
    assert estimate(PlanConfig(schedule="1f1b")).in_flight == [*range(16, 0, -1)]


PHASES = (
    PlanConfig(seq_len=32_768, global_batch_size=1920, cp=8),
    PlanConfig(seq_len=131_072, global_batch_size=480, cp=32),
)


@pytest.mark.parametrize("phase", PHASES, ids=["32k", "128k"])
def test_the_long_phases_fit_in_80_gb_as_120_micro_batches_of_4096_tokens(phase, v3):
    """cp divides the activations: a rank holds those of pre-training, without Wgrads of wkv_b."""
    e = estimate(phase)
    assert e.in_flight == v3.in_flight
    for got, want in zip(e.ranks, v3.ranks):
        assert got.gpu <= want.gpu + 1e6 and got[:4] == want[:4]
    buffers = attention_buffers(memory_settings(phase, V3))
    assert max(rank.gpu for rank in e.ranks) + buffers.total() < 70e9
    latent = 2 * (V3.kv_lora_rank + V3.qk_rope_head_dim)
    assert buffers["gathered latents"] == 2 * phase.seq_len * latent
    with pytest.raises(UserError, match="must be a multiple of --dp × --ep = 128"):
        estimate(replace(phase, cp=1, global_batch_size=1000))
    alone = estimate(replace(phase, cp=1, global_batch_size=1920))
    assert min(rank.gpu for rank in alone.ranks) > 80e9


def test_both_long_phases_cost_less_than_the_report_says():
    """The report: 119K GPU hours for 1,000 steps each (§1), by a layout that it does not state."""
    hours = [1000 * p.seq_len * p.global_batch_size / 1e12 * estimate(p).hours for p in PHASES]
    assert 80e3 < sum(hours) < 119e3 and hours[0] < hours[1]


def test_the_bill_is_that_of_chapter_17_and_what_follows_the_pipeline(v3):
    best = estimate(
        replace(v3.plan, overheads=NO_OVERHEADS)
    )  # every kernel at its best: below the report
    alone = (best.seconds - best.tail) / best.seconds * best.hours
    assert 140e3 < alone < 145e3 < best.hours < v3.hours < 1.05 * 180e3


def test_the_step_is_the_sum_of_what_each_assumption_adds(v3):
    plan, factor = v3.plan, wall_clock_factor(v3.plan.overheads, v3.gpus)
    added = waterfall(v3.step, plan.rates, plan.overheads, v3.tail, factor)
    assert sum(added.values()) == pytest.approx(v3.seconds * factor, rel=1e-9)
    assert min(added.values()) > -1e-3  # seconds
    report = 180e3 * 3600 / 2048 * 15_360 * 4096 / 1e12
    assert report == pytest.approx(19.9, abs=0.05)
    assert abs(sum(added.values()) / report - 1) < 0.05


def test_sums_of_gradients_cost_half_if_wgrad_adds_in_its_epilogue(v3):
    def seconds(num_bytes: int) -> float:
        overheads = v3.plan.overheads._replace(accumulation_bytes=num_bytes)
        spans = pipeline_spans(v3.step, v3.plan.rates, overheads)
        return sum(span.end - span.start for span in spans if span.rank == 3)

    none = seconds(0)
    assert seconds(8) - none == pytest.approx(0.55, abs=0.01)  # report's mesh, a middle rank
    assert seconds(16) - none == pytest.approx(1.10, abs=0.01)


def test_v3_fits_in_80_gb_with_its_messages(v3):
    assert max(rank.gpu for rank in v3.ranks) < 70e9
    middle, ends = v3.ranks[8], v3.ranks[0]
    for rank, weights, masters, gradients in ((middle, 3.3, 1.44, 13.09), (ends, 6.9, 0.6, 19.74)):
        assert rank.weights / 1e9 == pytest.approx(weights, abs=0.05)
        assert rank.masters / 1e9 == pytest.approx(masters, abs=0.01)
        assert rank.gradients / 1e9 == pytest.approx(gradients, abs=0.01)


def test_fixed_sizes_are_padded_in_every_line_of_rows(v3):
    """Expert inputs and products have 1.25 × the mean; the text names both sizes."""
    padded = estimate(replace(v3.plan, dispatch_capacity=1.25))
    for kind in ("expert inputs", "gate and up of experts"):
        ratio = padded.usage[8][kind] / v3.usage[8][kind]
        assert ratio == pytest.approx(1.25, abs=0.05), kind
    top = f"{max(rank.gpu for rank in padded.ranks) / 1e9:.1f} GB"
    assert f"{top} with sizes of 1.25 × the mean" in format_estimate(v3)
    assert "sizes of 1.25 × the mean (--dispatch-capacity 1.25):" in format_estimate(padded)
    with pytest.raises(UserError, match="--dispatch-capacity"):
        estimate(replace(v3.plan, dispatch_capacity=0.5))


def test_weights_are_exchanged_as_they_are_kept(v3):
    """Gradients in fp32; weights in FP8, or in bf16."""
    bf16 = estimate(replace(v3.plan, precision="bf16"))
    ratio = bf16.sent["gradients and weights"] / v3.sent["gradients and weights"]
    assert 1.05 < ratio < 6 / 5  # embedding and head are in bf16 in both


def test_slower_links_and_less_overlap_cost_more(v3):
    slow = v3.plan.rates._replace(ib=10e9)
    assert estimate(replace(v3.plan, rates=slow)).hours > 1.3 * v3.hours
    assert estimate(replace(v3.plan, schedule="1f1b")).hours > 1.2 * v3.hours


def test_without_zero_the_moments_are_everywhere(v3):
    plain = estimate(replace(v3.plan, zero=False))
    assert plain.ranks[3].moments == plain.ranks[3].gradients  # both four bytes per parameter
    assert v3.ranks[3].moments < 0.2 * plain.ranks[3].moments


# ── Real ranks ──


def lived(shape, name: str, batch: int, s: int, ranks_per_node: int):
    """Bytes that a rank holds between steps, and sent in a real one (see test_memory.py)."""
    mesh, r = Mesh(*shape, torch.device("cpu")), replace(RECIPES["tiny"], max_grad_norm=1e9)
    settings = EngineSettings(
        name, precision="fp8", ranks_per_node=ranks_per_node, fp8_dispatch=True
    )
    c = ParallelEngine(SMALL, r, mesh, settings)
    rows = torch.randint(SMALL.vocab_size, (batch, s + 1))
    with ops.use("fp8", "auto"), torch.autocast("cpu", torch.bfloat16):
        c.train_step(rows, r, 1e-3, 1e-3, 0.3)
    memory = c.optimizer.bytes._asdict()
    return mesh.pp_rank, memory, dict(c.traffic.bytes)


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_real_ranks_hold_and_send_what_was_planned(name, tmp_path, gang):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(asdict(SMALL)))
    e = estimate(
        PlanConfig(
            str(config), 2, 4, 1, 1, name, seq_len=64, global_batch_size=16, ep_ranks_per_node=2
        )
    )
    seen = gang.run(8, lived, (2, 1, 4), name, 16, 64, 2)
    for p, rank in enumerate(e.ranks):
        for kind in ("weights", "masters", "gradients", "moments"):
            assert {found[kind] for at, found, _ in seen if at == p} == {getattr(rank, kind)}
    for link, what in (
        ("internode", "experts, across nodes"),
        ("intranode", "experts, inside nodes"),
    ):
        sent = [sum(traffic[link] for p, _, traffic in seen if p == rank) / 4 for rank in (0, 1)]
        assert max(sent) == pytest.approx(e.sent[what], rel=0.15), link  # first gates are uneven


def opened(shape, name: str, ranks_per_node: int, cp: int):
    """Return the number of communicators that a rank uses, as NCCL counts them."""
    mesh, pairs = Mesh(*shape, torch.device("cpu"), cp=cp), set()
    warmed = set(product(("up", "down"), map(mesh.rank_of, mesh.neighbors())))
    names = {mesh.up_group: "up", mesh.down_group: "down"}
    with pytest.MonkeyPatch.context() as patch:
        for call in ("isend", "irecv"):
            patch.setattr(dist, call, recorded(getattr(dist, call), 1, pairs, names))
        settings = EngineSettings(name, ranks_per_node=ranks_per_node)
        engine = ParallelEngine(SMALL, RECIPES["tiny"], mesh, settings)
        with ops.use("zero_bubble", "auto"):
            rows = torch.randint(SMALL.vocab_size, (4, 17))
            engine.train_step(rows, RECIPES["tiny"], 1e-3, 1e-3, 0.3)
            patch.setattr(dist, "all_reduce", of_counted_groups(dist.all_reduce, names))
            engine.pipeline.read_out(RowBatch(rows), lambda h_bsd, *_: h_bsd[:, 0, :1].float(), 1)
    assert pairs == warmed
    groups = [g for g in distributed_c10d._world.pg_map if g not in names]
    return len(groups) + len(pairs)


def of_counted_groups(all_reduce, names: dict):
    def call(x, *args, group=None):
        assert group not in names, "only messages of pairs are counted"
        return all_reduce(x, *args, group=group)

    return call


def recorded(call, place: int, pairs: set, names: dict):
    def record(*args, group, **kwargs):
        pairs.add((names[group], args[place]))
        return call(*args, group=group, **kwargs)

    return record


@pytest.mark.parametrize("name, cp", [("1f1b", 1), ("dualpipe", 4), ("dualpipev", 1)])
def test_real_ranks_open_as_many_communicators_as_planned(name, cp, tmp_path, gang):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(asdict(SMALL)))
    plan = PlanConfig(
        str(config), 2, 4, 1, cp, name, seq_len=64, global_batch_size=16, ep_ranks_per_node=2
    )
    counted = gang.run(8, opened, (2, 1, 4), name, 2, cp)
    assert max(counted) == sum(estimate(plan).communicators.values())


def test_a_rank_of_2048_opens_as_many_communicators_as_one_of_256(v3):
    small = estimate(replace(v3.plan, ep=16, dp=1))
    assert v3.communicators == small.communicators and sum(v3.communicators.values()) < 16


@pytest.mark.parametrize(("ep", "per_node", "fits"), [(4, 3, False), (4, 8, True), (8, 4, True)])
def test_plan_and_train_have_one_rule_for_nodes(ep, per_node, fits, capsys, monkeypatch):
    mesh = ["--ep", str(ep), "--ep-ranks-per-node", str(per_node)]
    assert main(["plan", "--config", "tiny", "--pp", "2", *mesh]) == (0 if fits else 2)
    planned = capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", str(ep))
    args = parse_args(["--config", "tiny", *mesh])
    if fits:
        validate_args(args)
    else:
        with pytest.raises(UserError) as refused:
            validate_args(args)
        assert str(refused.value) in planned


# ── What a person sees ──


def test_v3_is_printed_with_all_its_ranks(v3, capsys, tmp_path):
    assert main(["plan", "--out", str(tmp_path / "plan.png")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^v3 on 2,048 H800: pp 16 × dp 2 × ep 64, dualpipe, fp8", said, re.M)
    assert len(re.findall(r"^ +\d+ +[\d.]+ ", said, re.M)) == 16
    assert (
        "61.2 GB and a working set of about 3.3 GB fit in 80 GB; 15.5 GB are left" in said
        and "GPU hours per trillion tokens" in said
    )
    assert "communicators per GPU: " in said
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--ep", "48"], "--ep must divide 256 routed experts"),
        (
            ["--global-batch-size", "100"],
            "--global-batch-size must be a multiple of --dp × --ep = 128",
        ),
        (["--pp", "5"], "dualpipe needs an even --pp"),
        (
            ["--pp", "64", "--schedule", "1f1b"],
            "61 layers cannot be divided into 64 stages: lower --pp",
        ),
        (["--ep-ranks-per-node", "6"], "--ep 64 must be a multiple of --ep-ranks-per-node 6"),
        (["--dp", "0"], "--dp must be at least 1"),
        (["--cp", "0"], "--cp must be at least 1"),
        (["--cp", "3"], "--cp 3 must divide --dp 2 × --ep 64 = 128"),
        (["--cp", "8", "--seq-len", "4104"], "--seq-len 4104 must be a multiple of 2 × --cp 8"),
        (
            ["--cp", "8", "--global-batch-size", "100"],
            "--global-batch-size must be a multiple of --dp × --ep / --cp = 16",
        ),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_in_a_sentence(options, sentence, capsys):
    assert main(["plan", *options]) == 2
    assert sentence in capsys.readouterr().err
