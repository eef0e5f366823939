"""macOS and Windows: nothing Unix-only at import, locks by filelock, other devices and backends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import miniruns
import pytest
import torch
from miniruns import options

from dsv3_ref import ops
from dsv3_ref.checkpoints import atomic
from dsv3_ref.cli.main import main
from dsv3_ref.config import UserError
from dsv3_ref.training import strategy

ROOT = Path(__file__).resolve().parents[2]
MISSING_MODULES = ["fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog", "readline"]
MISSING_NAMES = {
    "os": "fork forkpty getuid geteuid getgid setsid killpg getloadavg sched_getaffinity mkfifo"
    " memfd_create pidfd_open",
    "signal": "SIGUSR1 SIGUSR2 SIGHUP SIGKILL SIGSTOP SIGCONT SIGXCPU SIGALRM alarm setitimer",
    "select": "poll epoll",
}
# Third-party packages choose by sys.platform, so they are imported before the names are taken.
WITHOUT_UNIX = f"""
import asyncio, importlib, multiprocessing.synchronize, os, pkgutil, select, signal, sys
import datasets, huggingface_hub, torch.distributed.elastic.timer
import fastapi, torch._inductor.config, transformers, uvicorn
sys.path.insert(0, {str(ROOT / "tests")!r})
import miniruns
for name in {MISSING_MODULES}:
    sys.modules[name] = None
for module, names in {MISSING_NAMES}.items():
    for name in names.split():
        vars(sys.modules[module]).pop(name, None)
real = open
def refuse(path, *args, **kwargs):
    assert not str(path).startswith(("/proc", "/dev/fd", "/sys")), path
    return real(path, *args, **kwargs)
"""
IMPORT_ALL = """
import builtins, dsv3_ref
builtins.open = refuse
skipped = ("dsv3_ref.__main__", "dsv3_ref.kernels")  # Triton is for Linux
for info in pkgutil.walk_packages(dsv3_ref.__path__[:1], "dsv3_ref."):
    if not info.name.startswith(skipped):
        importlib.import_module(info.name)
builtins.open = real
"""
TRAIN = """
from pathlib import Path
from unittest import mock
from dsv3_ref.cli.main import main
folder = Path(sys.argv[1])
with miniruns.home(folder):
    argv = miniruns.options(folder, folder / "run", "--steps", "2", "--save-every", "1")
    with mock.patch("dsv3_ref.training.report.write_report", miniruns.no_report):
        assert main(argv) == 0
    sys.exit(main(["train", "--resume", "--out", str(folder / "run")]))
"""


def test_nothing_that_windows_lacks_is_needed(tmp_path):
    """Learners open the chapters on Windows: `No module named 'fcntl'`, `'resource'`, …"""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX + IMPORT_ALL + TRAIN, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# ── Files ──


def test_a_directory_is_locked_once_and_left_as_it_was(tmp_path):
    with atomic.lock_dir(tmp_path) as first, atomic.lock_dir(tmp_path) as second:
        assert (first, second) == (True, False)
    assert list(tmp_path.iterdir()) == []
    with atomic.lock_dir(tmp_path) as again:
        assert again


def test_another_process_sees_the_lock(tmp_path):
    code = f"""if True:
        from pathlib import Path
        from dsv3_ref.checkpoints.atomic import lock_dir
        with lock_dir(Path({str(tmp_path)!r})) as free:
            print(free)"""

    def ask() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout

    with atomic.lock_dir(tmp_path):
        assert ask() == "False\n"
    assert ask() == "True\n"


def test_windows_syncs_files_that_are_open_for_writing_and_no_directories(tmp_path, monkeypatch):
    opened = []
    real = os.open
    (tmp_path / "x").touch()
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    monkeypatch.setattr(atomic, "os", FakeWindows())
    atomic.fsync_path(tmp_path / "x")
    atomic.fsync_path(tmp_path)
    assert opened == [os.O_RDWR]


class FakeWindows:
    """os, as Windows names itself."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)


# ── Devices and backends ──


def test_another_device_gets_the_reference_of_every_op():
    """`--device mps` on a Mac: no op of ours is tuned for it."""
    assert ops.expand_backends(("auto",), "mps") == ("torch",)
    for name in ops.IMPLS:
        assert ops.resolve_impl(name, "mps") is ops.IMPLS[name]["torch"]


@pytest.mark.parametrize(
    ("backends", "sentence"),
    [
        (("triton",), "DSV3_BACKEND=triton needs an NVIDIA GPU, and the device is cpu"),
        (("triton", "torch"), "unset it, or set it to cpu,torch"),
        (("tritn",), "no backend tritn; known: "),
    ],
    ids=["triton", "triton,torch", "misspelled"],
)
def test_a_backend_that_cannot_run_is_a_sentence(backends, sentence, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "ACTIVE_BACKENDS", backends)
    with pytest.raises(UserError, match=sentence):
        strategy.pick_device("cpu")


def test_an_op_without_the_backend_is_a_sentence(tmp_path, monkeypatch, capsys):
    with miniruns.home(tmp_path), ops.use("cpu"):
        assert main(options(tmp_path, tmp_path / "run")) == 2
    assert "name a second choice: DSV3_BACKEND=cpu,torch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_device_that_torch_lacks_is_one_short_sentence():
    """torch's own error lists fifty dispatch keys."""
    with pytest.raises(UserError) as e:
        strategy.pick_device("mps")
    assert len(str(e.value)) < 200 and str(e.value).endswith("--device auto chooses one")


def test_a_mac_with_mps_passes_the_check(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    assert strategy.pick_device("mps").type == "mps"


# ── A checkout, and what is installed ──


def test_the_kernels_can_be_imported_from_a_checkout(tmp_path):
    """`git clone` and `python -c "import dsv3_ref.kernels"`, without pip install."""
    (tmp_path / "dsv3_ref").mkdir()
    shutil.copy(ROOT / "dsv3_ref" / "__init__.py", tmp_path / "dsv3_ref")
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "pyproject.toml").touch()
    code = "import dsv3_ref.kernels.launch as x; print(x.__name__, x.__file__)"
    sources = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dsv3_ref;"
    sources += f"dsv3_ref.__path__.append({str(ROOT / 'dsv3_ref')!r});"  # the other modules
    done = subprocess.run([sys.executable, "-c", sources + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"dsv3_ref.kernels.launch {tmp_path}/kernels/launch.py\n"
