"""`dsv3 eval`: counts beside enumeration, and lm-eval's view of a model beside the model itself."""

import itertools
import json
from types import SimpleNamespace

import miniruns
import pytest
import torch
from miniruns import options
from test_rl import Short

from dsv3_ref.cli import main
from dsv3_ref.config import UserError
from dsv3_ref.evaluation.evaluate import EvalConfig, evaluate_checkpoint, score_majority
from dsv3_ref.posttraining.policy import Completion, Policy
from dsv3_ref.posttraining.prompts import TASKS, build_messages
from dsv3_ref.rewards import majority, pass_at_k

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'dsv3-ref[eval]'")

from dsv3_ref.evaluation.lm_eval_adapter import DSV3LM, ChatContext  # noqa: E402  after the skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        patch.setitem(TASKS, "short", Short("short"))
        longer = ["--model.max-seq-len", 128, "--model.original-seq-len", 128]
        assert main.main(options(folder, folder / "base", *longer)) == 0
        yield folder
        patch.undo()


@pytest.fixture(scope="module")
def lm(home):
    return DSV3LM(Policy.from_pretrained(home / "base"))


def asked(*args):
    return [SimpleNamespace(args=a) for a in args]


# ── Counts ──


@pytest.mark.parametrize("n, right", [(1, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_choices(n, right):
    for k in range(1, n + 1):
        choices = list(itertools.combinations([i < right for i in range(n)], k))
        assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(
    "answers, most",
    [
        (["1", "2", "2"], "2"),
        (["2", "1"], "2"),
        ([None, None, "3"], "3"),
        ([None], None),
        ([], None),
    ],
)
def test_the_commonest_answer(answers, most):
    assert majority(answers) == most


def test_a_majority_of_boxes_counts():
    p = TASKS["sums"].problems[1][0]

    def boxed(answer, is_finished=True) -> Completion:
        return Completion([], [], [], f"\\boxed{{{answer}}}", is_finished)

    assert score_majority("sums", p, [boxed(p.answer), boxed(p.answer), boxed(99)]) == 1.0
    assert score_majority("sums", p, [boxed(p.answer, is_finished=False), boxed(99)]) == 0.0
    assert score_majority("sums", p, [Completion([], [], [], "none", True)]) == 0.0


def test_a_run_in_numbers(home, capsys):
    argv = ["eval", home / "base", "--tasks", "short", "--samples", 3, "--out", home / "eval.json"]
    assert main.main([str(x) for x in argv]) == 0
    found = json.loads((home / "eval.json").read_text())["results"]["short"]
    means = {"greedy", "pass@1", "pass@3", "maj@3"}
    errors = {f"{name}_stderr" for name in means}
    assert found.keys() == means | errors | {"n", "tokens", "unfinished", "truncated"}
    assert "short: n 2, greedy" in capsys.readouterr().out


# ── As lm-eval sees it ──


def test_log_likelihoods_are_the_models(lm):
    pairs = [
        ("the sea", " was calm"),
        ("", "a light"),
        ("ships, gulls", ", rain! nobody"),
        ("a", "b"),
    ]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, new), (logp, likeliest) in zip(pairs, found):
        whole, behind = lm.tok_encode(context + new), len(lm.tok_encode(context))
        logp_sw = lm.policy.model(torch.tensor([whole]))[0].log_softmax(-1)
        rows = range(behind - 1, len(whole) - 1)
        assert logp == pytest.approx(sum(logp_sw[i, whole[i + 1]].item() for i in rows), abs=1e-4)
        assert likeliest == all(logp_sw[i].argmax() == whole[i + 1] for i in rows)


def test_a_likeliest_continuation_is_called_so(lm):
    context = "the sea"
    new = lm.generate_until(asked((context, {"max_gen_toks": 4, "until": []})))[0]
    if lm.tok_encode(context + new) == lm.tok_encode(context) + lm.tok_encode(new, False):
        ((_, likeliest),) = lm.loglikelihood(asked((context, new)), disable_tqdm=True)
        assert likeliest


def test_texts_longer_than_a_window_count_every_token_once(lm):
    text = "the sea was calm and old; ships, gulls, rain! a light far off. " * 24
    ids, limit = lm.tok_encode(text), lm.max_length
    assert len(ids) > 2 * limit
    (found,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    want, done = 0.0, 0
    while done < len(ids) - 1:
        start = done if len(ids) - 1 - done > limit else max(0, len(ids) - 1 - limit)
        logp_sw = lm.policy.model(torch.tensor([ids[start : start + limit]]))[0].log_softmax(-1)
        end = min(start + limit, len(ids) - 1)
        want += sum(logp_sw[i - start, ids[i + 1]].item() for i in range(done, end))
        done = end
    assert found == pytest.approx(want, rel=1e-4)


def test_answers_end_at_stop_texts(lm):
    how = {"max_gen_toks": 20, "until": []}
    (free,) = lm.generate_until(asked(("the sea", how)))
    stop = free[len(free) // 2 :][:2]
    (cut,) = lm.generate_until(asked(("the sea", how | {"until": [stop]})))
    assert cut == free[: free.index(stop)] and stop not in cut
    (one,) = lm.generate_until(asked(("the sea", how | {"until": stop})))
    assert one == cut


def test_a_conversation_is_asked_in_its_form(lm):
    talk = build_messages("the sea?")
    chat = lm.apply_chat_template(talk)
    assert isinstance(chat, ChatContext) and chat == "the sea?"
    (got,) = lm.generate_until(asked((chat, {"max_gen_toks": 8, "until": []})))
    (want,) = lm.policy.generate([talk], 1, 8, 0.0)
    assert got == lm.policy.tokenizer.decode([t for t in want.tokens if t != lm.eot_token_id])


def test_the_same_numbers_as_lm_evals_own_class(lm, home, tmp_path):
    """Its HFLM over a transformers export of the same model."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    from dsv3_ref.checkpoints.huggingface import save_hf
    from dsv3_ref.data.tokenizer import BOS, EOS

    save_hf(lm.policy.model, tmp_path / "hf")
    own = Tokenizer.from_str(lm.policy.tokenizer.to_str())
    bos = (BOS, own.token_to_id(BOS))
    own.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=BOS, eos_token=EOS)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True, device="cpu")
    pairs = [("the sea", " was calm"), ("ships, gulls", ", rain! nobody"), ("a light", " far off")]
    want = theirs.loglikelihood(asked(*pairs), disable_tqdm=True)
    got = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (a, x), (b, y) in zip(got, want):
        assert a == pytest.approx(b, abs=2e-3) and x == y


def test_a_task_of_ours_through_lm_eval_is_the_likeliest_answer(home):
    args = EvalConfig(
        home / "base",
        ("sums", "lm-sums"),
        samples=1,
        limit=6,
        apply_chat_template=True,
        device="cpu",
    )
    found = evaluate_checkpoint(args)
    assert found["lm-sums"]["right"] == found["sums"]["greedy"]


# ── Refusals ──


@pytest.mark.parametrize(
    "more, why",
    [
        ({"tasks": ()}, "--tasks needs at least one name"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"tasks": ("writing",)}, "writing has no right answers"),
    ],
)
def test_refusals(more, why, home):
    with pytest.raises(UserError, match=why):
        evaluate_checkpoint(EvalConfig(home / "base", **{"device": "cpu"} | more))


def test_without_lm_eval_it_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3-ref\[eval\]'"):
        evaluate_checkpoint(EvalConfig(home / "base", ("speeches",), device="cpu"))
