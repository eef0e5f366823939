"""The benchmark of the kernels, as far as it goes without a GPU: its cases, sums and reports."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch

from dsv3_ref import ops
from dsv3_ref.kernels import bench

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {case.name: case for case in bench.all_cases(128)}
CASES = {case.name: case for case in bench.all_cases()}
LIMITS = {"copy": 3000.0, "bf16": 700.0, "fp8": 1400.0}
CARD = {"device": "a card", "driver": "1.2", "limits": LIMITS}


def row(name: str, **rest) -> bench.Timing:
    return bench.Timing.for_case(CASES[name], **rest)


HEADLINE = "fp8_gemm m=4096 n=7168 k=16384"
DECODE = "paged_attention b=128 t=4096 h=128"
GROUPED = "fp8_grouped_gemm e=8 m=32768 n=4096 k=7168 rows=even"
DENSE = "fp8_gemm m=4096 n=4096 k=7168"

# ── The list ──


def test_no_two_cases_share_a_name():
    assert len(CASES) == len(bench.all_cases())
    assert len(SMALL) > 60


def test_a_dry_run_lists_every_kernel(capsys):
    assert bench.main(["--dry-run"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    with ops.use("triton", "torch"):
        kernels = {name for name, impls in ops.IMPLS.items() if "triton" in impls}
    assert kernels <= listed
    assert listed - kernels == {"case", "moe_step"}


def test_a_dry_run_shows_bytes_and_work(capsys):
    bench.main(["--dry-run", "--only", HEADLINE])
    head, line = capsys.readouterr().out.splitlines()
    assert line.startswith(HEADLINE)
    assert line.split()[4:7] == ["0.2454", "0.9621", "fp8"]
    assert "1000 TFLOP/s, 1.4 × cuBLAS bf16" in line


def test_only_filters_and_refuses_what_is_no_case(capsys):
    assert [c.name for c in bench.parse_args(["--only", DECODE]).cases] == [DECODE]
    two = bench.parse_args(["--only", "group_limited_topk", "apply_rotary_emb"]).cases
    assert {c.kind for c in two} == {"group_limited_topk", "apply_rotary_emb"}
    with pytest.raises(SystemExit):
        bench.parse_args(["--only", "chose"])
    assert "no case has chose in its name" in capsys.readouterr().err


# ── Sums by hand ──


@pytest.mark.parametrize(
    "case, moved, flops",
    [
        # codes 4·256 and 6·256, bf16 4·6 out; scales of 4·2 tiles and 1·2 blocks
        (bench.dense(4, 6, 256), 1024 + 1536 + 48 + 32 + 8, 12_288),
        # 128 rows of codes of 6 and 10 columns, a scale each, fp32 out
        (bench.dense_wgrad(128, 6, 10), 128 * 16 + 4 * 16 + 240, 15_360),
        # 2 experts: codes 4·256, 2·6·256, bf16 out, scales of 8 tiles and 2·2 blocks
        (bench.grouped_fp8(2, 4, 6, 256, False), 1024 + 3072 + 48 + 32 + 16, 12_288),
        (bench.grouped_bf16(2, 4, 6, 10, False), 2 * (40 + 120 + 24), 480),
        (bench.grouped_bf16_backward(2, 4, 6, 10, False), 2 * (24 + 240 + 80), 960),
        (bench.grouped_wgrad(2, 256, 6, 10, False), 2 * 132 * 16 + 480, 30_720),
        (bench.act_quant(2, 130), 520 + 260 + 16, 0),
        (bench.weight_quant(130, 10, torch.float32), 5200 + 1300 + 8, 0),
        (bench.act_quant_transposed(1, 130, 10), 2600 + 2560 + 80, 0),
        (bench.requant_transposed(3, 130, 10), 1300 + 520 + 10 * (4 * 128 + 16), 0),
        (bench.rms_norm(2, 10)[0], 40 + 40 + 40, 0),
        (bench.rms_norm(2, 10)[1], 3 * 40 + 80, 0),
        (bench.rms_norm(2, 10)[2], 40 + 40 + 20 + 8 + 40, 0),
        (bench.swiglu(2, 10)[0], 120, 0),
        (bench.swiglu(2, 10)[1], 200, 0),
        (bench.swiglu(2, 10)[2], 80 + 20 + 8, 0),
        # g, two gradients; two codes with 2 scales each; 2 tiles of 10 columns
        (bench.swiglu_quant_backward(1, 130, 10), 2600 + 5200 + 2 * (1300 + 520) + 20 * 132, 0),
        (bench.rotation(3, 2), 2 * (2 * 3 * 2 * 64) + 2 * (4 * 3 * 32), 0),
        (bench.group_limited_topk(3, 16, 2), 192 + 48, 0),
        (bench.permute(3, 10, 4, 2)[0], 60 + 120 + 48, 0),
        (bench.unpermute(3, 10, 4, 2)[0], 120 + 60 + 12 + 48, 0),
        (bench.unpermute(3, 10, 4, 2)[1], 60 + 120 + 120 + 12 + 12 + 48, 0),
        # 2 heads, 8·8/2 pairs: q·k of 192 and p·v of 128, multiply and add
        (bench.attention(8, 2)[0], 2 * 8 * 2 * (192 + 192 + 128 + 128), 2 * 64 * 320),
        (bench.attention(8, 2)[1], 4 * 8 * 2 * (192 + 192 + 128 + 128), 2 * 64 * 832),
        (bench.varlen_attention(3, 8, 2), 3 * 2 * 16 * 640, 3 * 2 * 64 * 320),
        # 576 numbers a position; queries of 576 and outputs of 512 for 2 heads
        (bench.paged(3, 5, 2), 2 * (3 * 5 * 576 + 3 * 2 * 1088), 2 * 3 * 2 * 5 * 1088),
        (bench.latent(3, 5, 2), 2 * (3 * 5 * 576 + 3 * 2 * 1088), 2 * 3 * 2 * 5 * 1088),
        (bench.cross_entropy(3, 10, 7), 2 * 2 * (30 + 70), 3 * 2 * 210),
        # 8 of 16 experts and the shared one: 27 matrices; fp32 weights read, gradients written
        (
            bench.moe_step(1, 2, 16, 10, 4),
            8 * (17 * 120 + 160) + 2 * 4 * 20,
            6 * 2 * (9 * 120 + 160),
        ),
    ],
    ids=lambda x: x.name if isinstance(x, bench.Case) else "",
)
def test_bytes_and_flops_are_those_counted_by_hand(case, moved, flops):
    assert (case.bytes, case.flops) == (moved, flops)


@pytest.mark.parametrize("e, m", [(8, 32), (256, 32768), (4, 3), (7, 100)])
def test_counts_add_up(e, m):
    even, skewed = bench.expert_counts(e, m), bench.expert_counts(e, m, True)
    assert even.sum() == skewed.sum() == m
    assert even.max() - even.min() <= 1
    assert m < e or skewed.max() > 1.5 * m / e


# ── Every case runs, in small, on the references ──


def several(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("name", SMALL)
def test_a_case_can_be_made_and_called(name, monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", ("torch",))
    fn, yardsticks = bench.prepare_calls(SMALL[name], "cpu")
    want = [t.shape for t in several(fn())]
    good, reasons = bench.warm_up(yardsticks)
    assert set(reasons) <= {"scaled_mm", "SDPA cuDNN"}, reasons  # those want a GPU
    for yardstick, call in good.items():
        assert "SDPA" in yardstick or [t.shape for t in several(call())] == want


OTHERS = ("moe_step", "attention backward")  # long to interpret; laid out otherwise by SDPA
FIRST = {c.kind: c for c in reversed(SMALL.values()) if c.kind not in OTHERS}


def flat(x, width: int = 0):
    """All that a call returns as one vector; SDPA's heads, put back and cut to this width."""
    if width:
        x = x.transpose(1, 2)[..., :width]
    return torch.cat([t.detach().float().flatten() for t in several(x)])


@pytest.mark.parametrize("kind", FIRST)
def test_a_kernel_and_its_yardsticks_do_the_same_work(kind):
    fn, yardsticks = bench.prepare_calls(FIRST[kind], DEVICE)
    got, (good, _) = fn(), bench.warm_up(yardsticks)
    assert good
    for name, call in good.items():
        want = flat(call(), got.shape[-1] if "SDPA" in name else 0)
        assert (flat(got) - want).norm() < (0.08 if "fp8" in kind else 0.02) * want.norm(), name


def test_a_backward_case_runs_backward_only():
    x, calls = torch.randn(3, requires_grad=True), []
    run = bench.backward_call(lambda x: calls.append(1) or x * x, (x,))
    (first,), (second,) = run(), run()
    assert len(calls) == 1
    assert torch.equal(first, second)


def test_the_step_quantizes_its_input_each_time(monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", ("torch",))
    case = SMALL[next(name for name in SMALL if name.startswith("moe_step"))]
    fn, _ = bench.prepare_calls(case, "cpu")
    seen, act_quant = [], bench.fp8.act_quant
    monkeypatch.setattr(bench.fp8, "act_quant", lambda x, *a: seen.append(x) or act_quant(x, *a))
    fn()
    n = len(seen)
    fn()
    assert n > 5
    assert len(seen) == 2 * n


# ── No GPU, and what goes wrong with one ──


def test_without_a_gpu_it_says_so():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dsv3_ref.kernels.bench"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "No CUDA GPU is here to time kernels on; --dry-run lists them.\n"


def broken(*_):
    raise RuntimeError("out of memory\nand a long story")


@pytest.fixture
def no_cuda_calls(monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    monkeypatch.setattr(bench, "KERNELS", ("torch",))


def test_a_failing_case_is_a_row(no_cuda_calls):
    got = bench.try_case(replace(CASES[DENSE], make=broken), 1)
    assert got.ms is None
    assert got.error == "RuntimeError: out of memory\nand a long story"
    assert not got.fatal
    assert bench.format_row(got, LIMITS).endswith("failed: RuntimeError: out of memory")


def test_a_device_that_is_lost_is_noticed(no_cuda_calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert bench.try_case(replace(CASES[DENSE], make=broken), 1).fatal


def test_a_case_too_large_for_the_card_is_skipped(no_cuda_calls):
    got = bench.try_case(CASES["paged_attention b=128 t=131072 h=32"], 1)
    assert got.skipped == "needs 23.2 GB, 1.0 are free"
    assert not got.error
    assert "skipped: needs" in bench.format_row(got, LIMITS)


def test_a_yardstick_that_raises_is_left_out_with_its_reason():
    good, reasons = bench.warm_up({"fine": lambda: 1, "bad": broken})
    assert list(good) == ["fine"]
    assert reasons == {"bad": "RuntimeError: out of memory"}


# ── The clock ──


class FakeEvent:
    """Reads a clock that stands still but for the calls."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, end) -> float:
        return end.at - self.at


@pytest.fixture
def fake_clock(no_cuda_calls, monkeypatch):
    """A device whose calls cost what `spend` says, in order."""
    empty, made = torch.empty, bench.prepare_calls
    monkeypatch.setattr(bench, "FLUSH", 8)
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(bench, "prepare_calls", lambda case, device: made(case, "cpu"))


def spending(name: str, costs: list, log: list):
    def call():
        log.append(name)
        FakeEvent.now += costs[len(log) // 2 % len(costs)]

    return call


def test_calls_take_turns_and_the_median_counts(fake_clock):
    log = []
    calls = {"a": spending("a", [1, 2, 100], log), "b": spending("b", [5], log)}
    assert bench.time_interleaved(calls, 3) == {"a": 2, "b": 5}
    assert log == ["a", "b"] * 3


def test_a_case_is_timed_beside_its_yardsticks(fake_clock):
    case = replace(CASES[DENSE], make=lambda: (spending("", [2], []), {"a": broken}))
    got = bench.time_case(case, 3)
    assert (got.ms, got.yardsticks) == (2, {"a": "RuntimeError: out of memory"})


def test_the_card_is_measured_before_its_cases(fake_clock, monkeypatch):
    def randn(*shape):
        x = torch.zeros(1, 1, device="cpu")
        return x[0].expand(2**29) if len(shape) == 1 else x

    monkeypatch.setattr(bench, "randn", randn)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(bench, "driver_version", lambda: "1.2")
    monkeypatch.setattr(bench, "time_interleaved", lambda calls, rounds: {"copy": 1.0, "bf16": 2.0})
    found = bench.describe_gpu(3)
    assert found["limits"]["copy"] == pytest.approx(2**31 / 1e6)
    assert found["limits"]["bf16"] == pytest.approx(8192**3 / 1e9)
    assert found["limits"]["fp8"] == 2 * found["limits"]["bf16"]


# ── Workers ──


class FakeWorker:
    """Answers as a table says."""

    made = 0

    def __init__(self, answers):
        self.answers = answers
        FakeWorker.made += 1

    def request(self, name, rounds, seconds):
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        pass


def test_a_worker_that_was_lost_is_replaced(monkeypatch, capsys):
    FakeWorker.made = 0
    answers = {
        "": CARD,
        HEADLINE: TimeoutError("no answer within 1 s"),
        DENSE: row(DENSE, error="CUDA error", fatal=True),
        DECODE: row(DECODE, ms=0.25),
    }
    args = Namespace(rounds=1, seconds=1)
    chosen = [CASES[name] for name in (HEADLINE, DENSE, DECODE)]
    found, rows = bench.run_all(chosen, args, lambda: FakeWorker(answers))
    assert found == CARD
    assert [r.error for r in rows] == ["TimeoutError: no answer within 1 s", "CUDA error", ""]
    assert FakeWorker.made == 3
    assert len(capsys.readouterr().out.splitlines()) == 3


def moody(pipe):
    """Answers, dawdles or dies, as it is told."""
    while True:
        name, rounds = pipe.recv()
        if name == "die":
            os._exit(7)
        time.sleep(0.3 if name == "dawdle" else 0)
        pipe.send(name * rounds)


def test_a_worker_answers_dawdles_and_dies():
    worker = bench.Worker(moody)
    assert worker.request("ab", 2, 60) == "abab"
    with pytest.raises(TimeoutError, match="no answer within 0.05 s"):
        worker.request("dawdle", 1, 0.05)
    assert worker.pipe.recv() == "dawdle"
    for name in ("die", "ab"):
        with pytest.raises(RuntimeError, match="the process ended with 7"):
            worker.request(name, 1, 60)
    worker.kill()


# ── The report ──


def test_the_limit_is_the_larger_floor():
    name, floor = bench.roofline(row(HEADLINE), LIMITS)
    assert (name, floor) == ("fp8", pytest.approx(2 * 4096 * 7168 * 16384 / 1400e9))
    name, floor = bench.roofline(row(DECODE), LIMITS)
    assert (name, floor) == ("copy", pytest.approx(CASES[DECODE].bytes / 3e9))


def test_a_line_shows_time_rate_share_and_yardsticks():
    got = row(HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": 1.4, "scaled_mm": "no such thing"})
    text = bench.format_row(got, LIMITS)
    assert text.split()[4:] == (
        "0.800 1203 TFLOP/s 86% fp8 cuBLAS bf16: 1.400, ×1.75; scaled_mm: no such thing".split()
    )
    assert "2559 GB/s" in bench.format_row(row(DECODE, ms=0.25), LIMITS)


def test_goals_are_reached_missed_or_not_measured():
    chosen = [
        CASES[name] for name in (HEADLINE, DECODE, GROUPED, "group_limited_topk n=4096 e=256 k=8")
    ]
    rows = [
        row(HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": "it raised"}),
        row(DECODE, ms=0.3),
        row(GROUPED, ms=1.7),
    ]
    verdicts = lambda rows: [g["verdict"] for g in bench.judge_goals(chosen, rows, LIMITS)]
    assert verdicts(rows) == ["reached", "not measured", "missed", "not measured"]
    rows += [row(DENSE, ms=0.2)]
    rows[0].yardsticks["cuBLAS bf16"] = 1.0
    assert verdicts(rows) == ["reached", "missed", "missed", "reached"]
    found = bench.judge_goals(chosen, rows, LIMITS)
    assert found[2]["measured"] == pytest.approx(CASES[DECODE].bytes / 0.3e-3 / 3e12)
    assert found[3]["measured"] == pytest.approx(8 * 0.2 / 1.7)
    assert bench.format_goal(found[1]).endswith("× cuBLAS bf16     1.25 of 1.4   missed")


def test_every_goal_of_the_project_has_a_case():
    goals = {(c.kind, g.minimum) for c in CASES.values() for g in c.goals}
    copies = "act_quant weight_quant act_quant_transposed requant_transposed".split()
    copies += "rms_norm rms_norm_quant permute".split()
    assert {(kind, 0.85) for kind in copies} <= goals
    assert {
        ("fp8_gemm", 1000), ("fp8_gemm", 1.4), ("fp8_grouped_gemm", 0.9), ("moe_step", 1.0),
        ("paged_attention", 0.8), ("attention", 550), ("attention backward", 400),
    } <= goals  # fmt: skip


def run_main(monkeypatch, tmp_path, rows, *flags):
    """main() on a machine whose GPU gives these rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "run_all", lambda *_: (CARD, rows))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "two words"])
    return bench.main([*flags, "--out", str(tmp_path / "new" / "bench.json")])


def test_the_report_is_written(monkeypatch, tmp_path, capsys):
    rows = [row(HEADLINE, ms=0.8, yardsticks={"cuBLAS bf16": 1.4}), row(DENSE, skipped="no room")]
    assert run_main(monkeypatch, tmp_path, rows, "--skip-tests", "--only", HEADLINE, DENSE) == 0
    got = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert got["device"] == "a card"
    assert got["limits"] == LIMITS
    assert got["torch"] == torch.__version__
    assert got["command"] == "python -m dsv3_ref.kernels.bench --only 'two words'"
    assert got["tests"] == "skipped"
    assert {"driver", "triton", "date"} <= set(got)
    first, second = got["rows"]
    assert first["tflops"] == pytest.approx(2 * 4096 * 7168 * 16384 / 0.8e9)
    assert first["bound"] == "fp8"
    assert second["skipped"] == "no room"
    assert [g["verdict"] for g in got["goals"]] == ["reached", "reached"]
    assert "1203 of 1000" in capsys.readouterr().out


def test_an_error_makes_the_exit_status_one(monkeypatch, tmp_path):
    rows = [row(HEADLINE, ms=0.8), row(DENSE, error="it raised")]
    assert run_main(monkeypatch, tmp_path, rows, "--skip-tests") == 1
    report = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert report["rows"][1]["error"] == "it raised"


def test_kernels_that_fail_their_tests_are_not_timed(monkeypatch, tmp_path, capsys):
    commands = []

    def pytest_run(command, cwd):
        commands.append(command)
        return Namespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", pytest_run)
    assert run_main(monkeypatch, tmp_path, []) == 1
    assert "tests/kernels/test_kernels_gemm.py" in commands[0]
    assert "--skip-tests times them anyway" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_hypothesis_the_plain_tests_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    command = bench.test_command()
    assert "--noconftest" in command
    assert "tests/kernels/test_kernels_gemm.py" in command
    assert "tests/kernels/test_kernels_moe.py" not in command
    assert "tests/kernels/test_kernels_moe.py" in capsys.readouterr().out
    prefix = "--deselect=tests/kernels/test_kernels_norm.py::test_"
    assert any(x.startswith(prefix) for x in command)
