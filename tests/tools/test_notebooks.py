"""Every chapter runs, its exercises can be solved, and its committed outputs are up to date."""

import copy
import os
import re
import runpy
import textwrap
import time
from contextlib import contextmanager
from itertools import chain

import book
import export
import jupytext
import lint
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from dsv3_ref import ops

CHAPTERS = sorted(book.NOTEBOOKS.glob("[0-9]*.py"))
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


# ── Run a chapter as a script, then solve its exercises ──


def restore_ops(before: dict) -> None:
    """Drop the ops that a chapter (`__main__`) registered; keep those of imported modules."""
    for name, impls in list(ops.IMPLS.items()):
        imported = {backend: fn for backend, fn in impls.items() if fn.__module__ != "__main__"}
        ops.IMPLS[name] = before.get(name, {}) | imported
        if not ops.IMPLS[name]:
            del ops.IMPLS[name]


@contextmanager
def undone():
    """Undo the global changes of a chapter: redefined ops, threads, dtypes, figures."""
    modules = [b for b in ops.BACKEND_MODULES if b != "triton"]
    ops.expand_backends(tuple(modules), "cpu")  # registered now, before the chapter's own ops
    impls = {name: dict(by_backend) for name, by_backend in ops.IMPLS.items()}
    active = ops.ACTIVE_BACKENDS
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    environ, grad = dict(os.environ), torch.is_grad_enabled()
    try:
        yield
    finally:
        restore_ops(impls)
        ops.ACTIVE_BACKENDS = active
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        os.environ.clear()
        os.environ.update(environ)
        plt.close("all")


def run_script(path) -> dict:
    """Run a chapter as a script, in its short form; return its global names."""
    os.environ["DSV3_SHORT"] = "1"
    return runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda p: p.stem)
def chapter(request):
    """Run a chapter; return its path and global names, which its exercises share."""
    with undone():
        yield request.param, run_script(request.param)


def spoiled(x):
    """Change every number of an answer, cut every text and list, and drop the rest."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, torch.Tensor):
        return ~x if x.dtype == torch.bool else x + 1
    if isinstance(x, int | float | complex):
        return x * 1.2 + 1
    if isinstance(x, str | list):
        return x[:-1]
    if isinstance(x, tuple):
        return tuple(map(spoiled, x))
    return {k: spoiled(v) for k, v in x.items()} if isinstance(x, dict) else None


OPEN_ENDED = {"check_overflow", "check_apart", "check_cheat"}  # several answers are right


def spoil(check: str, fn):
    """Wrap a function to spoil its results; if it works in place, the wrapper does nothing."""

    def wrong(*args, **kwargs):
        copied_args, copied_kwargs = copy.deepcopy((args, kwargs))
        result = fn(*copied_args, **copied_kwargs)
        if check in OPEN_ENDED or result is None:
            return None
        return spoiled(fn(*args, **kwargs))

    return wrong


def solve(cells, names: dict) -> list[str]:
    """Return the faults of the exercises: wrong answers that pass, right ones that fail."""
    bad, solved = [], dict(names)
    for block in lint.answers(cells):
        exec(compile(block, "answer", "exec"), solved)
    for check, mine in lint.exercises(cells):
        if names[check](names[mine]) is not False:
            bad.append(f"{check} accepts the empty {mine}")
        if names[check](solved[mine]) is not True:
            bad.append(f"{check} rejects the answer's {mine}")
        if names[check](spoil(check, solved[mine])) is not False:
            bad.append(f"{check} accepts {mine} spoiled")
    return bad


@pytest.mark.notebook
def test_a_chapter_runs_and_its_answers_are_right(chapter):
    path, names = chapter
    assert solve(jupytext.read(path).cells, names) == []


@pytest.mark.full
@pytest.mark.notebook
@every_chapter
def test_a_chapter_runs_as_a_notebook_in_a_minute(path, monkeypatch):
    """One core needs less than a minute; waiting, also for other processes, has another limit."""
    monkeypatch.delenv("DSV3_SHORT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start, used = time.perf_counter(), processor_seconds_of_children()
    book.execute(path)
    assert processor_seconds_of_children() - used < 60
    assert time.perf_counter() - start < 240


def processor_seconds_of_children() -> float:
    """Return the processor time of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


# ── Committed notebooks ──


@every_chapter
def test_a_chapter_has_the_required_structure(path):
    assert lint.chapter(path) == []


def test_modules_are_up_to_date_with_the_notebooks(capsys):
    assert export.main(check=True) == 0, capsys.readouterr().out


@every_chapter
def test_the_notebook_was_built_by_the_book(path):
    nb = nbformat.read(path.with_suffix(".ipynb"), 4)
    built = nbformat.writes(nb)
    assert built == nbformat.writes(book.normalize_notebook(nb)), "run make book"
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = chain.from_iterable(cell.outputs for cell in code)
    assert not [output for output in outputs if output.output_type == "error"]


# ── A small chapter to test the book and the lint ──

SMALL = """
    # %% [markdown]
    # # 77 · Small

    # %%
    #| export
    import math

    # %% [markdown]
    # ## Why, Paper, Experiment, Play, Exercises, Scale-up
    # WORDS

    # %%
    #| export
    def double(x):
        return 2 * x


    # %%
    #| export
    def half(x):
        return x / 2


    # %%
    assert double(half(3)) == 3
    print(double, object())

    # %%
    from dsv3_ref.viz import figure, play, show


    def draw(width):
        fig, ax = figure()
        ax.plot([0, width], [0, 1])
        show(fig)


    draw(3)
    play(draw, width=(1, 5))


    # %%
    def my_one():
        return ...


    def check_one(fn) -> bool:
        return fn() == 1


    check_one(my_one)

    # %%
    def my_two():
        return ...


    def check_two(fn) -> bool:
        return fn() == 2


    check_two(my_two)

    # %%
    check_one(my_one)

    # %% [markdown]
    # <details><summary>Answer</summary>
    #
    # ```python
    # def my_one():
    #     return math.isqrt(1)
    # ```
    # </details>
    #
    # <details><summary>Answer</summary>
    #
    # ```python
    # def my_two():
    #     return double(my_one())
    # ```
    # </details>
"""


@pytest.fixture
def small(tmp_path):
    def write(old: str = "", new: str = ""):
        text = textwrap.dedent(SMALL).lstrip()
        assert old in text
        path = tmp_path / "77_small.py"
        path.write_text(text.replace(old, new, 1).replace("WORDS", "word " * 1000))
        return path

    return write


def test_a_valid_chapter_has_no_complaint(small):
    path = small("", "")
    assert lint.chapter(path) == []
    with undone():
        assert solve(jupytext.read(path).cells, run_script(path)) == []


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("# # 77 · Small", "# # 76 · Small", "the first cell must start with '# 77 · Title'"),
        ("# # 77 · Small", "# # Small", "the first cell must start with '# 77 · Title'"),
        ("Experiment, ", "", "no section 'Experiment'"),
        ("Scale-up", "", "no section 'Scale'"),
        ("WORDS", "some words", "words, not 900–2600"),
        ("WORDS", "word " * 2000 + "WORDS", "words, not 900–2600"),
        ("def half", "def third", None),
        ("# %%\n#| export\ndef half", "# %%\n\n# %%\n#| export\ndef half", "exported cell 5"),
        ("draw(3)", "plt.show()", "plt.show() blocks"),
        ("    show(fig)", "    fig.canvas.draw()", "show(fig) is never called"),
        ("\nplay(draw", "\nprint(draw", "play(…) or embed(…) is missing"),
        ("\ncheck_two(my_two)", "", "2 exercises"),
        ("def my_two():\n#", "def my_too():\n#", "no answer defines my_two"),
    ],
)
def test_a_planted_fault_is_found(small, old, new, complaint):
    complaints = lint.chapter(small(old, new))
    assert len(complaints) == (complaint is not None), complaints
    assert all(complaint in x for x in complaints)


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("return double(my_one())", "return 3", "check_two rejects the answer's my_two"),
        ("return fn() == 2", "return True", "check_two accepts the empty my_two"),
        ("return fn() == 2", "return fn() != 3", "check_two accepts my_two spoiled"),
    ],
)
def test_a_wrong_exercise_is_found(small, old, new, complaint):
    path = small(old, new)
    with undone():
        assert complaint in solve(jupytext.read(path).cells, run_script(path))


@pytest.mark.notebook
def test_a_second_build_changes_no_byte(small, capsys):
    path = small("", "")
    out = path.with_suffix(".ipynb")
    assert book.build(path)
    first = out.read_text()
    assert book.build(path)
    assert out.read_text() == first
    assert re.search(r"77_small +\d+ s\n", capsys.readouterr().out)
    assert book.SLIDERS in first
    assert "image/png" in first
    assert "model_id" not in first
    assert " at 0x" not in first


def test_an_edited_cell_leaves_the_other_ids(small):
    ids = [book.cell_ids(jupytext.read(small(*x)).cells) for x in (("", ""), ("x / 2", "x * 0.5"))]
    assert [a == b for a, b in zip(*ids)].count(False) == 1
    assert ids[0][-2].endswith("-2") is False
    assert len(set(ids[0])) == len(ids[0])


def test_equal_cells_get_different_ids():
    cells = [nbformat.v4.new_code_cell("f(x)") for _ in range(3)]
    one, two, three = book.cell_ids(cells)
    assert (two, three) == (f"{one}-2", f"{one}-3")


@pytest.mark.notebook
def test_a_failing_cell_is_shown_and_nothing_written(small, capsys):
    path = small("assert double(half(3)) == 3", "assert double(half(3)) == 4, 'oh'")
    assert not book.build(path)
    assert "AssertionError" in capsys.readouterr().out
    assert not path.with_suffix(".ipynb").exists()


def test_ops_of_a_chapter_do_not_outlive_it(small):
    """Redefined ops are restored, new ones removed; registrations of imported modules stay."""
    code = """from dsv3_ref import ops, mla
@ops.op
def swiglu(gate, up):
    return 0

@ops.op
def brand_new():
    return 0
"""
    path, real = small("def half", f"{code}\n\ndef half"), dict(ops.IMPLS["swiglu"])
    with undone():
        run_script(path)
        with ops.use("torch"):
            assert ops.swiglu(1, 1) == 0
    assert ops.IMPLS["swiglu"] == real
    assert "brand_new" not in ops.IMPLS
    assert set(ops.IMPLS["attention"]) >= {"torch", "sdpa"}


def test_chapters_are_found_by_number_name_or_file():
    for name in ("03", "mla", "03_mla", "notebooks/03_mla.py", "03_mla.ipynb"):
        assert [p.stem for p in book.find([name])] == ["03_mla"]
    assert book.find([]) == CHAPTERS
    with pytest.raises(SystemExit, match="no chapter 33, x; there are 00_tour"):
        book.find(["33", "03", "x"])
