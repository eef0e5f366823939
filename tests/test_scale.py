"""The arithmetic of chapters 17 and 20: the report's numbers, limits, directions, units."""

import random
from dataclasses import replace

import pytest

from dsv3_ref.cli.main import main
from dsv3_ref.cluster.plan import REPORT, Plan, estimate
from dsv3_ref.config import SMALL, V3, count_params
from dsv3_ref.inference_scale import (
    DECODE,
    PREFILL,
    Unit,
    attention,
    decode,
    dollars,
    exchange,
    gather,
    held,
    mlp,
    prefill,
    room,
    smallest,
    weights,
)
from dsv3_ref.scale import (
    IDEAL,
    MACHINES,
    SHEETS,
    Losses,
    Machine,
    Operator,
    Seconds,
    core,
    hops,
    lend,
    operators,
    overlapped,
    pair_factor,
    products,
    row_bytes,
    seconds,
    stretched,
    tail,
    trips,
)

H800 = Machine()
MOVES = trips(V3, 64, 8)


def hours(loss=None, **more) -> float:
    return estimate(Plan(losses=loss or Losses(), **more)).hours


# ── Training ──


def test_the_bill_from_first_principles_is_within_a_tenth_of_the_report():
    assert abs(hours() / REPORT - 1) < 0.10
    assert 140e3 < hours(IDEAL) < 150e3


@pytest.mark.parametrize("field", ["shapes", "imbalance", "stream", "gap", "slowest", "lost"])
def test_every_loss_costs_something_and_its_absence_never_does(field):
    without = hours(Losses()._replace(**{field: getattr(IDEAL, field)}))
    assert 145e3 < without < hours()


@pytest.mark.parametrize("field", ["product", "attention", "copy", "ib", "sms"])
def test_a_faster_machine_costs_fewer_hours(field):
    quick = H800._replace(**{field: 1.1 * getattr(H800, field)})
    assert hours(machine=quick) < hours()


def test_failures_and_the_slowest_gpu_stretch_a_run():
    assert stretched(IDEAL, 2048) == 1
    loss = IDEAL._replace(slowest=1.5, failures=1e-4, lost=2.0)
    assert stretched(loss, 1000) == pytest.approx(1.5 * 1.2)
    rate = Losses().failures * 16384 * 54 * 24  # of the run from which it is taken
    assert rate == pytest.approx(419)


def test_the_report_spent_what_its_table_says():
    rows = {"pre-training": 14.8 * REPORT, "long context": 119e3, "post-training": 5e3}
    assert rows["pre-training"] == 2664e3 and sum(rows.values()) == 2788e3
    assert [round(2 * h / 1e6, 3) for h in (*rows.values(), sum(rows.values()))] == [
        5.328, 0.238, 0.01, 5.576,
    ]  # fmt: skip


def test_two_clocks_never_beat_the_longer_sum_nor_lose_to_one_after_the_other():
    draw = random.Random(0).random
    for _ in range(200):
        a, e = (Seconds(draw(), draw(), draw(), 0) for _ in range(2))
        out, back = draw(), draw()
        compute, link = sum(a[:3]) + sum(e[:3]), 2 * (out + back)
        got = overlapped(a, e, out, back, 200)
        assert max(compute, link) - 1e-9 <= got <= compute + link + 1e-9
    nothing = Seconds(0, 0, 0, 0)
    assert overlapped(nothing, nothing, 1, 2) == pytest.approx(6)
    assert overlapped(Seconds(1, 2, 3, 0), nothing, 0, 0) == pytest.approx(6)


def test_order_costs_most_where_links_and_computation_are_equal():
    factors = [
        pair_factor(V3, H800._replace(ib=ib * 1e9), 4096, MOVES, Losses()) for ib in (5, 25, 200)
    ]
    assert max(factors[0], factors[2]) < factors[1] < 1.2 and min(factors) > 1 - 1e-9


def test_rows_go_by_ib_once_a_node_and_by_nvlink_once_a_gpu():
    limited = [trips(replace(V3, n_limited_groups=m), 64, 8, 1024) for m in (1, 2, 4, 8)]
    assert all(a < b for x, y in zip(limited, limited[1:]) for a, b in zip(x, y))
    assert limited[0][0] == pytest.approx(7 / 8, abs=0.03)  # one node, seldom one's own
    assert hops(H800, (1, 2), 1e9) == pytest.approx((1 / 50, 2 / 153))
    assert row_bytes(V3) == (7168 + 4 * 56 + 64, 14_336)


def test_what_follows_the_pipeline_is_sent_twice_and_moved_once():
    ib, memory = tail(H800, {(2, False): 10**9})
    assert ib == pytest.approx(2 * 4 * 1e9 / 2 / 50e9)
    assert memory == pytest.approx(10e9 / H800.copy)
    assert tail(H800, {(1, True): 10**9})[0] == 0


def test_lent_sms_feed_the_links_and_slow_the_rest():
    few, twenty, many = (lend(H800, n, MOVES) for n in (5, 20, 60))
    assert few.ib < twenty.ib == many.ib == H800.ib
    assert few.sms > twenty.sms > many.sms and twenty.sms == pytest.approx(112 / 132)
    assert few.ib / few.nvlink == pytest.approx(MOVES[0] / MOVES[1])


# ── Roofs ──


def test_an_h800_reaches_what_was_measured_and_others_the_same_shares():
    assert MACHINES["h800"] == H800 and list(MACHINES) == list(SHEETS)
    assert MACHINES["h200"].product == H800.product
    assert MACHINES["h200"].copy == pytest.approx(0.85 * 4.8e12)
    assert MACHINES["b200"].product == pytest.approx(4500 / 1979 * 1358e12)
    for name in SHEETS:
        m = MACHINES[name]
        assert m.product < SHEETS[name].fp8 and m.copy < SHEETS[name].hbm


def test_an_operator_takes_what_binds():
    m = H800._replace(product=2e12, attention=1e12, copy=1e12, ib=1e9)
    assert Operator(4e12, 1e12).seconds(m) == 2 and Operator(4e12, 1e12).limit(m) == "operations"
    assert Operator(4e12, 1e12, "bf16").seconds(m) == 4
    assert Operator(1e9, 3e12).seconds(m) == 3 and Operator(1e9, 3e12).limit(m) == "memory"
    assert Operator(0, 5e9, "ib").times(m) == {"ib": 5}


@pytest.mark.parametrize("dense", [True, False])
def test_operators_have_the_operations_of_the_products(dense):
    ops = operators(V3, dense, 4096, 2048.5, MOVES, 4)
    for name, p in products(V3, dense).items():
        assert ops[name].flops == 4096 * p.flops
    assert ops["attention"].flops == 4096 * 128 * 4097 * (192 + 128)
    assert ("all-to-all, ib" in ops) is not dense
    if not dense:
        sent = 4096 * MOVES[0] * sum(row_bytes(V3))
        assert ops["all-to-all, ib"].bytes == pytest.approx(sent)
        assert ops["routed w2"].bytes == 4 * 7168 * 2048 + 8 * 4096 * (2048 + 2 * 7168)


def test_absorbed_attention_reads_each_cached_number_once_for_all_heads():
    op = core(V3, 10, 4096, True)
    assert op.flops == 2 * 10 * 128 * 4096 * (512 + 512 + 64)
    cache = 10 * 4096 * count_params(V3).cache_bytes / 61
    assert cache < op.bytes < 1.15 * cache
    quarter = core(replace(V3, n_heads=32), 10, 4096, True)
    assert quarter.limit(H800) == "memory" and op.limit(H800) == "operations"


def test_training_multiplies_and_decoding_reads():
    training, few = (
        operators(V3, False, 4096, 2048, MOVES, 4),
        operators(V3, False, 8, 1, (0, 0), 4),
    )
    for name in ("wo", "wq_b", "routed w1, w3", "routed w2"):
        assert training[name].limit(H800) == "operations" and few[name].limit(H800) == "memory"
    one = seconds(V3, H800, False, 4096, MOVES)
    assert 0.5 < one.comm / one.f < 1.2  # the report: about 1


# ── Serving ──


def test_the_units_are_those_of_the_report():
    assert (PREFILL.gpus, PREFILL.tp, PREFILL.held) == (32, 4, 9)
    assert (DECODE.gpus, DECODE.tp, DECODE.held) == (320, 4, 1)
    assert DECODE.gpus // DECODE.tp == 80 and DECODE.gpus - 256 == 64


def test_weights_are_counted_to_the_last_number():
    assert weights(V3, "bf16") == 2 * count_params(V3).total
    assert 670e9 < weights(V3, "fp8") < 676e9
    whole = held(V3, Unit(1, 1, 256), "bf16")  # norms and gate biases apart
    assert whole == pytest.approx(weights(V3, "bf16"), rel=1e-5)


def test_v3_fits_eight_h200_in_fp8_and_not_in_bf16():
    h200 = MACHINES["h200"]
    assert smallest(V3, h200, "fp8", 1e6) == 8 and smallest(V3, h200, "bf16", 1e6) == 16
    assert smallest(V3, H800, "fp8", 0) == 16 and smallest(V3, H800, "bf16", 0) == 24
    assert smallest(V3, H800, "fp8", 2e7) > smallest(V3, H800, "fp8", 0)


def test_the_cache_that_fits_halves_with_twice_the_context():
    assert room(V3, H800, DECODE, 8192) in (room(V3, H800, DECODE, 4096) // 2 + i for i in (0, 1))
    assert room(V3, H800, DECODE, 1e9) == 0
    assert 9 / 4 * room(V3, H800, DECODE, 4096) == pytest.approx(256, rel=0.1)  # rows an expert


def test_a_row_is_sent_to_each_of_nine_experts_over_ib():
    n, loss = 28, Losses()._replace(imbalance=1.0)
    got = exchange(V3, H800, DECODE._replace(latency=0, reach=1), n, loss)
    assert got == pytest.approx(n * 9 * 319 / 320 * (7456 + 14_336) / 50e9)
    # DeepEP: 128 tokens to 8 of 256 ranks take 194 + 360 µs
    deep_ep = exchange(replace(V3, n_shared_experts=0), H800, DECODE, 128, loss)
    assert deep_ep == pytest.approx(554e-6, rel=0.1)


def test_more_sequences_are_cheaper_and_more_context_is_dearer():
    rates = [decode(V3, H800, b, 4096).rate for b in (4, 16, 64, 112)]
    assert rates == sorted(rates)
    rates = [decode(V3, H800, 16, s).rate for s in (1024, 8192, 65_536)]
    assert rates == sorted(rates, reverse=True)
    rates = [prefill(V3, H800, 4096, s).rate for s in (1024, 8192, 65_536)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_no_other_gpu_serves_slower_than_an_h800(name):
    m = MACHINES[name]
    assert decode(V3, m, 112, 4096).rate > decode(V3, H800, 112, 4096).rate
    assert prefill(V3, m, 4096, 4096).rate > prefill(V3, H800, 4096, 4096).rate


def test_a_step_writes_a_token_for_each_sequence_of_both_micro_batches():
    s = decode(V3, H800, 100, 4096)
    assert s.rate == pytest.approx(2 * 100 / 4 / s.step)
    assert s.step > 2 * 58 * max(s.attention, s.mlp + s.exchange)
    p = prefill(V3, H800, 4096, 4096)
    assert p.rate == pytest.approx(2 * 4096 / p.step)
    assert dollars(H800, 1e6 / 3600) == pytest.approx(2)


def test_four_gpus_halve_no_cache_and_send_tokens_to_each_other():
    one, four = Unit(320, 1, 1), DECODE
    assert gather(V3, H800, one, 112) == 0
    assert gather(V3, H800, four, 112) == pytest.approx(2 * 0.75 * 112 * 2 * 7168 / 153e9)
    caches = 112 * 131_072 * 576 * 2 / H800.copy  # read by each of the four
    assert attention(V3, H800, four, 112, 131_072, True) > caches


def test_an_experts_weights_are_read_for_one_row_as_for_many():
    one, some = (mlp(V3, H800, DECODE, n, False, Losses()) for n in (1, 16))
    assert some < 1.5 * one
    assert mlp(V3, H800, DECODE, 4096, False, Losses()) > 100 * one


# ── The command ──


def test_hardware_gives_every_rate_that_was_not_given():
    p = Plan(hardware="h200", machine=Machine(ib=25e9))
    assert p.machine == MACHINES["h200"]._replace(ib=25e9)
    assert Plan().machine == H800
    assert replace(p, global_batch_size=128).machine == p.machine


def test_units_are_printed(capsys):
    assert main(["plan", "--unit", "decode", "--hardware", "h200", "--context", "16384"]) == 0
    said = capsys.readouterr().out
    assert "v3, decode unit of 320 H200: TP4, 80 groups, 1 routed experts a GPU" in said
    assert "tokens/s and GPU" in said and "a million tokens at $2 an hour" in said
    assert main(["plan", "--unit", "prefill"]) == 0
    assert "prefill unit of 32 H800: TP4, 8 groups, 9 routed experts" in capsys.readouterr().out


def test_training_names_its_hardware_and_its_losses(capsys):
    argv = ["plan", "--hardware", "b200", "--losses.imbalance", "1.3", "--config", "small"]
    argv += [
        "--pp",
        "2",
        "--ep",
        "4",
        "--dp",
        "1",
        "--global-batch-size",
        "64",
        "--schedule",
        "1f1b",
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "small on 8 B200" in said and "imbalance 1.3" in said and "without losses" in said


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--unit", "decode", "--context", "10000000"], "no sequence of 10,000,000 tokens fits"),
        (["--unit", "prefill", "--config", "small"], "a prefill unit needs a multiple of 32"),
        (["--unit", "decode", "--context", "0"], "every size must be at least 1"),
    ],
)
def test_a_unit_that_cannot_be_is_refused_in_a_sentence(options, sentence, capsys):
    assert main(["plan", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_any_config_may_be_served():
    assert decode(SMALL, H800, 8, 1024, Unit(30, 4, 1, True)).rate > decode(V3, H800, 8, 1024).rate
