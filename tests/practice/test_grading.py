"""Rewards of other people's data and of models' habits: right answers earn 1, others 0."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sandbox import boxed

from dsv3_ref.config import UserError
from dsv3_ref.posttraining import grpo, prompts
from dsv3_ref.posttraining.grpo import RewardFn, Rollout, check_reward
from dsv3_ref.posttraining.prompts import TASKS, FileTask, Problem, parse_weights
from dsv3_ref.rewards import extract_boxed, extract_code, has_think_format
from dsv3_ref.verifiers.answers import answers_equal
from dsv3_ref.verifiers.code_grader import FunctionCase, StdinCase
from dsv3_ref.verifiers.math_verifier import MathVerifier, shared_verifier

# ── Pairs of answers: given, right, whether they are equal ──

EQUATIONS = [  # wrong verdicts that huggingface/Math-Verify #2, #14, #26, #40 and #60 report
    (r"1 + \frac{1}{\mathrm{e}}", r"1 - \frac{1}{\mathrm{e}}", False),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}", False),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}", False),
    (r"\frac{1}{3\cdot 2^{2006}}", r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", False),
    ("n=1, 2, 3", "n=2, 3, 4", False), ("D = (0, 1.5)", "D = (0, 1)", False),
    ("21, 36, and 82", r"19, 46, \text{ and } 82", False), ("12:00", "1:00", False),
    (r"1, 3, 5, \ldots, 2n-1", r"1, 2, \ldots, n", False),
    (r"1:4:9:\ldots", r"1:2:3:\ldots", False), ("2021", r"\pm 2021", False),
    (r"\pm 2021", "2021", False),
    ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}", True),
    ("-34x-45y+20z-100=0", "34x+45y-20z+100=0", True),
    ("3*x-1*y+13=0", "3x + 4y + 14=0", False), ("x=5", "5", True), ("5", "x = 5", True),
    ("x=6", "5", False), ("x = 5", "y = 5", False), ("y=2x+1", "y=2x+2", False),
    (r"x^2/4 + y^2/3 = 1", r"x^2/16+y^2/12=1", False), ("f(x)=x^2", "x^2", True),
    (r"6 \times 3 = 18", "18", True), ("17 = 18", "18", False), ("x+y=3", "3", False),
]  # fmt: skip
PARTS = [  # #47: a part of the answers is not all of them; #41: what follows is not dropped
    ("1728", "1331 and 1728", False), ("1331 and 1728", "1728", False),
    ("1331, 1728", "1331 and 1728", True), ("18 or 19", "18", False), ("18, 19", "18", False),
    (r"18\text{ or }19", "18", False), ("18 19", "18", False), ("1 8", "18", False),
    ("not 18", "18", False), ("18/19", "18", False), ("8", "18", False), ("-18", "18", False),
    ("4", r"4\sqrt(2)", False), (r"4\sqrt(2)", r"4\sqrt{2}", True), ("1,2", "1,2,3", False),
]  # fmt: skip
NUMBERS = [  # EleutherAI/lm-evaluation-harness #3254 ($29.00), evalscope #906 (\text), and habits
    ("$29.00", "29", True), (r"\$18", "18", True), ("18.", "18", True), ("+5", "5", True),
    (".5", "0.5", True), ("1,000", "1000", True), ("1{,}000", "1000", True),
    (r"1\,000", "1000", True), ("1,234.56", "1234.56", True), ("1000", "1,0", False),
    ("10,000", "(10, 0)", False), ("12,500", "12500", True), ("1e-7", "0.0000001", True),
    ("1.2E5", "120000", True), (r"1.2 \times 10^5", "120000", True), ("2e3", "3e2", False),
    ("0.0000002", "0.0000001", False), ("3 million", "3000000", True), ("3 million", "3", False),
    (r"\frac12", "0.5", True), (r"\dfrac{1}{2}", "1/2", True), (r"1\frac{1}{2}", "3/2", True),
    ("1 1/2", "3/2", True), ("11/2", "1 1/2", False), (r"0.\overline{3}", r"\frac13", True),
    ("0.333", r"0.\overline{3}", False), (r"\frac{-1}{2}", r"-\frac12", True),
    ("123456789012345678901234567891", "123456789012345678901234567890", False),
    (r"2^{100}", "1267650600228229401496703205376", True), (r"\text{13}", "13", True),
    ("**73**", "73", True), (r"\mathbf{73}", "73", True), (r"\(73\)", "73", True),
    ("1010_2", "1010_{2}", True), ("1010_2", "10", False), ("3.14", r"\pi", False),
]  # fmt: skip
MATRIX = r"\begin{pmatrix}-1&0\\0&x\end{pmatrix}"
MATRICES = [  # rasbt/reasoning-from-scratch #133: `\\ ` was read as a space, `,\! ` as a list
    (r"\begin{pmatrix} -1 & 0 \\ 0 & x \end{pmatrix}", MATRIX, True),
    (r"\begin{bmatrix} -1 & 0 \\[2pt] 0 & x \\ \end{bmatrix}", MATRIX, True),
    (r"\begin{pmatrix} -1 & 0 \\ \, 0 & x\end{pmatrix}", MATRIX, True),
    (r"\begin{pmatrix} -1 & 0 \\ 1 & x \end{pmatrix}", MATRIX, False),
    (r"\begin{pmatrix} -1 & 0 & 0 & x \end{pmatrix}", MATRIX, False),
    (r"11,\! 111,\! 111,\! 100", "11111111100", True), (r"1,\!000", "1000", True),
    (r"1,\! 2,\! 3", "1, 2, 3", True), (r"1,\! 000", "1", False), ("528", "52_8", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", True),  # Math-Verify #56
    (r"(3, \frac{2\pi}{3})", r"\left( 3, \frac{\pi}{2} \right)", False),
]  # fmt: skip
UNICODE = [  # digits and signs of other keyboards
    ("−5", "-5", True), ("–5", "-5", True), ("５", "5", True), ("٣", "3", True), ("½", "0.5", True),
    ("1½", "3/2", True), ("x²", "x^2", True), ("√8", r"2\sqrt{2}", True), ("π/2", r"\pi/2", True),
    ("1.2 × 10^5", "120000", True), ("±2", r"\pm 2", True), ("∞", r"\infty", True),
    ("90°", r"90^\circ", True), ("х", "x", False),
]  # fmt: skip
UNITS = [  # Math-Verify #67: 28% and 28; #61: pct
    ("28 pct", r"28\%", True), (r"28\text{ percent}", r"28\%", True), ("28 pct", "82%", False),
    ("18%", "18", True), ("50\\%", r"\frac12", True), ("28 percent", r"28\%", True),
    ("18 dollars", "18", True), ("18 apples", "81", False), ("5", "5 cm", True),
    (r"5\text{ cm}", "5 cm", True), ("5 km", "5 cm", False), (r"5 \mathrm{~cm}^2", "5", True),
    ("90 degrees", r"90^\circ", True), (r"\sin 30^\circ", r"\frac12", True), ("5x", "5", False),
]  # fmt: skip
STRUCTURES = [  # scitix/sieval #26: sets in another order, degrees, functional form
    ("(1,2)", "(2,1)", False), ("1,2", "2,1", True), (r"\{2,1\}", "1, 2", True),
    (r"\{1,2\}", "(1,2)", False), ("[1,2]", "(1,2)", False), ("[0,1)", "(0,1]", False),
    (r"\left[0,1\right)", "[0, 1)", True), ("x<3", r"(-\infty, 3)", True),
    ("0<x<1", "(0,1)", True), (r"m \geq \sqrt{2}", r"m\in[\sqrt{2},+\infty)", True),
    (r"x \ge 2", "x > 2", False), (r"[3,4]\cup[1,2]", r"[1,2]\cup[3,4]", True),
    ("2, -2", r"\pm 2", True), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2", True),
    ("x=1 or x=2", "1, 2", True), ("2, 1", "x=1, y=2", False), ("3:4", "4:3", False),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    (r"\varnothing", r"\emptyset", True), ("0", r"\emptyset", False), ("(18)", "18", True),
]  # fmt: skip
WORDS = [  # Math-Verify #16 and open-r1 #56 (choices), NVIDIA-NeMo/Gym #1844 (labels with text)
    ("A", r"\text{A}", True), ("(A)", "A", True), ("A.", "A", True), ("a", "A", True),
    ("A: a polygenic score", "A", True), (r"\textbf{(A)}", "A", True), ("B", "A", False),
    ("A, B", "A", False), ("A: or B", "A", False), ("yes", "Yes", True), ("No", "yes", False),
    (r"\text{even}", "Even", True), ("yes and no", "yes", False), ("tac", "cat", False),
    ("true", "1", False), ("yx", "xy", True), (r"\frac{xy}{2}", r"\frac12 x y", True),
]  # fmt: skip
EXPRESSIONS = [  # EleutherAI/lm-evaluation-harness #2212, openai/prm800k #19
    ("(x+1)^2", "x^2+2x+1", True), ("x^2-1", "x^2+1", False), ("sqrt(8)", r"2\sqrt{2}", True),
    ("x**2", "x^2", True), (r"\frac{0.5a}{b}/0.5", r"2\frac{a}{2b}", True),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", True), (r"\log_2 8", "3", True),
    (r"\binom{5}{2}", "10", True), ("5!", "120", True), (r"\sec^2(y)", r"\tan^2(y)+1", True),
    ("4i+3", "3+4i", True), (r"e^{i\pi}", "-1", True), ("X", "x", False), ("", "18", False),
]  # fmt: skip
PAIRS = EQUATIONS + PARTS + NUMBERS + MATRICES + UNICODE + UNITS + STRUCTURES + WORDS + EXPRESSIONS


@pytest.mark.parametrize("answer, truth, equal", PAIRS, ids=[f"{a} | {b}" for a, b, _ in PAIRS])
def test_pairs(answer, truth, equal):
    assert answers_equal(answer, truth) is equal


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="\\frac{}()[]12,.%$=<xπ½²± \\pm|", max_size=30), st.sampled_from(PAIRS))
def test_no_text_raises_or_is_right_by_chance(text, pair):
    """An answer that contains none of the digits of the right one cannot equal it."""
    assert not answers_equal(text, "987654321")
    answers_equal(text, pair[1])


def test_endless_and_deep_answers_are_wrong_soon(monkeypatch):
    """Math-Verify #63 and #65: towers of powers hang in spite of a timeout."""
    monkeypatch.setattr(shared_verifier(), "seconds", 0.5)
    for text in (r"\dfrac{5^{5^{5^{5^5}}} - 5}{16}", "(" * 400 + "7", "1e999999999", "7" * 10**6):
        assert not answers_equal(text, "7")
    assert isinstance(shared_verifier(), MathVerifier) and answers_equal(r"\sqrt{49}", "7")


# ── Boxes and programs ──


@pytest.mark.parametrize(
    "text, content",
    [
        pytest.param(r"\boxed {5}", "5", id="space before the brace"),
        pytest.param(r"\fbox{5}", "5", id="fbox"),
        pytest.param(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", id="nested braces"),
        pytest.param(r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right.", id="escaped brace"),
        pytest.param(r"<think>\boxed{1}? no</think>\boxed{2}", "2", id="a box in the thought"),
        pytest.param(r"so \boxed{1}</think>\boxed{2}", "2", id="a thought that the prompt opens"),
        pytest.param(r"<think>\boxed{1}", None, id="a thought without end"),
        pytest.param(r"\boxed{1}, no, \boxed{2}", None, id="two boxes"),
        pytest.param("\\boxed{1\n", None, id="a box without end"),
    ],
)
def test_boxes(text, content):
    """Rewards see what follows the thought, as in huggingface/open-r1 #359 and #418."""
    assert extract_boxed(text) == content


def test_the_prompt_may_open_the_thought():
    """huggingface/trl #7141: R1's template writes <think>, so completions only close it."""
    assert has_think_format(r"1+1</think>\boxed{2}") and not has_think_format(r"\boxed{2}")
    assert not has_think_format(r"a</think>b</think>\boxed{2}")


CODE = "print(1)\n"


# ── Programs that read their input ──

READERS = {
    "input": "n = int(input())\nprint(sum(int(input() == 'yes') for _ in range(n)))",
    "lines": "import sys\nrows = [x[:-1] for x in sys.stdin]\nprint(rows[1:].count('yes'))",
    "readline": (
        "import sys\nn = int(sys.stdin.readline())\n"
        "print(sum(sys.stdin.readline()[:-1] == 'yes' for _ in range(n)))"
    ),
    "split": "import sys\nprint(sys.stdin.read().split()[1:].count('yes'))",
    "bytes": "import sys\nprint(sys.stdin.buffer.read().split(b'\\n')[1:].count(b'yes'))",
    "to the end": (
        "input()\nn = 0\nwhile True:\n    try:\n        n += input() == 'yes'\n"
        "    except EOFError:\n        break\nprint(n)"
    ),
    "open(0)": "print(open(0).read().splitlines()[1:].count('yes'))",
}


INPUTS = {
    "LF": "3\nyes\nno\nyes\n",
    "CRLF": "3\r\nyes\r\nno\r\nyes\r\n",
    "no last line end": "3\nyes\nno\nyes",
}


@boxed
@pytest.mark.parametrize("stdin", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("reader", READERS)
def test_how_programs_read_their_input(reader, stdin):
    """ReCodEx/web-app #519: input() keeps the \\r of CRLF; engineer-man/emkc #176: no last \\n."""
    assert StdinCase(stdin, "2\r\n").passed(READERS[reader])


@boxed
def test_an_empty_input_is_at_its_end():
    """A program that asks for more than there is fails, and one that asks for nothing passes."""
    assert StdinCase("", "done").passed("print('done')")
    assert StdinCase("", "end").passed("try:\n    input()\nexcept EOFError:\n    print('end')")
    assert not StdinCase("", "").passed("input()")
    assert StdinCase("\n", "0").passed("print(len(input()))")


METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b\n"


@boxed
@pytest.mark.parametrize(
    "program, result",
    [
        (METHOD, 3), (METHOD + "def add(a, b):\n    return 5\n", 5),
        ("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(1, 2))\n", 3),
        ("class Solution:\n    pass\n", None), ("Solution = None\n", None),
    ],
)  # fmt: skip
def test_a_function_may_be_a_method_of_the_class_solution(program, result):
    """allenai/olmo-eval pull request #354: LiveCodeBench names the method, LeetCode's form has the
    class. Only the name `Solution().add` was found."""
    assert FunctionCase("add", (1, 2), result).passed(program) is (result is not None)
    assert FunctionCase("Solution().add", (1, 2), 3).passed(program) is (METHOD in program)


LEETCODE = """
class Solution:
    def search(self, xs: List[int], x: int) -> Optional[int]:
        i = bisect_left(xs, x)
        heapq.heappush(heap := [inf], len(xs))
        return i if i < len(xs) == heap[0] and xs[i] == x else None
"""
SUBMISSIONS = {
    "leetcode": (LEETCODE, FunctionCase("search", ([1, 3, 7], 3), 1)),  # not `re.search`
    "stdin": (
        "from __future__ import annotations\nprint(Counter(stdin.read()).most_common(1)[0][0])",
        StdinCase("aab", "a"),
    ),
    "own": ("def gcd(a, b):\n    return a\nprint(gcd(4, 6))", StdinCase("", "4")),
    "builtins": ("print(pow(2, 3, 5), hex(7))", StdinCase("", "3 0x7")),  # not `math.pow`
}


@boxed
@pytest.mark.parametrize("name", SUBMISSIONS)
def test_programs_for_judges_that_have_imported_the_usual_modules(name):
    """A program in LeetCode's form scored 0 (NameError: 'List'); the graders of LiveCodeBench and
    open-r1 put imports before it."""
    program, case = SUBMISSIONS[name]
    assert case.passed(program)


@boxed
def test_a_function_of_a_module_is_not_the_one_asked_for():
    """A program that defines no `gcd` does not pass with the one of `math`, nor with a builtin."""
    assert not FunctionCase("gcd", (4, 6), 2).passed("def f():\n    return gcd(4, 6)")
    assert not FunctionCase("max", (4, 6), 6).passed("max")
    assert FunctionCase("gcd", (4, 6), 2).passed("from math import gcd")


@pytest.mark.parametrize(
    "text, code",
    [
        pytest.param("```Python\nprint(1)\n```", CODE, id="capital"),
        pytest.param("```python3\nprint(1)\n```", CODE, id="version"),
        pytest.param("```py\nprint(1)\n```", CODE, id="py"),
        pytest.param("``` python\nprint(1)\n```  ", CODE, id="spaces"),
        pytest.param('```python title="a.py"\nprint(1)\n```', CODE, id="attributes"),
        pytest.param("```{python}\nprint(1)\n```", CODE, id="braces"),
        pytest.param("```\nprint(1)\n```", CODE, id="no language"),
        # simonw/llm #1644, microsoft/autogen #7889
        pytest.param("```python\r\nprint(1)\r\n```\r\n", CODE, id="CRLF"),
        pytest.param("1. so\n   ```python\n   print(1)\n   ```", CODE, id="indented"),
        pytest.param("~~~python\nprint(1)\n~~~", CODE, id="tildes"),
        # agent-ecosystem/afdocs #93
        pytest.param("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n", id="four ticks"),
        pytest.param("```bash\nls\n```\n```python\nprint(1)\n```", CODE, id="beside a command"),
        pytest.param("```python\nprint(1)\n```\n```\n1\n```", CODE, id="beside its output"),
        pytest.param(
            "<think>```python\nx\n```</think>\n```python\nprint(1)\n```", CODE, id="think"
        ),
        pytest.param("```cpp\nint x;\n```", None, id="another language"),
        pytest.param("```python\na\n```\n```python\nb\n```", None, id="two programs"),
        pytest.param("```python\nprint(1)", None, id="no end"),
        pytest.param("print(1)", None, id="no fence"),
    ],
)
def test_programs(text, code):
    assert extract_code(text) == code


# ── Rows of other people's data ──


def task_of(tmp_path, *rows) -> tuple[FileTask, list[str]]:
    path, told = tmp_path / "own.jsonl", []
    path.write_text("\n".join(map(json.dumps, rows)))
    return FileTask(str(path), told.append), told


ROWS = {
    # openai/gsm8k; a right answer earned nothing in verl-project/verl #7274
    "GSM8K": ({"question": "Eggs?", "answer": "16 - 3 - 4 = <<16-3-4=9>>9\n#### 18"}, "18"),
    # hendrycks/math: the solution's box
    "MATH": ({"problem": "1+1?", "level": "1", "solution": r"So $\boxed{\frac{4}{2}}$."}, "2"),
    # open-r1/OpenR1-Math-220k has both; huggingface/open-r1 #503 and #628: the text cannot be read
    "open-r1": ({"problem": "1+1?", "solution": "A long text.", "answer": "2"}, "2"),
    "verl": (
        {"prompt": [{"role": "user", "content": "1+1?"}], "data_source": "x",
         "reward_model": {"style": "rule", "ground_truth": "2"}},
        "2",
    ),
    "TRL": ({"prompt": "1+1?", "solution": r"\boxed{2}"}, "2"),
    "ground truth": ({"question": "1+1?", "ground_truth": "2", "answer": "one and one"}, "2"),
    # fw-ai/cookbook #483: an answer 0 is an answer
    "zero": ({"question": "1-1?", "answer": 0}, "0"),
    "integer": ({"question": "2?", "answer": 12345678901234567890}, "12345678901234567890"),
    "float": ({"question": "2?", "answer": 0.1}, "0.1"),
    "true": ({"question": "Is it?", "answer": True}, "true"),
    "extra fields": ({"question": "1+1?", "answer": "2", "id": 7, "cases": None}, "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_right_answer_to_a_row_earns_1(name, tmp_path):
    row, answer = ROWS[name]
    task, told = task_of(tmp_path, row)
    (problem,) = task.rows
    assert task.score(rf"\boxed{{{answer}}}", problem) == 1.0
    assert task.score(r"\boxed{19}", problem) == 0.0
    columns = {"question", "answer"} >= row.keys() & {*prompts.QUESTION_COLUMNS, "solution"}
    assert columns or any("questions are read from" in line for line in told)


@pytest.mark.parametrize(
    "row, why",
    [
        ({"question": "a", "answer": ""}, '"answer" is not a string or a number, or is empty'),
        ({"question": "a", "answer": ["1"]}, '"answer" is not a string or a number'),
        ({"problem": "a", "solution": "So it is. " * 30}, '"solution" has no final answer'),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
         '"prompt" does not end with a user\'s turn'),
        ({"text": "a"}, '"question" is missing'),
        ({"question": "a", "cases": [{"function": "{x:9999999999d}", "args": [], "expected": 1}]},
         "is not one of Python"),
    ],
)  # fmt: skip
def test_rows_that_are_left_out(row, why, tmp_path):
    _, told = task_of(tmp_path, {"question": "b", "answer": "1"}, row)
    assert any(why in line and "line 2" in line for line in told)


def test_answers_that_nobody_can_box_are_told(tmp_path):
    """An essay as the answer: every completion would earn 0."""
    _, told = task_of(tmp_path, {"question": "a", "answer": "first\nsecond"})
    assert any("1 of 1 answers are texts of several lines" in line for line in told)


def test_repeated_questions_and_tasks(tmp_path):
    """The same problem must not be trained on and held out; a task has one weight."""
    rows = [{"question": str(i % 5), "answer": str(i)} for i in range(10)]
    task, told = task_of(tmp_path, *rows)
    assert len(task.rows) == 10 and sum(map(len, task.problems)) == 5
    assert "5 rows repeat a question" in told[-1]
    with pytest.raises(UserError, match="names sums twice"):
        parse_weights(("sums", "sums=0.5"))
    with pytest.raises(UserError, match=r"did you mean sums"):
        parse_weights(("sum",))


# ── Scores that are no numbers ──


@pytest.mark.parametrize(
    "value, reward",
    [
        (True, 1.0), (np.float32(0.5), 0.5), (np.array(1), 1.0), (torch.tensor(0.25), 0.25),
        (torch.tensor([1.0]), 1.0), (1, 1.0), (None, None), (math.nan, None), (math.inf, None),
        (-1.0, None), (2, None), ("1", None), (torch.ones(2), None), ({}, None),
        (np.array([0.0, 1.0]), None), (RuntimeError("no"), None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_score_is_a_number_or_counts_0(value, reward):
    """huggingface/trl #3079, #4501 and #5775, modelscope/ms-swift #8123: None and NaN."""
    found, failure = check_reward(value)
    assert found == (reward or 0.0) and bool(failure) is (reward is None)


def reward_fn(told: list[str], score) -> RewardFn:
    fn = RewardFn.__new__(RewardFn)
    fn.stop_token_ids, fn.voter = {1}, None
    fn.model, fn.votes = None, 0
    fn.require_think_format, fn.warn = False, told.append
    fn.reported = set()
    TASKS["odd"] = SimpleNamespace(is_open_ended=False, score=score)
    return fn


def test_scores_that_fail_are_told_once_with_their_number(monkeypatch):
    monkeypatch.setattr(prompts, "TASKS", TASKS)
    monkeypatch.setitem(TASKS, "odd", None)
    told: list[str] = []
    values = iter([math.nan, None, 1.0] * 2)
    fn = reward_fn(told, lambda *_: next(values))
    for _ in range(2):
        rollouts = [Rollout(Problem("odd", "a", "b"), [2], [3, 1], [0.0], "x", 0.5) for _ in "abc"]
        fn(rollouts)
        assert sorted(x.reward for x in rollouts) == [0, 0, 1]
        assert sum(x.is_invalid for x in rollouts) == 2
    assert len(told) == 1 and "counts 0 for 2 of 3 answers: not a number from 0 to 1" in told[0]


def test_rewards_without_a_difference_are_told_once(capsys):
    """huggingface/trl #3452, open-r1 #405: reward 0 and loss 0 for a whole run."""
    task, run = grpo.GRPOTask.__new__(grpo.GRPOTask), SimpleNamespace(strategy=SimpleNamespace())
    task.num_constant_steps, run.strategy.is_main = 0, True
    for step in range(3 * grpo.CONSTANT_STEPS):
        task.warn_of_constant_rewards(run, {0.0}, 0.5 if step == 2 else 1.0)
    said = capsys.readouterr().err
    assert said.count("no group had different rewards in the last 10 steps (now all 0)") == 1
