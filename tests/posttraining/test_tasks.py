"""Problems: what is right, worked answers, and files of one's own, with poison in them."""

import json
import shutil
import time

import pytest

from dsv3_ref.config import UserError
from dsv3_ref.posttraining import prompts
from dsv3_ref.posttraining.prompts import TASKS, FileTask, get_task, parse_weights, sft_variants
from dsv3_ref.rewards import extract_code

# ── Ours ──

CLOSED = [task for task in TASKS.values() if not task.is_open_ended]


@pytest.mark.parametrize("task", CLOSED, ids=lambda t: t.name)
def test_worked_answers_are_right_and_near_ones_are_not(task):
    practiced, held = task.problems
    assert len(held) == 200 and not {p.question for p in held} & {p.question for p in practiced}
    for p in held[:30]:
        for form in sft_variants(p):
            assert task.score(form[-1]["content"], p) == 1.0
        assert task.score(f"\\boxed{{{p.answer}0}}", p) == 0.0
        assert task.score(f"\\boxed{{{p.answer}}} \\boxed{{{p.answer}}}", p) == 0.0
        assert task.score(p.answer, p) == 0.0


def test_steps_of_a_sum():
    assert prompts.work_out_sum("…problem: 4 - 1 - 7 =") == "4-1=3;3-7=-4"
    assert prompts.work_out_sum("…problem: 0 + 9 + 9 =") == "0+9=9;9+9=18"


def test_letters():
    assert prompts.work_out_count('the letter "n" appear in the text: "none"?') == "n1 o n2 e"
    assert (
        prompts.work_out_spelling("Spell this word backward (example: sun -> nus): hay")
        == "h a y;y a h"
    )


def test_open_questions_speak_of_what_is_answered():
    for task in (task for task in TASKS.values() if task.is_open_ended):
        practiced, held = task.problems
        assert len(practiced) > 1000 and len(held) == 200
        for p in held[:30]:
            assert p.question.rstrip(".?").rsplit(" ", 1)[1] in p.answer


@pytest.mark.parametrize(
    "spec, why", [("sum", "no task 'sum'"), ("sums=x", "not a number"), ("sums=0", "above 0")]
)
def test_no_such_task(spec, why):
    with pytest.raises(UserError, match=why):
        parse_weights((spec,))


# ── One's own ──

DOUBLE = [
    {"function": "double", "args": [2], "expected": 4},
    {"function": "double", "args": [-1], "expected": -2},
]
ECHO = [{"stdin": "3 4", "expected": "7"}]


def file(folder, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "own.jsonl").write_text("\n".join(lines))
    return str(folder / "own.jsonl")


def test_answers_in_a_file_are_compared_by_value(tmp_path):
    name = file(tmp_path, *[{"question": f"{i}/2?", "answer": f"{i / 2}"} for i in range(1, 9)])
    task = get_task(name)
    practiced, held = task.problems
    assert (len(practiced), len(held), task.is_open_ended) == (6, 2, False)
    assert task is get_task(name) and {p.domain for p in held} == {name}
    p = next(p for p in practiced + held if p.question == "3/2?")
    for text, right in [(r"\boxed{\frac{3}{2}}", 1.0), (r"\boxed{1.5}", 1.0), ("1.5", 0.0),
                        (r"\boxed{2}", 0.0), (r"\boxed{1.5}\boxed{1.5}", 0.0)]:  # fmt: skip
        assert task.score(text, p) == right


def fenced(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\n"


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_code_in_an_answer_runs_against_all_cases(tmp_path):
    task = FileTask(
        file(tmp_path, *[{"question": f"double {i}?", "cases": DOUBLE} for i in range(4)])
    )
    p = task.problems[0][0]
    good = "def double(x):\n    return x + x"
    for text, right in [(fenced(good), 1.0), (good, 0.0), (fenced(good) * 2, 0.0),
                        (fenced("def double(x):\n    return 4"), 0.0)]:  # fmt: skip
        assert task.score(text, p) == right
    task = FileTask(file(tmp_path, *[{"question": f"add {i}?", "cases": ECHO} for i in range(4)]))
    assert task.score(fenced("print(sum(map(int, input().split())))"), task.problems[0][0]) == 1.0


def test_without_bubblewrap_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        FileTask(file(tmp_path, *[{"question": f"double {i}?", "cases": DOUBLE} for i in range(4)]))


def test_open_rows_need_a_question_only(tmp_path):
    asked = ["why?", "how?", "who?", "when?"]
    task = FileTask(file(tmp_path, *[{"question": q} for q in asked[:2]], "",
                     *[{"question": q} for q in asked[1:]]))  # fmt: skip
    practiced, held = task.problems
    assert task.is_open_ended and sorted(p.question for p in practiced + held) == sorted(asked)


A_CASE = 'a case needs "stdin" and "expected", or "function", "args" and "expected"'
POISON = {
    "{not json": "it is not JSON",
    "[]": "it is a list, not an object with named fields",
    '{"answer": "7"}': 'its "question" is missing or not a string',
    '{"question": "", "answer": "7"}': 'its "question" is missing or not a string',
    '{"question": "a", "answer": [7]}': '"answer" is not a string or a number',
    '{"question": "a", "cases": []}': '"cases" are not a list',
    '{"question": "a", "cases": "x"}': '"cases" are not a list',
    json.dumps({"question": "a", "answer": "7", "cases": ECHO}): 'both an "answer" and "cases"',
    '{"question": "a", "cases": [{"stdin": "a"}]}': A_CASE,
    '{"question": "a", "cases": [{"function": "f", "args": 1, "expected": 2}]}': A_CASE,
    '{"question": "a", "cases": [7]}': A_CASE,
}


@pytest.mark.parametrize("bad", POISON)
def test_a_poisoned_row_is_told_by_its_number_and_left_out(bad, tmp_path):
    told = []
    good = [{"question": q, "answer": "1"} for q in "abcd"]
    name = file(tmp_path, good[0], bad, *good[1:])
    task = FileTask(name, told.append)
    assert sum(map(len, task.problems)) == 4
    assert told[1:] == [f"{name}: 4 rows, 1 row left out"]
    assert told[0].startswith(f"{name}, line 2 is left out: ")
    assert POISON[bad] in told[0]


def test_files_that_cannot_be_practiced_on(tmp_path):
    with pytest.raises(UserError, match="has 0 problems"):
        FileTask(file(tmp_path, "x"), lambda _: None)
    with pytest.raises(UserError, match="mixes rows"):
        FileTask(
            file(tmp_path, {"question": "a", "answer": "1"}, *[{"question": q} for q in "bcd"])
        )


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nx\n```", "x\n"),
        ("so\n```\nx\ny\n```\nthere", "x\ny\n"),
        ("```py\n\n```\n", "\n"),
        ("```python\nx", None),
        ("x", None),
        ("```python\nx\n```\n```python\ny\n```", None),
        ("```rust\nx\n```", None),
    ],
)
def test_the_only_block_of_code(text, code):
    assert extract_code(text) == code


LONG_LINES = {
    "tildes": "~" * 200_000 + "`", "spaces": "```" + " " * 200_000 + "`",
    "both": "~" * 100_000 + " " * 100_000 + "`", "indent": " " * 200_000 + "x",
    "an end": "```\n" + "`" * 100_000 + " " * 100_000 + "x",
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_LINES)
def test_a_long_line_of_an_answer_takes_no_time(name):
    start = time.process_time()
    assert extract_code(LONG_LINES[name]) is None
    assert time.process_time() - start < 0.5
