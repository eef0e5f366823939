"""The process around a command: its streams, locale, HOME and memory may all be missing."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_ref.cli import environment
from dsv3_ref.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
DSV3 = f"{sys.executable} -m dsv3_ref"
full = pytest.mark.full


def shell(command: str, cwd, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which $DSV3 is the command, and expect no traceback."""
    variables = os.environ | {"DSV3": DSV3, "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=cwd, env=variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_an_error_that_quotes_a_file_does_not_control_the_terminal(monkeypatch, capsys):
    """Names of tensors and errors of chat templates come from strangers."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    environment.report("unknown tensor \x1b]0;title\x07 in ☕\n")
    assert capsys.readouterr().err == "error: unknown tensor \\x1b]0;title\\x07 in ☕\n\n"


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("$DSV3 --version <&- >&- 2>&-", 0, ""),
        ("PYTHONUNBUFFERED= $DSV3 --version >/dev/full", 2, "No space left"),
        ("PYTHONUNBUFFERED=1 $DSV3 --version >/dev/full", 2, "No space left"),
        ("$DSV3 nonsense >/dev/full 2>/dev/full", 2, ""),
        ("$DSV3 --help | true", 141, ""),
        ("$DSV3 --print-completion fish 2>&-", 2, ""),
        pytest.param("$DSV3 generate missing 2>&-", 2, "", marks=full),
        pytest.param("$DSV3 train --help >/dev/full", 2, "No space left", marks=full),
        pytest.param("$DSV3 train --help | true", 141, "", marks=full),
        pytest.param("$DSV3 chat missing <&-", 2, "error: ", marks=full),
    ],
)
def test_streams_that_are_closed_full_or_broken(command, code, sentence, tmp_path):
    done = shell(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr


@pytest.mark.parametrize("is_imported", [False, True])
def test_children_import_of_the_current_directory_what_this_process_does(
    is_imported, tmp_path, monkeypatch
):
    (tmp_path / "colorsys.py").write_text("print('code of a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path), *[""] * is_imported])
    environment.isolate_children()
    child = [sys.executable, "-c", "import colorsys"]  # as multiprocessing starts one
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert done.stdout == "code of a stranger\n" * is_imported


LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "env", [pytest.param({"LC_ALL": "C"}, marks=full), LATIN], ids=["C", "ascii"]
)
def test_a_locale_without_unicode_prints_escapes(env, tmp_path):
    done = shell("$DSV3 train --config 世界", tmp_path, **env)
    assert done.returncode == 2
    assert "error: no config" in done.stderr


@full
@pytest.mark.parametrize("home", ["HOME=/proc/none", "HOME=/dev/null", "-u HOME", "HOME="])
def test_home_need_not_exist(home, tmp_path):
    (tmp_path / "data.txt").write_text("One.\n\nTwo.\n\nThree. " * 400)
    size = "--start-batch-size 1 --global-batch-size 1 --seq-len 32"
    line = f"env {home} $DSV3 train --config tiny --steps 1 {size} --data data.txt --out run"
    done = shell(line, tmp_path)
    assert done.returncode in (0, 2), done.stderr
    assert done.returncode == 0 or "error: " in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=["python", "torch", "gpu", "import"],
)
def test_a_lack_of_memory_is_a_sentence(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "run_command", fail)
    assert cli.main(["generate"]) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory")


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["generate"])


@full
def test_a_limit_on_memory_is_a_sentence(tmp_path):
    """8 GiB of address space hold Python and torch, but no matrix of 2³¹ numbers."""
    code = (
        "import sys, torch; from dsv3_ref.cli import main as cli\n"
        "cli.run_command = lambda *_: torch.empty(2**31)\n"
        "sys.argv = ['dsv3', 'generate']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: not enough memory" in done.stderr and "Traceback" not in done.stderr
