"""What is installed and distributed: wheel, sdist, metadata, completion."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import lint
import pytest

from dsv3_ref.cli.commands import BY_NAME
from dsv3_ref.cli.main import main

BUILD = """
import os, sys
from setuptools import build_meta
source, out = sys.argv[1:]
os.chdir(source)
for build in (build_meta.build_sdist, build_meta.build_wheel):
    build(out)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist and the wheel of the tracked files."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for path in lint.files():
        target = source / path.relative_to(lint.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(source), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tracked() -> set[str]:
    return {path.relative_to(lint.ROOT).as_posix() for path in lint.files()}


def test_the_source_distribution_is_the_repository(dist):
    """Packagers of distributions build and test from the sdist: missing tests, missing data."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() - names == set()


def test_the_wheel_has_every_module_and_nothing_else(dist):
    """Sub-packages left out of a wheel: `ModuleNotFoundError` after `pip install`."""
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = r"(dsv3_ref|kernels)/.*(\.py|py\.typed)$|dsv3_ref/viz/components/"
    modules = {x for x in tracked() if re.match(code, x)}
    assert names == {re.sub("^kernels/", "dsv3_ref/kernels/", name) for name in modules}


def test_the_metadata_describe_the_package(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        files = {Path(name).name: wheel.read(name) for name in wheel.namelist()}
    about = message_from_bytes(files["METADATA"])
    assert about["License-Expression"] == "MIT" and about["Author"] and about["Project-URL"]
    assert "Programming Language :: Python :: 3.13" in about.get_all("Classifier")
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert b"dsv3 = dsv3_ref.cli.main:main" in files["entry_points.txt"]
    assert {"wandb", "mlflow", "serve", "rl"} <= set(about.get_all("Provides-Extra"))
    page = about.get_payload()
    assert page.startswith("# dsv3-ref")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all(link.startswith("https://") for link in links), "relative links break"


# ── Completion ──


def complete(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    line = f"{script}\nCOMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}\n"
    done = subprocess.run(
        ["bash", "-c", line + '_dsv3; printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_bash_completes_commands_and_options(capsys):
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert set(complete(script, "dsv3", "")) > {name.split()[0] for name in BY_NAME}
    assert complete(script, "dsv3", "tr") == ["train"]
    assert complete(script, "dsv3", "data", "p") == ["prepare"]
    assert complete(script, "dsv3", "train", "--warm") == ["--warmup-steps"]
    assert complete(script, "dsv3", "train", "--steps", "5", "--model.n-h") == ["--model.n-heads"]
    assert complete(script, "dsv3", "data", "prepare", "--shard") == ["--shard-tokens"]
    assert complete(script, "dsv3", "train", "my_te") == []  # files, by `-o default`


def test_other_shells(capsys):
    assert main(["--print-completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out.splitlines()[0]
    assert main(["--print-completion", "fish"]) == 2
    assert "give bash or zsh" in capsys.readouterr().err
