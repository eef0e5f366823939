"""A node is fit or says why not, and among many the bad one is found."""

import os
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest

from dsv3_ref.cli.main import main
from dsv3_ref.cluster import preflight
from dsv3_ref.cluster.preflight import (
    NodeUnhealthy,
    PreflightConfig,
    check_nodes,
    find_bad_nodes,
    gpu_faults,
)

# ── GPUs ──

HEALTHY = """<nvidia_smi_log><gpu id="00000000:07:00.0">
  <gpu_recovery_action>None</gpu_recovery_action>
  <ecc_errors>
    <volatile>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <dram_correctable>3</dram_correctable><dram_uncorrectable>0</dram_uncorrectable>
    </volatile>
    <aggregate>
      <dram_uncorrectable>2</dram_uncorrectable>
      <sram_threshold_exceeded>No</sram_threshold_exceeded>
    </aggregate>
    <channel_repair_pending>No</channel_repair_pending>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows>
    <remapped_row_pending>No</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
</gpu></nvidia_smi_log>"""


def smi(tmp_path, monkeypatch, script: str) -> None:
    """A driver's tool that does this, first in the path."""
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_errors_that_were_repaired_are_no_fault():
    assert gpu_faults(HEALTHY) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (">None<", ">Drain and Reset<", "gpu_recovery_action Drain and Reset"),
        ("dram_uncorrectable>0", "dram_uncorrectable>4", "dram_uncorrectable 4"),
        ("parity>0", "parity>1", "sram_uncorrectable_parity 1"),
        ("pending>No", "pending>Yes", "channel_repair_pending Yes"),
        ("exceeded>No", "exceeded>Yes", "sram_threshold_exceeded Yes"),
        ("retirement>N/A", "retirement>Yes", "pending_retirement Yes"),
        ("failure>No", "failure>Yes", "remapped_row_failure Yes"),
    ],
)
def test_faults_of_a_gpu_are_named(before, after, fault):
    xml = HEALTHY.replace(before, after, 1)
    assert xml != HEALTHY
    assert gpu_faults(xml) == [f"GPU 0: {fault}"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 9", "nvidia-smi failed: .*exit status 9"),
        (f"cat <<X\n{HEALTHY.replace('failure>No', 'failure>Yes')}\nX", "GPU 0: remapped_row_fail"),
        (f"cat <<X\n{HEALTHY}\nX", r"torch sees \d+ GPUs, not 99"),
    ],
)
def test_a_node_with_bad_gpus_is_unfit(script, reason, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, script)
    with pytest.raises(NodeUnhealthy, match=reason):
        preflight.check_gpus(PreflightConfig(gpus=99))


def test_a_node_without_a_driver_is_unfit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeUnhealthy, match="nvidia-smi failed: "):
        preflight.check_gpus(PreflightConfig(gpus=8))


# ── Disk ──


def test_a_good_disk_is_measured_and_left_clean(tmp_path):
    assert preflight.check_disk(PreflightConfig(tmp_path / "run")).endswith(" MB/s")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_that_will_not_do_is_unfit(tmp_path):
    (tmp_path / "file").touch()
    for args, reason in [
        (PreflightConfig(tmp_path, min_free_gb=1e9), "GB free, below 1e"),
        (PreflightConfig(tmp_path, min_disk_mb_s=1e9), "MB/s, below 1e"),
        (PreflightConfig(tmp_path / "file"), "disk: .*File exists"),
        (PreflightConfig(tmp_path / "file" / "run"), "disk: .*Not a directory"),
        (PreflightConfig("/proc" / tmp_path.relative_to("/")), "disk: .*No such file"),
    ]:
        with pytest.raises(NodeUnhealthy, match=reason):
            preflight.check_disk(args)


# ── Bandwidth ──


def within(args: PreflightConfig, tmp_path) -> str:
    """Two ranks of this machine, over gloo."""
    args = replace(args, ranks=2, message_mb=1)
    return preflight.check_network(args, 1, 0, f"file://{tmp_path}/meet", args.min_node_gb_s)


def test_bandwidth_is_that_of_the_bytes_moved(tmp_path):
    said = within(PreflightConfig(min_node_gb_s=0), tmp_path).replace(",", "").split()
    reduce, exchange = float(said[1]), float(said[4])
    assert 0.001 < reduce < 100
    assert 0.001 < exchange < 100


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (PreflightConfig(min_node_gb_s=1e6), r"all-reduce at \S+ GB/s, below 1e\+06"),
        (PreflightConfig(min_node_gb_s=0, max_skew_s=-1), r"its clock is off by 0\.0 s"),
    ],
)
def test_a_slow_or_skewed_node_is_unfit(args, reason, tmp_path):
    with pytest.raises(NodeUnhealthy, match=reason):
        within(args, tmp_path)


def test_a_node_that_nobody_meets_is_unfit():
    """It waits for another node that never comes, and not for ever."""
    args = PreflightConfig(ranks=1, timeout_s=4)
    with pytest.raises(NodeUnhealthy, match="hang: not finished after 4 s|fail: "):
        preflight.check_network(args, 2, 1, "tcp://127.0.0.1:9", 0)


# ── Which node it is ──


def cluster(bad: set[str], broken_pairs: set[frozenset] = frozenset()):
    """`ask` of nodes of which some spoil every collective they are in; and all that was asked."""
    asked = []

    def ask(stage: str, nodes: list[str]) -> dict[str, str]:
        asked.append((stage, nodes))
        spoilt = bad & set(nodes) or any(pair <= set(nodes) for pair in broken_pairs)
        word = "unhealthy: slow" if stage == "net" and spoilt else "healthy: fine"
        return dict.fromkeys(nodes, word)

    return ask, asked


def names(n: int) -> list[str]:
    return [f"n{i}" for i in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_good_nodes_are_asked_once_alone_and_once_together(n):
    ask, asked = cluster(set())
    assert preflight.healthy_nodes(check_nodes(names(n), ask)) == names(n)
    assert asked == [("node", names(n)), ("net", names(n))]


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_every_single_bad_node_is_found(n):
    for bad in names(n):
        words = check_nodes(names(n), cluster({bad})[0])
        assert preflight.healthy_nodes(words) == [node for node in names(n) if node != bad]
        assert words[bad].startswith("unhealthy: slow (with n")


def test_two_bad_nodes_apart_are_found_and_of_two_nodes_neither_is_trusted():
    assert set(find_bad_nodes(names(8), cluster({"n1", "n5"})[0])) == {"n1", "n5"}
    assert set(find_bad_nodes(names(2), cluster({"n0"})[0])) == {"n0", "n1"}


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_no_node_is_in_two_pairs_at_once(n):
    """Or each would look half as fast. A round ends before the next begins."""
    ask, asked = cluster({"n0"})
    find_bad_nodes(names(n), ask)
    pairs = [pair for _, pair in asked]
    assert len(pairs) == n == len({tuple(pair) for pair in pairs})
    assert all(pair == sorted(pair) for pair in pairs), "the first must be task 0"
    rounds = [pairs[: n // 2], pairs[n // 2 : n // 2 * 2], pairs[n // 2 * 2 :]]
    for pairs in rounds:
        nodes = [*chain.from_iterable(pairs)]
        assert len(nodes) == len(set(nodes))


def test_a_network_that_fails_with_good_pairs_is_told():
    def ask(stage, nodes):
        word = "unhealthy: hang" if stage == "net" and len(nodes) > 2 else "healthy: fine"
        return dict.fromkeys(nodes, word)

    with pytest.raises(preflight.UserError, match="every pair of neighbors passes.* hang"):
        check_nodes(names(4), ask)


def test_a_node_bad_alone_is_not_asked_with_others():
    def ask(stage, nodes):
        assert stage == "node" or "n1" not in nodes
        return {n: "unhealthy: no driver" if n == "n1" else "healthy: fine" for n in nodes}

    words = check_nodes(names(3), ask)
    assert words["n1"] == "unhealthy: no driver"
    assert preflight.healthy_nodes(words) == ["n0", "n2"]


def test_the_last_word_of_a_task_is_its_verdict_or_its_error():
    lines = ["0: healthy: 8 GPUs", "1: Traceback", "1: ImportError: no libcuda", "0: [W] a warning",
             "srun: error: n1: task 1: Exited with exit code 1"]  # fmt: skip
    words = preflight.parse_reports(lines, names(3))
    assert list(words.values())[:2] == ["healthy: 8 GPUs", "ImportError: no libcuda"]
    assert words["n2"] == f"no report ({lines[-1]})"
    assert preflight.parse_reports([], ["n0"]) == {"n0": "no report (timed out)"}


# ── The command ──


def test_this_machine_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert main(["preflight", "--folder", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"{out.strip()}  healthy: ")
    assert main(["preflight", "--folder", str(tmp_path), "--min-free-gb", "1e9"]) == 2
    out, err = capsys.readouterr()
    assert out == "\n"
    assert "error: 0 of 1 nodes are healthy, but --min-nodes is 1" in err


def test_the_head_needs_no_torch():
    """A broken installation on the first node must not keep the others from training."""
    code = (
        "import sys; sys.modules['torch'] = None;"
        "import dsv3_ref.cli.main, dsv3_ref.cluster.preflight"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
