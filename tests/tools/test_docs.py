"""The pages of docs/ agree with the code that they describe."""

import ast
import re
from itertools import chain

import lint
import yaml

CODE = ("dsv3_ref", "kernels", "notebooks")


def columns(page: str) -> set[str]:
    """Return the code spans in the first column of a page's tables."""
    rows = [x.split("|")[1] for x in lint.text(lint.ROOT / page).splitlines() if x.startswith("|")]
    return set(re.findall(r"`([^`]+)`", "\n".join(rows)))


def patterns(tree) -> list[str]:
    """Return the axis patterns of all calls of einsum, rearrange and reduce."""
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call)]
    calls = [x for x in calls if re.search(r"\b(einsum|rearrange|reduce)$", ast.unparse(x.func))]
    arguments = chain.from_iterable(call.args for call in calls)
    texts = [x.value for x in arguments if isinstance(x, ast.Constant)]
    return [x for x in texts if isinstance(x, str) and "->" in x]


def test_every_axis_is_in_the_notation_table():
    letters = columns("docs/notation.md")
    assert all(len(x) == 1 for x in letters)
    files = [p for p in lint.files() if p.suffix == ".py"]
    files = [p for p in files if p.relative_to(lint.ROOT).parts[0] in CODE]
    used = {p.name: patterns(ast.parse(lint.text(p))) for p in files}
    for name, axis_patterns in used.items():
        unknown = set(re.findall(r"\b[a-z]\b", " ".join(axis_patterns))) - letters
        assert not unknown, f"{name}: {unknown} of {axis_patterns}"
    assert sum(map(len, used.values())) > 50


def test_every_documented_metric_is_written_by_some_command():
    """The other direction is checked by `miniruns.metrics`, on the runs of all tests."""
    folders = {("dsv3_ref", name) for name in ("training", "posttraining", "parallel")}
    sources = [p for p in lint.files() if p.relative_to(lint.ROOT).parts[:2] in folders]
    text = "\n".join(map(lint.text, sources))
    documented = columns("docs/metrics.md")
    assert [x for x in documented if f'"{x}"' not in text and f"{x}=" not in text] == []


def test_ci_runs_the_commands_of_the_readme():
    workflow = yaml.safe_load((lint.ROOT / ".github/workflows/test.yml").read_text())
    steps = chain.from_iterable(job["steps"] for job in workflow["jobs"].values())
    commands = {step["run"] for step in steps if step.get("run", "").startswith("make")}
    assert commands == {"make test", "make test-full"}
    readme = lint.text(lint.ROOT / "README.md")
    assert all(re.search(rf"^{command}\b", readme, re.MULTILINE) for command in commands)


def test_the_hooks_call_tools_that_exist():
    hooks = yaml.safe_load((lint.ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    scripts = [m[0] for hook in hooks if (m := re.search(r"tools/\w+\.py", hook["entry"]))]
    assert scripts == ["tools/export.py", "tools/lint.py"]
    assert all((lint.ROOT / script).is_file() for script in scripts)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((lint.ROOT / "CITATION.cff").read_text())
    project = re.search(r'^version = "(.*)"', lint.text(lint.ROOT / "pyproject.toml"), re.MULTILINE)
    assert citation["version"] == project[1]
    assert citation["cff-version"] == "1.2.0"
