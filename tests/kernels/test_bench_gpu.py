"""The benchmark of the kernels without a GPU: its cases, their costs, the worker, the report."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch

from dsv3_ref import fp8, ops
from dsv3_ref.kernels.bench import (
    attention_cases,
    calls,
    command,
    layer_cases,
    matmul_cases,
    memory_bound_cases,
    report,
    suite,
    timing,
    worker,
)
from dsv3_ref.kernels.bench.case import Case, Timing, roofline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {case.name: case for case in suite.all_cases(128)}
CASES = {case.name: case for case in suite.all_cases()}
LIMITS = {"copy": 3000.0, "bf16": 700.0, "fp8": 1400.0}
GPU = timing.GPUInfo("a card", "1.2", LIMITS)


def make_timing(name: str, **result) -> Timing:
    return CASES[name].make_timing(**result)


HEADLINE = "fp8_gemm m=4096 n=7168 k=16384"
DECODE = "paged_attention b=128 t=4096 h=32"
GROUPED = "fp8_grouped_gemm e=8 m=32768 n=4096 k=7168 rows=even"
DENSE = "fp8_gemm m=4096 n=4096 k=7168"

# ── The list ──


def test_no_two_cases_share_a_name():
    assert len(CASES) == len(suite.all_cases())
    assert len(SMALL) > 60


def test_a_dry_run_lists_every_kernel(capsys):
    assert command.main(["--dry-run"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    with ops.use("triton", "torch"):
        kernels = {name for name, impls in ops.IMPLS.items() if "triton" in impls}
    assert kernels <= listed
    assert listed - kernels == {"case", "moe_step", "dispatch", "combine"}


def test_a_dry_run_shows_bytes_and_work(capsys):
    command.main(["--dry-run", "--only", HEADLINE])
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(HEADLINE)
    assert line.split()[4:7] == ["0.2454", "0.9621", "fp8"]
    assert "1000 TFLOP/s, 1.4 × cuBLAS bf16" in line


def test_only_selects_cases_and_rejects_unknown_names(capsys):
    assert [c.name for c in command.parse_bench_args(["--only", DECODE]).cases] == [DECODE]
    two = command.parse_bench_args(["--only", "group_limited_topk", "apply_rotary_emb"]).cases
    assert {c.kind for c in two} == {"group_limited_topk", "apply_rotary_emb"}
    with pytest.raises(SystemExit):
        command.parse_bench_args(["--only", "chose"])
    assert "no case has chose in its name" in capsys.readouterr().err


# ── Costs by hand ──


@pytest.mark.parametrize(
    "case, moved, flops",
    [
        # FP8 values 4·256 and 6·256, bf16 4·6 out; scales of 4·2 tiles and 1·2 blocks
        (matmul_cases.case_fp8_gemm(4, 6, 256), 1024 + 1536 + 48 + 32 + 8, 12_288),
        # 128 rows of 6 and 10 columns in FP8, a scale per column, fp32 out
        (matmul_cases.case_fp8_wgrad(128, 6, 10), 128 * 16 + 4 * 16 + 240, 15_360),
        # 2 experts: FP8 values 4·256, 2·6·256, bf16 out, scales of 8 tiles and 2·2 blocks
        (
            matmul_cases.case_fp8_grouped_gemm(2, 4, 6, 256, False),
            1024 + 3072 + 48 + 32 + 16,
            12_288,
        ),
        (matmul_cases.case_grouped_linear(2, 4, 6, 10, False), 2 * (40 + 120 + 24), 480),
        (matmul_cases.case_grouped_linear_backward(2, 4, 6, 10, False), 2 * (24 + 240 + 80), 960),
        (matmul_cases.case_fp8_grouped_wgrad(2, 256, 6, 10, False), 2 * 132 * 16 + 480, 30_720),
        (memory_bound_cases.case_act_quant(2, 130), 520 + 260 + 16, 0),
        (memory_bound_cases.case_e5m6_quant(2, 130), 520 + 2 * 2 * 196, 0),
        (memory_bound_cases.case_e5m6_restore(2, 130), 520 + 2 * 2 * 196, 0),
        (memory_bound_cases.case_weight_quant(130, 10, torch.float32), 5200 + 1300 + 8, 0),
        (memory_bound_cases.case_act_quant_transposed(1, 130, 10), 2600 + 2560 + 80, 0),
        (
            memory_bound_cases.case_requant_transposed(3, 130, 10),
            1300 + 520 + 10 * (4 * 128 + 16),
            0,
        ),
        (memory_bound_cases.case_rms_norm(2, 10), 40 + 40 + 40, 0),
        (memory_bound_cases.case_rms_norm_backward(2, 10), 3 * 40 + 80, 0),
        (memory_bound_cases.case_rms_norm_quant(2, 10), 40 + 40 + 20 + 8 + 40, 0),
        (memory_bound_cases.case_swiglu(2, 10), 120, 0),
        (memory_bound_cases.case_swiglu_backward(2, 10), 200, 0),
        (memory_bound_cases.case_swiglu_quant(2, 10), 80 + 20 + 8, 0),
        # g, two gradients; gate and up in FP8 with 2 scales per row; 2 tiles of 10 columns
        (
            memory_bound_cases.case_swiglu_quant_backward(1, 130, 10),
            2600 + 5200 + 2 * (1300 + 520) + 20 * 132,
            0,
        ),
        (
            memory_bound_cases.case_apply_rotary_emb(3, 2),
            2 * (2 * 3 * 2 * 64) + 2 * (4 * 3 * 32),
            0,
        ),
        (memory_bound_cases.case_group_limited_topk(3, 16, 2), 192 + 48, 0),
        (memory_bound_cases.case_permute(3, 10, 4, 2), 60 + 120 + 48, 0),
        (memory_bound_cases.case_unpermute(3, 10, 4, 2), 120 + 60 + 12 + 48, 0),
        (memory_bound_cases.case_unpermute_backward(3, 10, 4, 2), 60 + 120 + 120 + 12 + 12 + 48, 0),
        # 2 heads, 8·8/2 pairs: q·k of 192 and p·v of 128, multiply and add
        (attention_cases.case_attention(8, 2), 2 * 8 * 2 * (192 + 192 + 128 + 128), 2 * 64 * 320),
        (
            attention_cases.case_attention_backward(8, 2),
            4 * 8 * 2 * (192 + 192 + 128 + 128),
            2 * 64 * 832,
        ),
        (attention_cases.case_varlen_attention(3, 8, 2), 3 * 2 * 16 * 640, 3 * 2 * 64 * 320),
        # 576 numbers per position; queries of 576 and outputs of 512 for 2 heads
        (
            attention_cases.case_paged_attention(3, 5, 2),
            2 * (3 * 5 * 576 + 3 * 2 * 1088),
            2 * 3 * 2 * 5 * 1088,
        ),
        (
            attention_cases.case_latent_attention(3, 5, 2),
            2 * (3 * 5 * 576 + 3 * 2 * 1088),
            2 * 3 * 2 * 5 * 1088,
        ),
        (layer_cases.case_linear_cross_entropy(3, 10, 7), 2 * 2 * (30 + 70), 3 * 2 * 210),
        # 8 of 16 experts and the shared one: 27 matrices; fp32 weights read, gradients written
        (
            layer_cases.case_moe_step(1, 2, 16, 10, 4),
            8 * (17 * 120 + 160) + 2 * 4 * 20,
            6 * 2 * (9 * 120 + 160),
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_bytes_and_flops_equal_those_counted_by_hand(case, moved, flops):
    assert (case.bytes, case.flops) == (moved, flops)


@pytest.mark.parametrize("e, m", [(8, 32), (256, 32768), (4, 3), (7, 100)])
def test_counts_add_up(e, m):
    even, skewed = calls.expert_counts(e, m), calls.expert_counts(e, m, True)
    assert even.sum() == skewed.sum() == m
    assert even.max() - even.min() <= 1
    assert m < e or skewed.max() > 1.5 * m / e


# ── Every case runs at a small size ──


@pytest.mark.parametrize("name", SMALL)
def test_a_case_can_be_made_and_called(name, monkeypatch):
    monkeypatch.setattr(calls, "KERNEL_BACKENDS", ("torch",))
    kernel, yardsticks = timing.prepare_calls(SMALL[name], "cpu")
    want = [t.shape for t in timing.as_results(kernel())]
    working, errors = timing.warm_up_yardsticks(yardsticks)
    assert set(errors) <= {"scaled_mm rows", "scaled_mm blocks", "SDPA cuDNN"}, errors  # need a GPU
    for yardstick, call in working.items():
        shapes = [t.shape for t in timing.as_results(call())]
        assert [x[:-1] for x in shapes] == [x[:-1] for x in want]
        assert "SDPA" in yardstick or shapes == want  # which pads values to the width of keys


FIRST = {c.kind: c for c in reversed(SMALL.values()) if c.kind != "moe_step"}  # slow to interpret


@pytest.mark.parametrize("kind", FIRST)
def test_a_kernel_and_its_yardsticks_compute_the_same(kind):
    case = FIRST[kind]
    kernel, yardsticks = timing.prepare_calls(case, DEVICE)
    got, (working, _) = kernel(), timing.warm_up_yardsticks(yardsticks)
    assert working
    for name, call in working.items():
        assert timing.relative_difference(got, call()) < case.tolerance, name


def test_the_difference_of_results():
    x = torch.tensor([[3.0, 4.0]])
    assert timing.relative_difference(x, x) == 0
    assert timing.relative_difference((x, x * 1.1), (x, x)) == pytest.approx(0.1)
    assert timing.relative_difference(torch.nn.functional.pad(x, (0, 3)), x) == 0  # padding is cut
    assert timing.relative_difference(x * 0, x * 0) == 0
    assert timing.relative_difference(x, x * 0) == 5
    assert math.isnan(timing.relative_difference((x * float("nan"), x), (x, x)))
    with pytest.raises(ValueError, match="argument"):
        timing.relative_difference((x, x), x)


@pytest.mark.parametrize("difference, is_right", [(0.01, 1), (0.02, 1), (0.03, 0), (math.nan, 0)])
def test_a_wrong_result_is_an_error(difference, is_right):
    got = replace(CASES[DECODE], tolerance=0.02).make_timing(1.0, difference=difference)
    assert (got.error == "") == is_right
    assert ("failed: wrong by " in report.format_row(got, LIMITS)) != is_right


def test_a_backward_case_runs_backward_only():
    x, forwards = torch.randn(3, requires_grad=True), []
    run = calls.backward_call(lambda x: forwards.append(1) or x * x, (x,))
    (first,), (second,) = run(), run()
    assert len(forwards) == 1
    assert torch.equal(first, second)


def test_the_step_quantizes_its_input_each_time(monkeypatch):
    monkeypatch.setattr(calls, "KERNEL_BACKENDS", ("torch",))
    case = SMALL[next(name for name in SMALL if name.startswith("moe_step"))]
    step, _ = timing.prepare_calls(case, "cpu")
    quantized, act_quant = [], fp8.act_quant
    monkeypatch.setattr(fp8, "act_quant", lambda x, *a: quantized.append(x) or act_quant(x, *a))
    step()
    n = len(quantized)
    step()
    assert n > 5
    assert len(quantized) == 2 * n


# ── No GPU, and failures ──


def test_without_a_gpu_it_reports_that():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "dsv3_ref.kernels.bench"]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no CUDA GPU to time kernels on; --dry-run lists the cases\n"


def broken(*_):
    raise RuntimeError("out of memory\nand details")


@pytest.fixture
def no_cuda_calls(monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(calls, "KERNEL_BACKENDS", ("torch",))


def test_a_failing_case_is_a_row(no_cuda_calls):
    got = timing.try_case(replace(CASES[DENSE], make=broken), 1)
    assert got.ms is None
    assert got.error == "RuntimeError: out of memory\nand details"
    assert not got.fatal
    assert report.format_row(got, LIMITS).endswith("failed: RuntimeError: out of memory")


def test_the_loss_of_a_gpu_is_noticed(no_cuda_calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert timing.try_case(replace(CASES[DENSE], make=broken), 1).fatal


def test_a_case_too_large_for_the_gpu_is_skipped(no_cuda_calls):
    got = timing.try_case(CASES["paged_attention b=128 t=131072 h=32"], 1)
    assert got.skipped == "needs 23.2 GB, 1.0 are free"
    assert not got.error
    assert "skipped: needs" in report.format_row(got, LIMITS)


def test_a_yardstick_that_raises_is_reported_by_its_error():
    working, errors = timing.warm_up_yardsticks({"fine": lambda: 1, "bad": broken})
    assert list(working) == ["fine"]
    assert errors == {"bad": "RuntimeError: out of memory"}


# ── The clock ──


class FakeEvent:
    """An event on a clock that only calls advance."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, end) -> float:
        return end.at - self.at


@pytest.fixture
def fake_clock(no_cuda_calls, monkeypatch):
    """Time calls with `FakeEvent`, on the CPU."""
    zeros, prepare = torch.zeros, timing.prepare_calls
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timing, "prepare_calls", lambda case, device: prepare(case, "cpu"))


def spending(name: str, costs: list, log: list):
    def call():
        log.append(name)
        FakeEvent.now += costs[len(log) // 2 % len(costs)]

    return call


def test_calls_take_turns_and_the_median_counts(fake_clock):
    log = []
    by_name = {"a": spending("a", [1, 2, 100], log), "b": spending("b", [5], log)}
    assert timing.time_gpu_calls(by_name, 3) == {"a": 2, "b": 5}
    assert log == ["a", "b"] * 3


def test_a_case_is_timed_beside_its_yardsticks(fake_clock):
    case = replace(CASES[DENSE], make=lambda: (spending("", [2], []), {"a": broken}))
    got = timing.time_case(case, 3)
    assert (got.ms, got.yardsticks) == (2, {"a": "RuntimeError: out of memory"})
    assert got.difference is None  # nothing to compare with


def test_results_are_compared_and_traffic_has_a_copy_beside_it(fake_clock):
    case, x = CASES["act_quant m=4096 k=7168"], torch.ones(3)
    case = replace(case, make=lambda: (lambda: x * 1.01, {"a": broken, "b": lambda: x}), bytes=8)
    got = timing.time_case(case, 3)
    assert got.difference == pytest.approx(0.01)
    assert list(got.yardsticks) == ["b", "copy", "a"]


def test_times_of_tuned_configs_are_kept():
    tuner = timing.autotuners()[0]
    timing.forget_tuned_configs()
    assert timing.tuned_configs() == {}
    tuner.configs_timings = {tuner.configs[0]: [0.5, 0.4, 0.6]}
    ((name, ms),) = timing.tuned_configs().items()
    assert name == f"{tuner.base_fn.__name__} {tuner.configs[0]}" and ms == 0.5
    timing.forget_tuned_configs()


def test_the_limits_of_a_gpu(fake_clock, monkeypatch):
    def randn(*shape):
        x = torch.ones(1, 1, device="cpu")
        return x[0].expand(2**29) if len(shape) == 1 else x

    monkeypatch.setattr(timing, "randn", randn)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(timing, "driver_version", lambda: "1.2")
    monkeypatch.setattr(
        timing, "time_gpu_calls", lambda by_name, rounds: {"copy": 1.0, "bf16": 2.0}
    )
    limits = timing.describe_gpu(3).limits
    assert limits["copy"] == pytest.approx(2**31 / 1e6)
    assert limits["bf16"] == pytest.approx(8192**3 / 1e9)
    assert limits["fp8"] == 2 * limits["bf16"]


# ── Workers ──


class FakeWorker:
    """A worker whose replies come from a table."""

    made = 0

    def __init__(self, replies):
        self.replies = replies
        FakeWorker.made += 1

    def request(self, name, rounds, seconds):
        reply = self.replies[name]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def kill(self):
        pass


def test_a_worker_that_was_lost_is_replaced():
    FakeWorker.made = 0
    replies = {
        "": GPU,
        HEADLINE: TimeoutError("no reply within 1 s"),
        DENSE: make_timing(DENSE, error="CUDA error", fatal=True),
        DECODE: make_timing(DECODE, ms=0.25),
    }
    cases = [CASES[name] for name in (HEADLINE, DENSE, DECODE)]
    rows = list(worker.run_cases(cases, 1, 1, lambda: FakeWorker(replies)))
    assert all(gpu == GPU for gpu, _ in rows)
    errors = [timing.error for _, timing in rows]
    assert errors == ["TimeoutError: no reply within 1 s", "CUDA error", ""]
    assert FakeWorker.made == 3


def scripted_worker(pipe):
    """Reply at once or late, or die, by the name of the request."""
    while True:
        name, rounds = pipe.recv()
        if name == "die":
            os._exit(7)
        time.sleep(0.3 if name == "late" else 0)
        pipe.send(name * rounds)


def test_a_worker_replies_times_out_and_dies():
    process = worker.Worker(scripted_worker)
    assert process.request("ab", 2, 60) == "abab"
    with pytest.raises(TimeoutError, match="no reply within 0.05 s"):
        process.request("late", 1, 0.05)
    assert process.pipe.recv() == "late"
    for name in ("die", "ab"):
        with pytest.raises(RuntimeError, match="the process ended with exit code 7"):
            process.request(name, 1, 60)
    process.kill()


# ── The report ──


def test_the_limit_is_the_larger_lower_bound():
    name, floor = roofline(make_timing(HEADLINE), LIMITS)
    assert (name, floor) == ("fp8", pytest.approx(2 * 4096 * 7168 * 16384 / 1400e9))
    name, floor = roofline(make_timing(DECODE), LIMITS)
    assert (name, floor) == ("copy", pytest.approx(CASES[DECODE].bytes / 3e9))


def test_a_line_shows_time_rate_share_and_yardsticks():
    got = make_timing(
        HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": 1.4, "scaled_mm": "no such thing"},
        difference=0.037,
    )  # fmt: skip
    text = report.format_row(got, LIMITS)
    rates, yardsticks = "0.800 1203 TFLOP/s 86% fp8 3.7e-02", "cuBLAS bf16: 1.400, ×1.75"
    assert text.split()[4:] == f"{rates} {yardsticks}; scaled_mm: no such thing".split()
    assert "2452 GB/s" in report.format_row(make_timing(DECODE, ms=0.25), LIMITS)


def test_goals_are_reached_missed_or_not_measured():
    names = HEADLINE, DECODE, GROUPED, "group_limited_topk n=4096 e=256 k=8"
    cases = [CASES[name] for name in names]
    timings = [
        make_timing(HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": "it raised"}),
        make_timing(DECODE, ms=0.3),
        make_timing(GROUPED, ms=1.7),
    ]
    verdicts = report.judge_goals(cases, timings, LIMITS)
    words = [v.verdict for v in verdicts]
    assert words == ["reached", "not measured", "missed", "not measured"]
    timings += [make_timing(DENSE, ms=0.2)]
    timings[0].yardsticks["cuBLAS bf16"] = 1.0
    verdicts = report.judge_goals(cases, timings, LIMITS)
    assert [v.verdict for v in verdicts] == ["reached", "missed", "missed", "reached"]
    assert verdicts[2].measured == pytest.approx(CASES[DECODE].bytes / 0.3e-3 / 3e12)
    assert verdicts[3].measured == pytest.approx(8 * 0.2 / 1.7)
    assert report.format_verdict(verdicts[1]).endswith("× cuBLAS bf16     1.25 of 1.4   missed")


def test_every_goal_of_the_project_has_a_case():
    goals = set()
    for case in CASES.values():
        goals |= {(case.kind, goal.minimum) for goal in case.goals}
    copies = "act_quant weight_quant act_quant_transposed requant_transposed".split()
    copies += "rms_norm rms_norm_quant permute".split()
    assert {(kind, 0.85) for kind in copies} <= goals
    assert {
        ("fp8_gemm", 1000), ("fp8_gemm", 1.4), ("fp8_grouped_gemm", 0.9), ("moe_step", 1.0),
        ("paged_attention", 0.8), ("paged_attention", 450), ("attention", 550),
        ("attention backward", 400),
    } <= goals  # fmt: skip


def run_main(monkeypatch, tmp_path, timings, *flags):
    """Run main() as on a machine whose GPU gives these timings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "run_cases", lambda *_: ((GPU, timing) for timing in timings))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "two words"])
    return command.main([*flags, "--out", str(tmp_path / "new" / "bench.json")])


def test_the_report_is_written(monkeypatch, tmp_path, capsys):
    rows = [
        make_timing(HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": 1.4}),
        make_timing(DENSE, skipped="no room"),
    ]
    assert run_main(monkeypatch, tmp_path, rows, "--only", HEADLINE, DENSE) == 0
    got = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert got["device"] == "a card"
    assert got["limits"] == LIMITS
    assert got["torch"] == torch.__version__
    assert got["command"] == "python -m dsv3_ref.kernels.bench --only 'two words'"
    assert {"driver", "triton", "date"} <= set(got)
    first, second = got["rows"]
    assert first["tflops"] == pytest.approx(2 * 4096 * 7168 * 16384 / 0.8e9)
    assert first["bound"] == "fp8"
    assert second["skipped"] == "no room"
    assert [g["verdict"] for g in got["goals"]] == ["reached", "reached"]
    assert "1203 of 1000" in capsys.readouterr().out


def test_an_error_makes_the_exit_status_one(monkeypatch, tmp_path):
    rows = [make_timing(HEADLINE, ms=0.8), make_timing(DENSE, error="it raised")]
    assert run_main(monkeypatch, tmp_path, rows) == 1
    got = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert got["rows"][1]["error"] == "it raised"


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch, tmp_path):
    def cut_off(*_):
        yield GPU, make_timing(HEADLINE, ms=0.8)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "run_cases", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(tmp_path / "bench.json")])
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1
