"""`dsv3 rl` and `eval` on other people's directories and rows: form, prompts and tags."""

import json

import miniruns
import pytest
from test_family_end_to_end import write_model

from dsv3_ref.cli.main import main
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.posttraining import policy
from dsv3_ref.posttraining.grpo import Rollout, RewardFn
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import TASKS, FileTask, Problem, build_messages, parse_problem
from dsv3_ref.rewards import extract_boxed, has_think_format

QUESTIONS = [f"a fine day {i}?" for i in range(8)]
SYSTEM = {"role": "system", "content": "think"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory of R1's form."""
    folder = tmp_path_factory.mktemp("r1")
    write_model(folder, "R1")
    return folder


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The prompts of all completions, as text."""
    miniruns.own_caches(tmp_path, monkeypatch)
    monkeypatch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
    prompts: list[list[int]] = []
    real = policy.generate_rollouts

    def generate_rollouts(model, batch, *args, **kwargs):
        prompts.extend(batch)
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(policy, "generate_rollouts", generate_rollouts)
    return prompts


def talk(question: str) -> list[dict]:
    """A conversation that ends with a question."""
    return [*build_messages("hello", "a fine day"), {"role": "user", "content": question}]


# TRL's prompt-only rows (huggingface/trl #3644 is about what became of such prompts)
ROWS = {
    "a text": lambda q: {"prompt": q},
    "a conversation": lambda q: {"prompt": [{"role": "user", "content": q}]},
    "with a system text": lambda q: {"prompt": [SYSTEM, {"role": "user", "content": q}]},
    # huggingface/trl #1777 is about such rows
    "several turns": lambda q: {"prompt": [SYSTEM, *talk(q)]},
}


def write_rows(path, make, **more) -> str:
    path.write_text("\n".join(json.dumps(make(q) | more) for q in QUESTIONS))
    return str(path)


RL = "--steps 1 --seq-len 32 --global-batch-size 1 --start-batch-size 1 --warmup-steps 1".split()
RL += "--num-generations 2 --max-new-tokens 4".split()


@pytest.mark.parametrize("kind", ROWS)
def test_prompts_have_the_form_of_the_directory(kind, home, asked, tmp_path, capsys):
    chat = ChatTemplate.from_dir(home)
    talks = [ROWS[kind](q)["prompt"] for q in QUESTIONS]
    turns = [x if isinstance(x, list) else [{"role": "user", "content": x}] for x in talks]
    right = [chat.render_prompt(x) for x in turns]
    data = write_rows(tmp_path / "rows.jsonl", ROWS[kind], answer="7")
    run = tmp_path / "run"
    assert main(["rl", "--init", str(home), "--tasks", data, "--out", str(run), *RL]) == 0
    assert len(asked) > 4 and all(prompt in right for prompt in asked)
    samples = json.loads((run / "before.json").read_text())["samples"]
    assert samples and all(x["text"].startswith("<think>\n") for x in samples)
    asked.clear()
    assert main(["eval", str(run), "--tasks", data, "--samples", "2", "--max-new-tokens", "3"]) == 0
    assert asked == right * 2
    assert "n 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": talk("b")}, id="turns"),
        pytest.param({"messages": [*talk("b"), *build_messages("", "7")]}, id="an answer"),
        pytest.param({"prompt": json.dumps(talk("b"))}, id="JSON of a CSV file"),
        pytest.param(
            {"prompt": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "a fine day"},
                        {"from": "human", "value": "b"}]}, id="ShareGPT",
        ),
    ],
)  # fmt: skip
def test_a_conversation_up_to_its_last_user_turn_is_the_prompt(row):
    """modelscope/ms-swift #5087: rows of conversations, whose last turn is the question."""
    problem = parse_problem("x", row | {"answer": "7"})
    assert problem.messages() == talk("b") and problem.question == "b"
    assert problem.messages("think") == [SYSTEM, *talk("b")]
    assert problem.transcript == "user: hello\nassistant: a fine day\nuser: b"


def test_a_question_is_told_apart_by_the_turns_before_it(tmp_path):
    """Questions such as “Are you sure?” are many problems; one with two system prompts is one."""
    rows = [{"prompt": [*build_messages(f"{i}?", "a"), *build_messages("so?")]} for i in range(9)]
    rows.append({"prompt": [SYSTEM, *rows[0]["prompt"]]})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(x | {"answer": "1"}) for x in rows))
    warnings: list[str] = []
    train, held_out = FileTask(str(tmp_path / "a.jsonl"), warnings.append).problems
    assert len(train) + len(held_out) == 9
    assert any("1 rows repeat a question" in warning for warning in warnings)


def test_examples_come_before_the_whole_conversation(home, asked, tmp_path):
    rows = [{"prompt": [SYSTEM, *talk(q)], "answer": "7"} for q in QUESTIONS[:2]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["eval", str(home), "--tasks", str(tmp_path / "a.jsonl"), "--samples", "1"]
    assert main([*argv, "--num-fewshot", "1", "--max-new-tokens", "2"]) == 0
    turns = [SYSTEM, *talk(QUESTIONS[1]), *build_messages("", r"The answer is \boxed{7}.")]
    right = ChatTemplate.from_dir(home).render_prompt([*turns, *talk(QUESTIONS[0])])
    assert asked[0] == right


def test_rows_without_answers_are_judged(home, asked, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS["a conversation"])
    argv = ["rl", "--init", str(home), "--tasks", data, "--out", str(tmp_path / "run"), *RL]
    assert main(argv) == 2
    assert "have no right answers: --reward must name" in capsys.readouterr().err
    assert main([*argv, "--votes", "2"]) == 0
    assert main(["eval", str(home), "--tasks", data]) == 2
    assert "has no right answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "assistant", "content": "b"}], [], "", None, 5, [{"role": "user"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], ["a"],
        "[{'role': 'user', 'content': 'a'}]",  # modelscope/ms-swift #5087: lists in a CSV file
    ],
    ids=str,
)  # fmt: skip
def test_prompts_that_are_no_question_are_left_out(prompt):
    with pytest.raises(UserError, match="write|needs a question"):
        parse_problem("x", {"prompt": prompt, "answer": "1"})


@pytest.mark.parametrize(
    "more, is_whole",
    [
        # MedARC-AI/medmarks pull request #63 is about such rows: MMLU's, ARC's and SQuAD's forms
        ({"choices": ["Paris", "Rome"]}, False), ({"context": "It is Paris."}, False),
        ({"choices": {"text": ["Paris", "Rome"], "label": ["A", "B"]}}, False),
        ({"options": {"A": "3", "B": "7"}}, False),
        ({"image": {"bytes": None, "path": "a"}}, False),
        ({"choices": ["capital", "Which"]}, True), ({"choices": [], "context": None}, True),
        ({"subject": "geography"}, True),
    ],
    ids=str,
)  # fmt: skip
def test_a_question_without_its_choices_is_left_out(more, is_whole):
    row = {"question": "Which is the capital?", "answer": "Paris"} | more
    if is_whole:
        assert parse_problem("x", row).question == row["question"]
    else:
        with pytest.raises(UserError, match="which the question lacks|cannot see"):
            parse_problem("x", row)


def test_a_prompt_that_is_too_long_is_refused_at_the_start(home, asked, tmp_path, capsys):
    """huggingface/trl #3569 and #4358: such a prompt failed in the middle of a run, or was cut."""
    rows = [ROWS["a text"](q) | {"answer": "1"} for q in [*QUESTIONS, "a fine day " * 60_000]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["rl", "--init", str(home), "--tasks", str(tmp_path / "rows.jsonl"), *RL]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "of the model's context: lower --max-new-tokens or" in capsys.readouterr().err
    assert not asked and not (tmp_path / "run").exists()


# ── Thoughts that the prompt opens ──


def completions_of(home, *texts: str):
    """Return the completions of a policy that says these texts."""
    chat = ChatTemplate.from_dir(home)
    model = Policy.from_pretrained(home).model
    eos = chat.special_tokens.eos
    tokens = [[*chat.encode(text), eos] for text in texts]
    said = Policy(model, chat, lambda *_: (tokens, [[0.0] * len(t) for t in tokens]))
    return said.generate([[{"role": "user", "content": "1+1?"}]], len(texts), 99, 1.0)


def test_a_thought_that_the_prompt_opens_is_part_of_the_text(home, tmp_path, monkeypatch):
    """huggingface/open-r1 #560, huggingface/trl #6966: the reward for the form was always 0."""
    texts = [r"1+1</think>\boxed{2}", r"so \boxed{2}", r"<think>1</think>\boxed{2}"]
    found = completions_of(home, *texts)
    assert [x.text.startswith("<think>") for x in found] == [True] * 3
    assert [has_think_format(x.text) for x in found] == [True, False, True]
    assert [extract_boxed(x.text) for x in found] == ["2", None, "2"]  # the second still thinks
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(json.dumps({"question": q, "answer": "2"}) for q in QUESTIONS))
    monkeypatch.setitem(TASKS, "own", FileTask(str(data), str))
    reward_fn = object.__new__(RewardFn)
    reward_fn.require_think_format = True
    problem = Problem("own", "1+1?", "2")
    rollouts = [Rollout(problem, x.prompt, x.tokens, x.logps, x.text, 0.0) for x in found]
    assert [reward_fn.rule_reward(x) for x in rollouts] == [1.0, 0.0, 1.0]
