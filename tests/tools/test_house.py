"""Rules of the repository: one environment, short functions, a light import, nothing private."""

import io
import re
import subprocess
import sys
import tokenize
import tomllib

import lint
import pytest
import style
import yaml

TOP = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Dockerfile",
    "LOG.md",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "docs",
    "dsv3_ref",
    "environment.yml",
    "figures",
    "kernels",
    "notebooks",
    "pyproject.toml",
    "slurm",
    "tests",
    "tools",
}


def pyproject() -> dict:
    return tomllib.loads((lint.ROOT / "pyproject.toml").read_text())


def requirements(project: dict, *extras: str) -> list[str]:
    """Return the requirements of the package and of extras, which may name other extras."""
    own = re.compile(rf"{project['name']}\[(.*)\]")
    out = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inner = own.fullmatch(line)
            names = inner[1].split(",") if inner else []
            out += requirements(project, *names)[len(project["dependencies"]) :] or [line]
    return out


def run(*command: str):
    done = subprocess.run(command, cwd=lint.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── One environment ──


def test_conda_and_pip_install_the_same():
    project = pyproject()["project"]
    conda = yaml.safe_load((lint.ROOT / "environment.yml").read_text())
    *named, pip = conda["dependencies"]
    assert named == [f"python{project['requires-python']}", "pip"]
    assert conda["channels"] == ["conda-forge"]
    assert conda["name"] == project["name"]
    want = requirements(project, "dev")
    assert sorted(pip["pip"]) == sorted({*want, "-e ."})
    assert set(requirements(project, "lab")) < set(want)


# ── The tree ──


def test_no_two_test_files_have_the_same_name():
    """Pytest imports them by their names alone, so the second one would not run."""
    names = [path.name for path in (lint.ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_top_level_has_no_other_files():
    top = {path.relative_to(lint.ROOT).parts[0] for path in lint.files()}
    assert top <= TOP


def test_packages_are_declared():
    folders = {p.parent for p in lint.files() if p.name == "__init__.py"}
    names = {".".join(p.relative_to(lint.ROOT).parts) for p in folders}
    declared = set(pyproject()["tool"]["setuptools"]["packages"])
    assert {f"dsv3_ref.{n}" if n.startswith("kernels") else n for n in names} == declared


def test_no_function_is_long_and_nothing_private_is_mentioned():
    problems = lint.tree()
    for name in list(problems):
        is_chapter = re.match(r"notebooks/\d", name)  # their structure has its own tests
        if is_chapter and not lint.private(lint.text(lint.ROOT / name)):
            del problems[name]
    assert problems == {}


def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", "-q")


def test_ruff_would_format_nothing():
    run(sys.executable, "-m", "ruff", "format", "--check", "-q")


def test_the_style_holds_everywhere():
    violations = style.check(lint.sources())
    assert not violations, "\n".join(map(str, violations[:20]))


# ── The package ──


def test_importing_the_package_is_fast_and_needs_no_torch():
    out = run(
        sys.executable,
        "-c",
        "import sys, time; start = time.perf_counter(); import dsv3_ref;"
        "print(time.perf_counter() - start, 'torch' in sys.modules)",
    )
    seconds, torch = out.split()
    assert float(seconds) < 3
    assert torch == "False"


def test_names_of_the_package_are_loaded_when_used():
    out = run(
        sys.executable, "-c", "import dsv3_ref; print(dsv3_ref.count_params(dsv3_ref.TINY).total)"
    )
    assert int(out) > 1e6


def test_an_unknown_name_raises_attribute_error():
    import dsv3_ref

    with pytest.raises(AttributeError, match="has no attribute 'Transformr'"):
        _ = dsv3_ref.Transformr
    assert "Transformer" in dir(dsv3_ref)


def code_tokens(source: str) -> str:
    """Return the tokens of Python code, separated by spaces, without comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(x.string for x in tokens if x.type in (tokenize.NAME, tokenize.OP))


def test_nothing_is_unpickled():
    """A checkpoint from a stranger must not run code: safetensors and JSON only."""
    danger = re.compile(r"\btorch \. load \(|\bpickle\b|allow_pickle = True|\bjoblib\b|\bdill\b")
    assert danger.search(code_tokens('"""Text."""\nimport pickle  # unpickles\n'))
    assert not danger.search(code_tokens('"""No pickle."""\nx = torch.save(y)  # pickle\n'))
    sources = [p for p in lint.files() if p.is_relative_to(lint.ROOT / "dsv3_ref")]
    sources = [p for p in sources if p.suffix == ".py"]
    assert [str(p) for p in sources if danger.search(code_tokens(lint.text(p)))] == []


# ── The lints ──


def test_long_functions_are_found_everywhere():
    body = "\n".join(["        x = 1"] * 5)
    source = f"class A:\n    def f(self):\n{body}\n\n    async def g(self):\n{body}\n        y = 1"
    assert lint.long_functions(source, 7) == []
    assert lint.long_functions(source, 6) == ["g: 7 lines, the cap is 6"]


@pytest.mark.parametrize("text", ["see issue {}12", "Issues {}3", "cd /{}/main", "in '/{}/x'"])
def test_private_words_are_found(text):
    text = text.format("home" if "/" in text else "#")
    assert len(lint.private(f"fine\n{text}\n")) == 1


@pytest.mark.parametrize(
    "text", ["framework/main", "issue 12", "a/home/b", "../work/x", "/workbench"]
)
def test_harmless_words_pass(text):
    assert lint.private(text) == []
