"""The pages of docs/ agree with the code that they describe."""

import ast
import re

import lint
import yaml

CODE = ("dsv3_ref", "kernels", "notebooks")


def columns(page: str) -> set[str]:
    """The code spans in the first column of a page's tables."""
    rows = [x.split("|")[1] for x in lint.text(lint.ROOT / page).splitlines() if x.startswith("|")]
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def patterns(tree) -> list[str]:
    """Axis patterns of every call of einsum, rearrange, reduce and repeat."""
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call)]
    calls = [x for x in calls if re.search(r"\b(einsum|rearrange|reduce)$", ast.unparse(x.func))]
    texts = [a.value for x in calls for a in x.args if isinstance(a, ast.Constant)]
    return [x for x in texts if isinstance(x, str) and "->" in x]


def test_every_axis_is_in_the_notation_table():
    letters = columns("docs/notation.md")
    assert all(len(x) == 1 for x in letters)
    files = [p for p in lint.files() if p.suffix == ".py"]
    files = [p for p in files if p.relative_to(lint.ROOT).parts[0] in CODE]
    used = {p.name: patterns(ast.parse(lint.text(p))) for p in files}
    unknown = {
        (name, pattern, letter)
        for name, found in used.items()
        for pattern in found
        for letter in re.findall(r"\b[a-z]\b", pattern)
        if letter not in letters
    }
    assert unknown == set()
    assert sum(map(len, used.values())) > 50


def test_every_documented_metric_is_written_by_some_command():
    """The other direction is checked by `miniruns.metrics`, on the runs of all tests."""
    parts = ("training", "posttraining", "parallel")
    sources = [
        p
        for p in lint.files()
        if p.relative_to(lint.ROOT).parts[:2] in {("dsv3_ref", x) for x in parts}
    ]
    text = "\n".join(map(lint.text, sources))
    unused = [
        key
        for key in columns("docs/metrics.md")
        if f'"{key}"' not in text and f"{key}=" not in text
    ]
    assert unused == []


def test_what_runs_elsewhere_runs_what_the_readme_says():
    workflow = yaml.safe_load((lint.ROOT / ".github/workflows/test.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
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
