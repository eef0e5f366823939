"""Rules of this repository that ruff lacks: structure of chapters, length of functions.

Without arguments it prints all complaints; the tests require that there are none. `--style
[PATH …]` prints violations of the rules in tools/style.py.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jupytext
import style
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ["Why", "Paper|report", "Experiment", "Play", "Exercises", "Scale"]
WORDS = range(900, 2601)
EXERCISES = range(3, 6)
CAPS = {"dsv3_ref": 40, "tools": 40, "kernels": 80}  # lines of a function
PRIVATE = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|\b[Ii]ssues? #\d")
ANSWER = re.compile(r"<details>.*?</details>", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r"^(check_\w+)\((my_\w+)\)", re.MULTILINE)


# ── Chapters ──


def markdown(cells: list[NotebookNode]) -> str:
    """Return the Markdown of a chapter."""
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def code(cells: list[NotebookNode]) -> str:
    """Return the code of a chapter."""
    return "\n\n".join(c.source for c in cells if c.cell_type == "code")


def exported(cell: NotebookNode) -> bool:
    """Return whether a cell goes into the package."""
    return cell.cell_type == "code" and cell.source.startswith("#| export")


def answers(cells: list[NotebookNode]) -> list[str]:
    """Return the Python blocks of the folded answers."""
    return PYTHON.findall("\n".join(ANSWER.findall(markdown(cells))))


def exercises(cells: list[NotebookNode]) -> list[tuple[str, str]]:
    """Return (checker, function of the reader) in the order of the calls."""
    return CHECK.findall(code(cells))


def bad_title(stem: str, cells: list[NotebookNode]) -> list[str]:
    """Check that the first cell is `# NN · Title`, with the number of the file."""
    first = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    good = re.match(rf"# {stem[:2]} · \S", first)
    return [] if good else [f"the first cell must start with '# {stem[:2]} · Title'"]


def unexplained(cells: list[NotebookNode]) -> list[str]:
    """Check that Markdown precedes every run of exported cells."""
    bad: list[str] = []
    explained = in_run = False
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            explained = True
        elif exported(cell):
            bad += [] if explained else [f"no markdown explains the exported cell {i}"]
        elif in_run:
            explained = False
        in_run = exported(cell)
    return bad


def bad_code(cells: list[NotebookNode]) -> list[str]:
    """Check that a chapter has a figure and a widget, and calls nothing that blocks a script."""
    text = code(cells)
    bad: list[str] = []
    bad += ["plt.show() blocks a script: use show(fig)"] if "plt.show(" in text else []
    bad += [] if "show(" in text else ["no figure: show(fig) is never called"]
    widget = re.search(r"^(play|embed)\(", text, re.MULTILINE)
    bad += [] if widget else ["no widget: play(…) or embed(…) is missing"]
    return bad


def bad_sections(cells: list[NotebookNode]) -> list[str]:
    """Check that all sections of `SECTIONS` exist."""
    heads = re.findall(r"^##+ (.*)", markdown(cells), re.MULTILINE)
    missing = [s for s in SECTIONS if not any(re.search(s, head) for head in heads)]
    return [f"no section '{s}'" for s in missing]


def bad_length(cells: list[NotebookNode]) -> list[str]:
    """Check the number of words without code blocks and displayed equations."""
    prose = re.sub(r"```.*?```|\$\$.*?\$\$", "", markdown(cells), flags=re.DOTALL)
    n = len(prose.split())
    return [] if n in WORDS else [f"{n} words, not {WORDS[0]}–{WORDS[-1]}"]


def bad_exercises(cells: list[NotebookNode]) -> list[str]:
    """Check the number of exercises, and that each has an answer."""
    pairs, solved = exercises(cells), "\n".join(answers(cells))
    bad = [] if len(pairs) in EXERCISES else [f"{len(pairs)} exercises, not 3–5"]
    bad += [f"no answer defines {my}" for _, my in pairs if f"def {my}(" not in solved]
    return bad


def chapter(path: Path) -> list[str]:
    """Return complaints about the structure of a chapter."""
    cells = jupytext.read(path).cells
    bad = bad_title(path.stem, cells) + bad_length(cells)
    for rule in (unexplained, bad_sections, bad_exercises, bad_code):
        bad += rule(cells)
    return bad


# ── The whole tree ──


def files() -> list[Path]:
    """Return the files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [p for name in sorted(set(names.split("\0"))) if name and (p := ROOT / name).is_file()]


def long_functions(source: str, cap: int) -> list[str]:
    """Return a complaint per function longer than the cap, including nested ones and methods."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, style.FUNCTIONS)]
    sizes = [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]
    return [f"{name}: {size} lines, the cap is {cap}" for name, size in sizes if size > cap]


def private(source: str) -> list[str]:
    """Find lines that name a personal folder or an issue number; encoded pictures are skipped."""
    lines = enumerate(source.splitlines(), start=1)
    return [f"line {i}: {m[0]}" for i, x in lines if len(x) < 2000 and (m := PRIVATE.search(x))]


def text(path: Path) -> str:
    """Return the text of a file, or '' if it is binary."""
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode()


def tree() -> dict[str, list[str]]:
    """Return file → complaints for every file with complaints."""
    bad = {}
    for path in files():
        name = path.relative_to(ROOT)
        complaints = private(text(path))
        if path.suffix == ".py" and name.parts[0] in CAPS:
            complaints += long_functions(text(path), CAPS[name.parts[0]])
        if path.suffix == ".py" and name.parts[0] == "notebooks":
            complaints += chapter(path)
        bad[str(name)] = complaints
    return {name: complaints for name, complaints in bad.items() if complaints}


def sources() -> list[style.Source]:
    """Return the Python and Markdown files of the repository, for the rules of style."""
    paths = [p for p in files() if p.suffix in (".py", ".md")]
    return [style.Source(str(p.relative_to(ROOT)), text(p)) for p in paths]


def print_style(prefixes: list[str]) -> int:
    """Print violations of style in files whose path has one of the prefixes; count them by rule."""
    prefixes = [str(Path(x).resolve().relative_to(ROOT)) for x in prefixes]
    violations = [
        v for v in style.check(sources()) if not prefixes or v[0].startswith(tuple(prefixes))
    ]
    for path, line, rule, message in violations:
        print(f"{path}:{line}: [{rule}] {message}")
    for rule, n in Counter(rule for _, _, rule, _ in violations).most_common():
        print(f"{n:6} {rule}", file=sys.stderr)
    return int(bool(violations))


def main(argv: list[str]) -> int:
    """Print complaints about the tree, or with --style about the style of the given files."""
    if argv[:1] == ["--style"]:
        return print_style(argv[1:])
    bad = tree()
    for name, complaints in bad.items():
        print("\n".join(f"{name}: {x}" for x in complaints))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
