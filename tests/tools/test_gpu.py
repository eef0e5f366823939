"""The script for the first half hour on a GPU, without a GPU and without what it must not need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = "versions smoke tests triage headlines streams why repeat".split()


def run_bare(code: str) -> str:
    """Return what code prints on a machine without the packages that a GPU machine lacks."""
    run = [sys.executable, "tools/bare.py", "-c", code]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_what_is_absent_cannot_be_imported_and_what_is_present_can():
    code = """
import importlib.metadata, importlib.util, subprocess, sys
for name in ("torch", "triton", "hypothesis", "tyro", "datasets", "matplotlib"):
    print(name, importlib.util.find_spec(name) is not None)
plugins = {e.dist.name for e in importlib.metadata.entry_points(group="pytest11")}
print("plugins", "pytest-xdist" in plugins, "schemathesis" in plugins)
child = subprocess.run([sys.executable, "-c", "import tyro"], capture_output=True, text=True)
print("child", child.stderr.splitlines()[-1])
"""
    lines = run_bare(code).splitlines()
    assert lines[:6] == [
        "torch True", "triton True", "hypothesis True", "tyro False", "datasets False",
        "matplotlib False",
    ]  # fmt: skip
    assert lines[6:] == ["plugins True False", "child ModuleNotFoundError: No module named 'tyro'"]


@pytest.mark.full
def test_all_stages_run_on_a_cpu(tmp_path):
    env = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    subprocess.run(["tools/gpu.sh", "--dry-run"], cwd=ROOT, env=env, capture_output=True)
    rows = [line.split() for line in (tmp_path / "out" / "stages.txt").read_text().splitlines()]
    assert [(name, code) for name, code, _ in rows] == [(name, "0") for name in STAGES]
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert len(smoke) > 10 and not any(check["error"] for check in smoke)
    end_to_end = json.loads((tmp_path / "out" / "end_to_end.json").read_text())
    assert {"train bf16", "train fp8", "decode 1", "decode 8"} <= set(end_to_end)
    assert (tmp_path / "out" / "step.json").stat().st_size > 10_000
    assert "fp8_gemm m=4096 n=7168 k=16384" in (tmp_path / "out" / "headlines.log").read_text()
