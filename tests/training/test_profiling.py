"""What an operator measures: MFU, traces, loads of many experts, determinism, restarts."""

import gzip
import json
import os
from dataclasses import replace

import miniruns
import pytest
import torch

from dsv3_ref.cli import main
from dsv3_ref.config import TINY, V3
from dsv3_ref.scale import training_flops_per_token
from dsv3_ref.training import profiling, settings
from dsv3_ref.training.metrics import ExpertLoadWriter, MetricsWriter
from dsv3_ref.viz.training import read_metrics

CPU = torch.device("cpu")


def train_config(**options) -> settings.TrainConfig:
    return replace(settings.TrainConfig.defaults(TINY, "tiny", []), **options)


# ── MFU ──


def test_flops_per_token_are_six_per_parameter_and_attention():
    """Count 6 FLOPs per activated parameter and the scores and values of causal attention."""
    c = replace(TINY, n_mtp_layers=0)
    h, v = c.n_heads, c.v_head_dim
    x = c.qk_nope_head_dim + c.qk_rope_head_dim
    matrices = c.vocab_size * c.dim
    for i in range(c.n_layers):
        q = c.dim * c.q_lora_rank + c.q_lora_rank * h * x
        kv = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim)
        kv += c.kv_lora_rank * h * (c.qk_nope_head_dim + v)
        width = c.inter_dim
        if i >= c.n_dense_layers:
            width = (c.n_activated_experts + c.n_shared_experts) * c.moe_inter_dim
            matrices += c.dim * c.n_routed_experts
        matrices += q + kv + h * v * c.dim + 3 * c.dim * width
    seq_len = 64
    attention = 3 * c.n_layers * 2 * h * (x + v) * (seq_len + 1) / 2
    assert training_flops_per_token(c, seq_len) == pytest.approx(6 * matrices + attention)


def test_the_mfu_of_the_report_is_a_fifth_of_the_fp8_peak():
    """2,664K hours for 14.8T tokens (§1), MTP included."""
    tokens_per_s = 14.8e12 / (2664e3 * 3600)
    recipe = replace(settings.TrainConfig.RECIPES["v3"], seq_len=4096)
    args = train_config(model=V3, recipe=recipe, peak_tflops=1979.0)
    assert profiling.mfu(args, CPU, tokens_per_s) == pytest.approx(0.2, abs=0.01)


def test_an_unknown_peak_gives_no_mfu(monkeypatch):
    assert profiling.mfu(train_config(), CPU, 1e3) is None
    gpu = torch.device("cuda", 0)
    names = {"NVIDIA H200": 1979e12, "NVIDIA B200": 4500e12, "Some GPU": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        profiling.peak_flops.cache_clear()
        assert profiling.peak_flops("fp8", gpu) == peak
    profiling.peak_flops.cache_clear()


# ── A run ──


def test_a_run_writes_traces_of_chosen_steps_and_the_mfu(home, tmp_path, without_reports):
    run = tmp_path / "run"
    more = "--steps 3 --profile 2 --peak-tflops 0.1 --deterministic".split()
    assert main.main(miniruns.options(home, run, *more)) == 0
    traces = list((run / "logs").glob("profile-*"))
    assert [path.name for path in traces] == ["profile-step2-rank0.json.gz"]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert not torch.are_deterministic_algorithms_enabled()
    for row in miniruns.metrics(run):
        assert row["tokens_per_s_per_device"] == row["tokens_per_s"]
        assert 0 < row["mfu"] < 1
        assert "slowest_rank" not in row


def test_allocations_are_recorded_on_cuda_only(home, tmp_path, capsys):
    argv = miniruns.options(home, tmp_path / "run", "--memory-snapshot", "1")
    assert main.main(argv) == 2
    assert "--memory-snapshot records the allocations of CUDA" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_operation_without_a_deterministic_form_is_refused():
    with profiling.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.empty(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()


# ── Rows ──


def load_row(step: int, layers: int, experts: int) -> dict:
    load = [[round((step + e) / 100, 6) for e in range(experts)]] * layers
    return {"step": step, "loss": 1.0, "expert_load": load, "expert_bias": load}


def write_rows(folder, steps, start: int, *shape: int, every: int = 0) -> None:
    path = folder / "metrics.jsonl"
    with (
        MetricsWriter(path, start) as rows,
        ExpertLoadWriter(folder / "expert_load", start, every) as loads,
    ):
        for step in steps:
            rows.write(loads.split(load_row(step, *shape)))


def test_rows_of_v3_do_not_grow_with_its_experts(tmp_path):
    write_rows(tmp_path, range(1, 26), 0, 58, 256)
    assert (tmp_path / "metrics.jsonl").stat().st_size < 25 * 100
    rows = read_metrics(tmp_path / "metrics.jsonl")
    full = [row["step"] for row in rows if row["expert_load"]]
    assert len(rows) == 25 and full == [10, 20]
    assert rows[9] == load_row(10, 58, 256)


def test_rows_of_few_experts_hold_their_loads(tmp_path):
    write_rows(tmp_path, range(1, 5), 0, 3, 16)
    write_rows(tmp_path, range(5, 9), 4, 3, 16, every=3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["expert_load"]] == [1, 2, 3, 4, 6]
    assert not (tmp_path / "expert_load").exists()


def test_a_killed_and_resumed_run_has_each_load_once(tmp_path):
    shape = 58, 256
    write_rows(tmp_path, range(1, 31), 0, *shape)
    first = tmp_path / "expert_load" / "step_0000001.jsonl.gz"
    first.write_bytes(first.read_bytes()[:-1000])  # killed while it wrote
    write_rows(tmp_path, range(21, 33), 20, *shape)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 33))
    assert [row["step"] for row in rows if row["expert_load"]][-2:] == [20, 30]


# ── Restarts ──


@pytest.mark.parametrize("out", [None, "mine"])
def test_a_rank_that_torchrun_restarts_resumes_the_newest_run(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = ["--out", out] if out else []
    base = tmp_path / (out or "runs/tiny")
    run = base.with_name(base.name + "-2")
    base.mkdir(parents=True)
    (base / "other").touch()
    argv = ["--config", "tiny", "--steps", "2", *option]
    args = settings.parse_args(argv)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not settings.parse_args(argv).resume  # it failed before run.json was written
    run.mkdir()
    (run / "run.json").write_text(json.dumps(settings.describe_training(args, None)))
    again = settings.parse_args(argv)
    assert again.resume and again.out is not None and os.path.samefile(again.out, run)
