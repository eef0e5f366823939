"""What pyproject.toml promises about the whole package: imports one way, types that hold."""

import re
import shutil
import subprocess
import sys

import lint
import pytest


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that holds the package as it is installed: kernels/ inside."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(lint.ROOT / "dsv3_ref", folder / "dsv3_ref", ignore=ignored)
    shutil.copytree(lint.ROOT / "kernels", folder / "dsv3_ref/kernels", ignore=ignored)
    shutil.copy(lint.ROOT / "pyproject.toml", folder)
    return folder


def test_imports_point_one_way(checkout):
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as main; main()",
    ]
    done = subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_kernels_are_imported_by_name_only():
    """`lint-imports` cannot see them in a plain checkout: they lie outside of the package."""
    wanted = re.compile(r"^\s*(from|import) dsv3_ref(\.kernels\b| import .*\bkernels\b)", re.M)
    sources = [p for p in lint.files() if p.is_relative_to(lint.ROOT / "dsv3_ref")]
    assert [p.name for p in sources if p.suffix == ".py" and wanted.search(p.read_text())] == []
    assert wanted.search("    from dsv3_ref.kernels import gemm")
    assert wanted.search("from dsv3_ref import kernels")


def test_types_hold(checkout):
    cache = f"--cache-dir={lint.ROOT / '.mypy_cache'}"
    command = [sys.executable, "-m", "mypy", "-p", "dsv3_ref", cache, "--no-error-summary"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode == bool(errors), done.stdout + done.stderr
    assert not errors, "\n".join(errors[:20])
