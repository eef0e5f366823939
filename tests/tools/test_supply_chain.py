"""What is installed: direct dependencies have bounds, CI installs by hash, no remote code runs."""

import re
from pathlib import Path

import lint
import lock
import pytest
import yaml
from packaging.requirements import Requirement
from test_house import pyproject

WORKFLOWS = sorted(lint.ROOT.glob(".github/workflows/*.yml"))
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def direct_dependencies() -> list[Requirement]:
    """Return what pyproject.toml requires to build, to run and in any extra."""
    tables = pyproject()
    project = tables["project"]
    lines = [*tables["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    requirements = [Requirement(line) for line in dict.fromkeys(lines)]
    return [r for r in requirements if r.name != project["name"]]


def is_bounded(requirement: Requirement) -> bool:
    """Return whether the versions of a requirement end on both sides."""
    operators = {specifier.operator for specifier in requirement.specifier}
    return "==" in operators or (">=" in operators and "<" in operators)


def read_lock() -> dict[str, list[str]]:
    """Return the versions of every package in the lock file, by normalized name."""
    versions: dict[str, list[str]] = {}
    for pin in lock.split_pins(lock.LOCK.read_text()):
        name, version = pin.partition(";")[0].strip().split("==")
        versions.setdefault(name.lower().replace("_", "-"), []).append(version)
    return versions


@pytest.mark.parametrize("requirement", direct_dependencies(), ids=lambda r: r.name)
def test_a_direct_dependency_is_bounded_locked_and_within_its_bounds(requirement):
    assert is_bounded(requirement), f"{requirement} needs a lower and an upper bound"
    versions = read_lock().get(requirement.name, [])
    if lock.NOT_LOCKED.fullmatch(requirement.name):
        assert versions == []
    else:
        assert versions, f"{requirement.name} is not locked: python tools/lock.py"
        assert all(requirement.specifier.contains(version) for version in versions)


def test_every_locked_file_has_a_hash_and_no_address():
    text = lock.LOCK.read_text()
    pins = lock.split_pins(text)
    assert len(pins) > 200
    for name, pin in pins.items():
        assert re.match(r"[\w.-]+==[\w.!+]+( ;|$)", name), name
        assert HASH.search(pin), f"{name} has no hash"
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links| @ |git\+", text)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_the_workflows_install_by_hash_and_use_actions_by_commit(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for name, job in jobs.items():
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions), name
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        if "make test" in commands:
            install = "pip install --require-hashes --no-deps -r .github/requirements.txt"
            assert install in commands


def test_only_the_workflow_needs_the_lock():
    for name in ("Makefile", ".ci/run"):
        assert lock.LOCK.name not in (lint.ROOT / name).read_text()


def test_no_code_of_a_downloaded_model_is_run():
    switch = "trust_" + "remote_code"
    files = [path for path in lint.files() if path.suffix in (".py", ".md", ".sh", ".ipynb", "")]
    found = [path for path in files if path.is_file() and switch in lint.text(path)]
    assert found == []


def test_pins_are_split_by_name_and_marker():
    text = "# note\na==1 ; python_version < '3' \\\n    --hash=sha256:0\n"
    text += "a==2 \\\n    --hash=sha256:1\n"
    pins = lock.split_pins(text)
    assert list(pins) == ["a==1 ; python_version < '3'", "a==2"]
    assert pins["a==2"].endswith("sha256:1")
    assert Path(lock.LOCK).is_relative_to(lint.ROOT)
