"""Evaluation as people use it: all rows, their number and error, nothing cut without a word."""

import json
import math
import random
import statistics
from itertools import product
from types import SimpleNamespace

import miniruns
import pytest
import torch
from miniruns import options

from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.evaluation import evaluate
from dsv3_ref.evaluation.evaluate import (
    EvalConfig,
    check_task_name,
    draw_examples,
    evaluate_checkpoint,
    explain,
    lm_eval_log,
)
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import held_out_problems

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'dsv3-ref[eval]'")

from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM, AnswerReader  # noqa: E402  after the skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        longer = ["--model.max-seq-len", 128, "--model.original-seq-len", 128]
        assert main.main(options(folder, folder / "base", *longer)) == 0
        yield folder
        patch.undo()


@pytest.fixture(scope="module")
def policy(home):
    return Policy.from_pretrained(home / "base")


def own_rows(folder, n: int, question="say {}") -> str:
    path = folder / "own.jsonl"
    rows = [{"question": question.format(i), "answer": f"{i}\n#### {i}"} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def requests(*args):
    return [SimpleNamespace(args=a, task_name="gsm8k") for a in args]


# ── Files of one's own ──


def test_all_rows_are_scored_with_their_number_and_error(home, tmp_path, monkeypatch, capsys):
    """A file with 7 rows: a quarter was held out for `dsv3 rl`, so one row was scored."""
    right = {"say 1", "say 4"}
    name = own_rows(tmp_path, 7)
    monkeypatch.setattr(
        evaluate, "score_completion", lambda _, problem, __: float(problem.question in right)
    )
    argv = ["eval", home / "base", "--tasks", name, "--samples", 2, "--out", tmp_path / "x.json"]
    assert main.main([str(x) for x in argv]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    found = report["results"][name]
    values = [float(problem.question in right) for problem in held_out_problems(name)]
    assert found["n"] == 7 and found["greedy"] == pytest.approx(2 / 7)
    assert found["greedy_stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert f"{name}: n 7, greedy 0.2857 ± 0.18" in capsys.readouterr().out
    assert report["command"].startswith("dsv3 eval") and report["version"]
    assert report["settings"]["seed"] == 0 and found["truncated"] == 0


@pytest.mark.parametrize("other", [(), pytest.param(("lm-sums",), marks=pytest.mark.full)])
def test_every_question_is_logged_once_with_its_answers(home, tmp_path, other):
    """EleutherAI/lm-evaluation-harness #1687: with two filters, each was written twice."""
    name, log = own_rows(tmp_path, 2), tmp_path / "new/log.jsonl"
    tasks = (name, *other)
    args = EvalConfig(
        home / "base", tasks, samples=2, limit=2, device="cpu", max_new_tokens=2, log_samples=log
    )
    results = evaluate_checkpoint(args)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["task"] for row in rows] == sorted([*tasks, *tasks], key=tasks.index)
    assert [row["number"] for row in rows] == [0, 1] * len(tasks)
    assert [row["question"] for row in rows[:2]] == ["say 0", "say 1"]
    assert all(len(row["answers"]) == len(row["scores"]) == 2 for row in rows[:2])
    assert statistics.mean(row["greedy_score"] for row in rows[:2]) == results[name]["greedy"]
    assert all(row["answers"] and row["question"] for row in rows)


def test_filters_of_a_task_share_a_row_of_the_log():
    """gsm8k has two: lm-eval lists every document once for each."""
    shared = {"arguments": [("ask", {})], "target": "18", "resps": [["#### 18"]], "metrics": ["m"]}
    documents = []
    for name, score in (("strict", 0), ("flexible", 1)):
        documents += [{"doc_id": i, "filter": name, "m": score} | shared for i in range(2)]
    rows = lm_eval_log("gsm8k", documents)
    assert [row["number"] for row in rows] == [0, 1]
    assert rows[0]["scores"] == {"strict": {"m": 0}, "flexible": {"m": 1}}


def test_one_row_and_a_limit(home, tmp_path):
    """One row has no standard error; --limit counts rows."""
    args = EvalConfig(home / "base", (own_rows(tmp_path, 1),), samples=1, device="cpu")
    (found,) = evaluate_checkpoint(args).values()
    assert found["n"] == 1 and "greedy_stderr" not in found
    (tmp_path / "other").mkdir()
    args = EvalConfig(
        home / "base", (own_rows(tmp_path / "other", 9),), samples=1, limit=5, device="cpu"
    )
    assert next(iter(evaluate_checkpoint(args).values()))["n"] == 5


def test_examples_come_before_the_question_and_are_not_the_question(home, policy, tmp_path):
    """--num-fewshot: solved examples, of problems that are not scored or of other rows."""
    name = own_rows(tmp_path, 6)
    problem = held_out_problems(name)[2]
    turns = draw_examples(name, problem, 5, "0 2")
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    assert sorted(asked) == [f"say {i}" for i in (0, 1, 3, 4, 5)]
    assert turns == draw_examples(name, problem, 5, "0 2")
    example = turns[1]["content"]
    assert example == f"The answer is \\boxed{{{asked[0].removeprefix('say ')}}}."
    held = {p.question for p in held_out_problems("sums")}
    sums = draw_examples("sums", held_out_problems("sums")[0], 8, "0 0")
    assert not held & {turn["content"] for turn in sums}
    args = EvalConfig(home / "base", (name,), num_fewshot=1, max_new_tokens=4)
    (first, *_), num_truncated = evaluate.render_prompts(policy, name, [problem], args)
    one = draw_examples(name, problem, 1, "0 0")
    assert num_truncated == 0
    assert first == policy.chat.render_prompt([*one, {"role": "user", "content": "say 2"}])
    with pytest.raises(UserError, match="--num-fewshot 6: .* has 5 other problems"):
        draw_examples(name, problem, 6, "0 2")


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_size_does_not_change_greedy_answers(home, tmp_path, batch):
    """--batch-size is a matter of memory."""
    name = own_rows(tmp_path, 8, question="{} say")
    want = evaluate_checkpoint(EvalConfig(home / "base", (name,), samples=1, device="cpu"))
    args = EvalConfig(home / "base", (name,), samples=1, batch_size=batch, device="cpu")
    found = evaluate_checkpoint(args)[name]
    assert found["n"] == 8 and found["greedy"] == want[name]["greedy"]


# ── What does not fit ──


def test_long_prompts_are_an_error_with_numbers_or_counted(home, tmp_path):
    """EleutherAI/lm-evaluation-harness #3115: the question itself was cut off from the left."""
    name = own_rows(tmp_path, 4, question="say {} " + "once more and again, " * 40)
    args = EvalConfig(home / "base", (name,), samples=1, device="cpu")
    with pytest.raises(UserError, match=r"4 of 4 prompts have up to \d+ tokens, which with 48"):
        evaluate_checkpoint(args)
    cut = EvalConfig(home / "base", (name,), samples=1, truncate=True, device="cpu")
    assert evaluate_checkpoint(cut)[name]["truncated"] == 4
    none = EvalConfig(home / "base", (name,), truncate=True, max_new_tokens=128, device="cpu")
    with pytest.raises(UserError, match="with 128 new ones are more than the 128"):
        evaluate_checkpoint(none)


def test_a_tasks_own_limit_on_new_tokens(policy):
    """lm-evaluation-harness #4001, knoveleng/open-rs #13: max_gen_toks leaves no prompt."""
    gsm8k = {"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 256}
    with pytest.raises(UserError, match="gsm8k: 2 of 2 prompts .* with 256 new ones"):
        DSV3LM(policy).generate_until(requests(("a b", gsm8k), ("c", gsm8k)), disable_tqdm=True)
    with pytest.raises(UserError, match="lower --max-new-tokens or --num-fewshot$"):
        DSV3LM(policy, truncate=True).generate_until(requests(("a", gsm8k)), disable_tqdm=True)
    lm = DSV3LM(policy, max_new_tokens=8)
    assert len(lm.generate_until(requests(("a b", gsm8k)), disable_tqdm=True)) == 1
    assert lm.num_truncated == 0


def test_long_contexts_of_scores_are_an_error_or_counted(policy):
    """lm-evaluation-harness #2585 and #2962: only a warning among many lines."""
    long = "the sea was calm and old; " * 30 + "gulls"
    with pytest.raises(UserError, match="1 of 2 texts have up to"):
        DSV3LM(policy).loglikelihood(requests((long, " a"), ("b", " c")), disable_tqdm=True)
    lm = DSV3LM(policy, truncate=True)
    ((logp, _), _) = lm.loglikelihood(requests((long, " a"), ("b", " c")), disable_tqdm=True)
    ids = lm.tok_encode(long + " a")[-129:]
    logp_w = policy.model(torch.tensor([ids[:-1]]))[0, -1].log_softmax(-1)
    assert lm.num_truncated == 1 and logp == pytest.approx(logp_w[ids[-1]].item(), abs=1e-4)
    with pytest.raises(UserError, match="texts have up to"):
        lm.loglikelihood(requests(("a", long)), disable_tqdm=True)


# ── lm-eval's requests ──


def test_a_batch_gives_the_answers_of_single_requests(policy):
    """Requests with different stops, limits and lengths, in any order and repeated."""
    how = {"max_gen_toks": 12, "until": [], "do_sample": False}
    free = DSV3LM(policy).generate_until(requests(("the sea", how)), disable_tqdm=True)[0]
    asked = []
    for text, n in product(("the sea", "a", "ships, gulls, rain! nobody"), (3, 12)):
        for stops in ([], [free[2:4], "zzz"], [""], free[1:3]):
            asked.append((text, how | {"until": stops, "max_gen_toks": n}))
    asked += asked[:5]
    random.Random(0).shuffle(asked)
    want = [DSV3LM(policy).generate_until(requests(x), disable_tqdm=True)[0] for x in asked]
    found = DSV3LM(policy, batch_size=7).generate_until(requests(*asked), disable_tqdm=True)
    assert found == want
    for (_, how), answer in zip(asked, found):
        stops = [how["until"]] if isinstance(how["until"], str) else how["until"]
        assert not any(stop and stop in answer for stop in stops)
    assert free == want[asked.index(("the sea", how | {"until": [], "max_gen_toks": 12}))]


@pytest.mark.parametrize("text, answer", [
    ("so\n\nit is</think>\n\n2 and 3\n\n4", "2 and 3"), ("so\n\nit is 2", ""),
    ("so</think>", ""), ("</think>2\n", "2\n"),
])  # fmt: skip
def test_a_stop_text_of_a_task_ends_no_thoughts(policy, text, answer):
    """lm-evaluation-harness pull request #3700: “\\n\\n” ended the answers of R1 while it thought,
    YongchengYAO/MedVision #19 too. The thoughts are no part of the answer."""
    for opening, said in (("<think>\n", text), ("", f"<think>{text}")):
        reader = AnswerReader(policy.tokenizer, ("\n\n",), opening)
        found = "".join(reader.push([token]) for token in policy.chat.encode(said))
        assert found + reader.flush() == answer
        assert reader.ended is ("4" in text)
    reader = AnswerReader(policy.tokenizer, ("\n\n",), None)  # a text, not a conversation
    reader.push(policy.chat.encode(text))
    assert reader.ended is ("\n\n" in text)


def test_empty_texts(policy):
    """An empty context is the begin token; an empty continuation is certain."""
    lm = DSV3LM(policy)
    pairs = [("", " a"), ("a", "")]
    (first, (logp, likeliest)) = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert first[0] < 0 and logp == 0.0 and likeliest
    assert lm.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]
    how = {"max_gen_toks": 4, "until": []}
    assert len(lm.generate_until(requests(("", how)), disable_tqdm=True)) == 1


def test_lm_evals_standard_errors_and_numbers_are_kept(home):
    """They were dropped; a score without its error cannot be compared."""
    args = EvalConfig(home / "base", ("lm-sums",), limit=6, apply_chat_template=True, device="cpu")
    found = evaluate_checkpoint(args)["lm-sums"]
    assert found["n"] == 6 and found["right_stderr"] >= 0


# ── Names ──


def test_wrong_names_come_with_suggestions(home):
    """hellaswagg: lm-eval raises a KeyError behind a page of traceback."""
    for name, similar in ("hellaswagg", "hellaswag"), ("sum", "sums"):
        with pytest.raises(UserError, match=rf"no task '{name}' \(did you mean .*{similar}"):
            check_task_name(name, ["arc_easy", "hellaswag"])
    with pytest.raises(UserError, match="names a task twice"):
        evaluate_checkpoint(EvalConfig(home / "base", ("sums", "sums"), device="cpu"))


def test_no_network_is_told_with_the_remedy():
    """A cluster node without network: the message was a stack of retries."""
    try:
        try:
            raise ConnectionError("[Errno -2] Name or service not known")
        except ConnectionError as e:
            raise RuntimeError("Couldn't reach 'gsm8k' on the Hub") from e
    except RuntimeError as e:
        assert "run it once with a network" in explain(e)
    assert explain(ValueError("no such split")) == "no such split"
