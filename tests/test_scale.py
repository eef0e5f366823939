"""The arithmetic of chapters 17 and 20: the report's numbers, limits, directions, units."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dsv3_ref.cli.main import main
from dsv3_ref.cluster.plan import REPORT_HOURS, PlanConfig, estimate
from dsv3_ref.config import SMALL, V3, Config, count_params
from dsv3_ref.inference_scale import (
    DECODE,
    PREFILL,
    DeploymentUnit,
    all_to_all_time,
    attention_time,
    decode_throughput,
    dollars_per_million_tokens,
    max_batch,
    min_gpus,
    mlp_time,
    model_bytes,
    prefill_throughput,
    tp_gather_time,
    weight_bytes,
)
from dsv3_ref.model import Transformer
from dsv3_ref.scale import (
    ACHIEVED_RATES,
    GPU_SPECS,
    NO_OVERHEADS,
    AchievedRates,
    BlockTime,
    Operator,
    Overheads,
    attention_operator,
    block_gemms,
    block_time,
    dispatch_bytes,
    dispatch_copies,
    link_seconds,
    memory_traffic,
    operators,
    overlapped_pair_time,
    pair_factor,
    step_tail,
    wall_clock_factor,
    with_comm_sms,
)

H800 = AchievedRates()
MOVES = dispatch_copies(V3, 64, 8)


def hours(overheads=None, **options) -> float:
    return estimate(PlanConfig(overheads=overheads or Overheads(), **options)).hours


# ── Training ──


def test_the_assumptions_of_chapter_17_stand_as_data():
    assert Overheads() == (True, 1.1, True, 2, 2e-6, 1.03, 419 / (54 * 24 * 16384), 0.5, 8)
    assert memory_traffic(V3, dense=False) == {
        "norms of attention": 17 * 7168 + 5 * (1536 + 512),
        "RoPE, quantized heads": 8 * 128 * 192 + 3.5 * 128 * 128,
        "norm of MLP": 17 * 7168,
        "SwiGLU": 7 * 9 * 2048,
        "permute, combine": 8 * 11 * 7168,
    }
    dense = memory_traffic(V3, dense=True)
    assert (dense["SwiGLU"], dense["permute, combine"]) == (7 * 18_432, 0)


def test_the_bill_from_first_principles_is_within_a_tenth_of_the_report():
    assert abs(hours() / REPORT_HOURS - 1) < 0.10
    assert 140e3 < hours(NO_OVERHEADS) < 150e3


@pytest.mark.parametrize(
    "field",
    [
        "gemm_shapes",
        "load_imbalance",
        "pp_stream_bytes",
        "launch_gap",
        "straggler_factor",
        "hours_lost",
    ],
)
def test_every_overhead_costs_something_and_its_absence_never_does(field):
    without = hours(Overheads()._replace(**{field: getattr(NO_OVERHEADS, field)}))
    assert 145e3 < without < hours()


@pytest.mark.parametrize("field", ["gemm", "attention", "hbm", "ib", "compute_sms"])
def test_a_faster_machine_costs_fewer_hours(field):
    quick = H800._replace(**{field: 1.1 * getattr(H800, field)})
    assert hours(rates=quick) < hours()


def test_failures_and_the_slowest_gpu_stretch_a_run():
    assert wall_clock_factor(NO_OVERHEADS, 2048) == 1
    overheads = NO_OVERHEADS._replace(straggler_factor=1.5, failure_rate=1e-4, hours_lost=2.0)
    assert wall_clock_factor(overheads, 1000) == pytest.approx(1.5 * 1.2)
    rate = Overheads().failure_rate * 16384 * 54 * 24  # of the run from which it is taken
    assert rate == pytest.approx(419)


def test_the_report_spent_what_its_table_says():
    rows = {"pre-training": 14.8 * REPORT_HOURS, "long context": 119e3, "post-training": 5e3}
    assert rows["pre-training"] == 2664e3 and sum(rows.values()) == 2788e3
    assert [round(2 * h / 1e6, 3) for h in (*rows.values(), sum(rows.values()))] == [
        5.328, 0.238, 0.01, 5.576,
    ]  # fmt: skip


def test_a_pair_takes_at_least_the_longer_sum_and_at_most_both():
    draw = random.Random(0).random
    for _ in range(200):
        a, e = (BlockTime(draw(), draw(), draw(), 0) for _ in range(2))
        dispatch, combine = draw(), draw()
        compute, link = sum(a[:3]) + sum(e[:3]), 2 * (dispatch + combine)
        got = overlapped_pair_time(a, e, dispatch, combine, 200)
        assert max(compute, link) - 1e-9 <= got <= compute + link + 1e-9
    nothing = BlockTime(0, 0, 0, 0)
    assert overlapped_pair_time(nothing, nothing, 1, 2) == pytest.approx(6)
    assert overlapped_pair_time(BlockTime(1, 2, 3, 0), nothing, 0, 0) == pytest.approx(6)


def test_order_costs_most_where_links_and_computation_are_equal():
    factors = [
        pair_factor(V3, H800._replace(ib=ib * 1e9), 4096, MOVES, Overheads()) for ib in (5, 25, 200)
    ]
    assert max(factors[0], factors[2]) < factors[1] < 1.2 and min(factors) > 1 - 1e-9


def test_rows_cross_ib_once_per_node_and_nvlink_once_per_gpu():
    limited = [dispatch_copies(replace(V3, n_limited_groups=m), 64, 8, 1024) for m in (1, 2, 4, 8)]
    for copies_over_link in zip(*limited):
        assert all(a < b for a, b in pairwise(copies_over_link))
    assert limited[0][0] == pytest.approx(7 / 8, abs=0.03)  # one node, rarely its own
    assert link_seconds(H800, (1, 2), 1e9) == pytest.approx((1 / 50, 2 / 153))
    assert dispatch_bytes(V3) == (7168 + 4 * 56 + 64, 14_336)
    assert dispatch_bytes(V3, fp8=False) == (14_336 + 64, 14_336)


def test_after_the_pipeline_gradients_and_weights_are_sent_and_adamw_moves_its_shard():
    ib, memory = step_tail(H800, {(2, False): 10**9})
    assert ib == pytest.approx((4 + 2) * 1e9 / 2 / 50e9)  # fp32 and bf16
    assert memory == pytest.approx((20 + 2) / 2 * 1e9 / H800.hbm)
    assert step_tail(H800, {(1, True): 10**9})[0] == 0
    assert step_tail(H800, {(4, True): 10**9})[0] == pytest.approx(5 * 0.75e9 / 50e9, rel=1e-4)


def test_more_sms_for_communication_feed_the_links_and_slow_computation():
    few, twenty, many = (with_comm_sms(H800, n, MOVES) for n in (5, 20, 60))
    assert few.ib < twenty.ib == many.ib == H800.ib
    assert few.compute_sms > twenty.compute_sms > many.compute_sms
    assert twenty.compute_sms == pytest.approx(112 / 132)
    assert few.ib / few.nvlink == pytest.approx(MOVES[0] / MOVES[1])


# ── Roofs ──


def test_an_h800_achieves_the_measured_rates_and_others_the_same_fractions():
    assert ACHIEVED_RATES["h800"] == H800 and list(ACHIEVED_RATES) == list(GPU_SPECS)
    assert ACHIEVED_RATES["h200"].gemm == H800.gemm
    assert ACHIEVED_RATES["h200"].hbm == pytest.approx(0.85 * 4.8e12)
    assert ACHIEVED_RATES["b200"].gemm == pytest.approx(4500 / 1979 * 1358e12)
    for name in GPU_SPECS:
        m = ACHIEVED_RATES[name]
        assert m.gemm < GPU_SPECS[name].fp8 and m.hbm < GPU_SPECS[name].hbm


def test_the_bottleneck_sets_the_time_of_an_operator():
    m = H800._replace(gemm=2e12, attention=1e12, hbm=1e12, ib=1e9)
    compute_bound = Operator(4e12, 1e12)
    assert compute_bound.seconds(m) == 2 and compute_bound.bottleneck(m) == "operations"
    assert Operator(4e12, 1e12, "bf16").seconds(m) == 4
    assert Operator(1e9, 3e12).seconds(m) == 3 and Operator(1e9, 3e12).bottleneck(m) == "memory"
    assert Operator(0, 5e9, "ib").times_by_limit(m) == {"ib": 5}


@pytest.mark.parametrize("dense", [True, False])
def test_operators_have_the_operations_of_the_products(dense):
    ops = operators(V3, dense, 4096, 2048.5, MOVES, 4)
    for name, p in block_gemms(V3, dense).items():
        assert ops[name].flops == 4096 * p.flops
    assert ops["attention"].flops == 4096 * 128 * 4097 * (192 + 128)
    assert ("all-to-all, ib" in ops) is not dense
    if not dense:
        sent = 4096 * MOVES[0] * sum(dispatch_bytes(V3))
        assert ops["all-to-all, ib"].bytes == pytest.approx(sent)
        assert ops["routed w2"].bytes == 4 * 7168 * 2048 + 8 * 4096 * (2048 + 2 * 7168)


def test_absorbed_attention_reads_each_cached_number_once_for_all_heads():
    op = attention_operator(V3, 10, 4096, True)
    assert op.flops == 2 * 10 * 128 * 4096 * (512 + 512 + 64)
    cache = 10 * 4096 * count_params(V3).cache_bytes / 61
    assert cache < op.bytes < 1.15 * cache
    quarter = attention_operator(replace(V3, n_heads=32), 10, 4096, True)
    assert quarter.bottleneck(H800) == "memory" and op.bottleneck(H800) == "operations"


def test_training_is_compute_bound_and_decoding_memory_bound():
    training = operators(V3, False, 4096, 2048, MOVES, 4)
    few = operators(V3, False, 8, 1, (0, 0), 4)
    for name in ("wo", "wq_b", "routed w1, w3", "routed w2"):
        assert training[name].bottleneck(H800) == "operations"
        assert few[name].bottleneck(H800) == "memory"
    one = block_time(V3, H800, False, 4096, MOVES)
    assert 0.5 < one.comm / one.f < 1.2  # the report: about 1


# ── Serving ──


def test_the_units_are_those_of_the_report():
    assert (PREFILL.gpus, PREFILL.tp, PREFILL.experts_per_gpu) == (32, 4, 9)
    assert (DECODE.gpus, DECODE.tp, DECODE.experts_per_gpu) == (320, 4, 1)
    assert DECODE.gpus // DECODE.tp == 80 and DECODE.gpus - 256 == 64


def main_model_sizes(config: Config) -> dict[str, torch.Tensor]:
    """Return name → parameter or buffer of the model without MTP, without allocating any."""
    with torch.device("meta"):
        return Transformer(replace(config, n_mtp_layers=0)).state_dict()


def test_weights_are_counted_to_the_last_number():
    assert model_bytes(V3, "bf16") == 2 * count_params(V3).total
    assert 670e9 < model_bytes(V3, "fp8") < 676e9


def test_fp8_is_for_all_matrices_of_blocks_but_the_gates():
    sizes = main_model_sizes(V3)
    quantized = sum(
        x.numel() for name, x in sizes.items()
        if name.startswith("layers.") and x.ndim > 1 and not name.endswith("gate.weight")
    )  # fmt: skip
    others = sum(x.numel() for x in sizes.values()) - quantized
    assert model_bytes(V3, "fp8") == quantized * (1 + 4 / 128**2) + 2 * others


@pytest.mark.parametrize("q_lora_rank", [V3.q_lora_rank, 0])
def test_one_gpu_holds_all_weights_but_norms_and_gate_biases(q_lora_rank):
    config = replace(V3, q_lora_rank=q_lora_rank)
    matrices = sum(x.numel() for x in main_model_sizes(config).values() if x.ndim > 1)
    assert weight_bytes(config, DeploymentUnit(1, 1, 256), "bf16") == 2 * matrices


def test_v3_fits_eight_h200_in_fp8_and_not_in_bf16():
    h200 = ACHIEVED_RATES["h200"]
    assert min_gpus(V3, h200, "fp8", 1e6) == 8 and min_gpus(V3, h200, "bf16", 1e6) == 16
    assert min_gpus(V3, H800, "fp8", 0) == 16 and min_gpus(V3, H800, "bf16", 0) == 24
    assert min_gpus(V3, H800, "fp8", 2e7) > min_gpus(V3, H800, "fp8", 0)


def test_the_cache_that_fits_halves_with_twice_the_context():
    half = max_batch(V3, H800, DECODE, 4096) // 2
    assert max_batch(V3, H800, DECODE, 8192) in (half, half + 1)
    assert max_batch(V3, H800, DECODE, 1e9) == 0
    rows_per_expert = 9 / 4 * max_batch(V3, H800, DECODE, 4096)
    assert rows_per_expert == pytest.approx(256, rel=0.1)


def test_a_row_is_sent_to_each_of_nine_experts_over_ib():
    n, balanced = 28, Overheads()._replace(load_imbalance=1.0)
    got = all_to_all_time(V3, H800, DECODE._replace(latency_s=0, ib_efficiency=1), n, balanced)
    assert got == pytest.approx(n * 9 * 319 / 320 * (7456 + 14_336) / 50e9)
    # DeepEP: 128 tokens to 8 of 256 ranks take 194 + 360 µs
    deep_ep = all_to_all_time(V3, H800, DECODE._replace(shared_is_routed=False), 128, balanced)
    assert deep_ep == pytest.approx(554e-6, rel=0.1)


def test_more_sequences_are_cheaper_and_more_context_is_more_expensive():
    rates = [decode_throughput(V3, H800, b, 4096).tokens_per_s for b in (4, 16, 64, 112)]
    assert rates == sorted(rates)
    rates = [decode_throughput(V3, H800, 16, s).tokens_per_s for s in (1024, 8192, 65_536)]
    assert rates == sorted(rates, reverse=True)
    rates = [prefill_throughput(V3, H800, 4096, s).tokens_per_s for s in (1024, 8192, 65_536)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_no_other_gpu_serves_slower_than_an_h800(name):
    rates = ACHIEVED_RATES[name]
    for throughput, n in ((decode_throughput, 112), (prefill_throughput, 4096)):
        h800 = throughput(V3, H800, n, 4096).tokens_per_s
        assert throughput(V3, rates, n, 4096).tokens_per_s > h800


def test_a_step_writes_a_token_for_each_sequence_of_both_micro_batches():
    s = decode_throughput(V3, H800, 100, 4096)
    assert s.tokens_per_s == pytest.approx(2 * 100 / 4 / s.step)
    assert s.step > 2 * 58 * max(s.attention, s.mlp + s.all_to_all)
    p = prefill_throughput(V3, H800, 4096, 4096)
    assert p.tokens_per_s == pytest.approx(2 * 4096 / p.step)
    assert dollars_per_million_tokens(H800, 1e6 / 3600) == pytest.approx(2)


@pytest.mark.parametrize("throughput", [prefill_throughput, decode_throughput])
def test_the_width_of_experts_costs_nothing_where_all_layers_are_dense(throughput):
    def step(**changes):
        config = replace(V3, n_dense_layers=V3.n_layers, **changes)
        return throughput(config, H800, 100, 4096).step

    assert step(moe_inter_dim=4096) == step()
    assert step(inter_dim=2 * V3.inter_dim) > step()


def test_four_gpus_halve_no_cache_and_send_tokens_to_each_other():
    one, four = DeploymentUnit(320, 1, 1), DECODE
    assert tp_gather_time(V3, H800, one, 112) == 0
    assert tp_gather_time(V3, H800, four, 112) == pytest.approx(2 * 0.75 * 112 * 2 * 7168 / 153e9)
    caches = 112 * 131_072 * 576 * 2 / H800.hbm  # read by each of the four
    assert attention_time(V3, H800, four, 112, 131_072, True) > caches


def test_an_experts_weights_are_read_for_one_row_as_for_many():
    one, some = (mlp_time(V3, H800, DECODE, n, False, Overheads()) for n in (1, 16))
    assert some < 1.5 * one
    assert mlp_time(V3, H800, DECODE, 4096, False, Overheads()) > 100 * one


# ── The command ──


def test_hardware_sets_every_rate_that_is_not_an_option():
    p = PlanConfig(hardware="h200", rates=AchievedRates(ib=25e9))
    assert p.rates == ACHIEVED_RATES["h200"]._replace(ib=25e9)
    assert PlanConfig().rates == H800
    assert replace(p, global_batch_size=128).rates == p.rates


def test_units_are_printed(capsys):
    assert main(["plan", "--unit", "decode", "--hardware", "h200", "--context", "16384"]) == 0
    out = capsys.readouterr().out
    assert "v3, decode unit of 320 H200: 80 groups of TP4, 1 routed experts per GPU" in out
    assert "tokens/s per GPU" in out and "per million tokens at $2 per GPU hour" in out
    assert main(["plan", "--unit", "prefill"]) == 0
    assert "prefill unit of 32 H800: 8 groups of TP4, 9 routed experts" in capsys.readouterr().out


def test_the_training_plan_names_its_hardware_and_its_overheads(capsys):
    argv = ["plan", "--hardware", "b200", "--overheads.load-imbalance", "1.3", "--config", "small"]
    argv += "--pp 2 --ep 4 --dp 1 --global-batch-size 64 --schedule 1f1b".split()
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "small on 8 B200" in out and "load_imbalance 1.3" in out and "without overheads" in out


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--unit", "decode", "--context", "10000000"], "no sequence of 10,000,000 tokens fits"),
        (
            ["--unit", "prefill", "--config", "small"],
            "a prefill unit needs n_routed_experts to be a multiple of 32, not 24",
        ),
        (["--unit", "decode", "--context", "0"], "--context must be at least 1"),
    ],
)
def test_an_impossible_unit_is_refused_in_a_sentence(options, sentence, capsys):
    assert main(["plan", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_any_config_may_be_served():
    unit = DeploymentUnit(30, 4, 1, True)
    small = decode_throughput(SMALL, H800, 8, 1024, unit).tokens_per_s
    assert small > decode_throughput(V3, H800, 8, 1024).tokens_per_s
