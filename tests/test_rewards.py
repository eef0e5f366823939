"""Rewards: boxes, equal answers, scores of packed samples, pairs, calibration, votes."""

import itertools
import math
import signal
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.data import worker_process
from dsv3_ref.model import Transformer
from dsv3_ref.rewards import (
    bradley_terry,
    calibration,
    extract_boxed,
    has_think_format,
    judge_prompt,
    judgment_mask,
    majority,
    majority_accuracy,
    majority_agreement,
    pass_at_k,
    preference_loss,
    reward_scores,
    vote_prompt,
    vote_reward,
)
from dsv3_ref.rope import to_cu_seqlens
from dsv3_ref.sft import SpecialTokens, sample_cu_seqlens
from dsv3_ref.verifiers import answers, math_verifier

SPECIAL_TOKENS = SpecialTokens(*range(5))

# ── Rules ──


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{7}", "7"),
        (r"so \boxed{ 1/2 }.", "1/2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{1} or \boxed{2}", None),
        (r"\boxed{\boxed{1}}", None),
        (r"\boxed{1", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_a_box(text, content):
    assert extract_boxed(text) == content


@given(st.text(alphabet="\\boxed{} 1", max_size=60))
def test_any_text_has_one_box_or_none(text):
    found = extract_boxed(text)
    if found is not None:
        assert text.count("\\boxed{") == 1 and found in text
        assert found.count("{") == found.count("}")


@pytest.mark.parametrize(
    "text, well",
    [
        (r"<think>1</think>\boxed{1}", True),
        ("<think>two\nlines</think>\nso \\boxed{1}.", True),
        (r"\boxed{1}", False),
        (r"<think>\boxed{1}</think>", False),
        (r"<think>a</think><think>b</think>\boxed{1}", False),
        (r"say <think>a</think>\boxed{1}", False),
        (r"<think>a</think>\boxed{1} or \boxed{2}", False),
    ],
)
def test_the_form(text, well):
    assert has_think_format(text) is well


# ── Equal answers ──


@pytest.mark.parametrize(
    "given, truth, same",
    [
        (r"\frac{1}{2}", "0.5", True),
        ("x + 1", "1 + x", True),
        ("-3", "-3", True),
        ("3", "-3", False),
        ("", "7", False),
        ("nothing", "7", False),
        ("tac", "cat", False),
        ("cat", "cat", True),
        ("3cm", "3km", False),
        ("3  km", "3 km", True),
        (r"\sin(x)^2", r"\sin(x)\cdot\sin(x)", True),
        ("AB", "BA", False),
    ],
)
def test_answers_are_equal_by_value(given, truth, same):
    assert answers.answers_equal(given, truth) is same


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_is_judged():
    """Its processor time counts: on a busy machine a right answer is right all the same."""
    verify = math_verifier.MathVerifier(seconds=1.0)
    assert verify("1/2", "0.5")
    first = verify.process.pid
    assert not verify("9^{9^{9^{9}}}", "7")
    assert 1 <= verify.seconds_used < 2
    assert verify("1/2", "0.5") and verify.process.pid != first
    verify.stop()


HOSTILE = {
    "a tower": "9^{9^{9^{9}}}",
    "a factorial": "(10^{9})!",
    "brackets": "(" * 5000 + "1" + ")" * 5000,
    "a megabyte": "1" * 1_000_000,
    "roots": r"\sqrt{" * 200 + "2" + "}" * 200,
    "lines": "1\n[1, 2]\n8",
    "no character": "\ud800\0",
    "code": "__import__('os')._exit(0)",
}


def test_nothing_hostile_is_right_hangs_or_spoils_the_next():
    verify = math_verifier.MathVerifier(seconds=1.0)
    for name, text in HOSTILE.items():
        verify("1", "1.0")  # a process is there
        assert not verify(text, "7"), name
        assert verify.seconds_used < 2, name
        assert verify("1/2", "0.5"), name
    verify.stop()


@pytest.mark.parametrize(
    "guess",
    ["7=8", "8=7", "7, 8", "{7, 8}", r"7 \text{ or } 8", r"7 \pm 1", "[7, 8]", r"7 \approx 8"],
)
def test_two_guesses_are_not_both_right(guess):
    assert answers.answers_equal(guess, "7") + answers.answers_equal(guess, "8") <= 1


def test_a_process_that_waits_for_its_turn_is_not_late(monkeypatch):
    """Stopped for longer than its limit, as on a busy machine, it has used no time of its own."""
    verify = math_verifier.MathVerifier(seconds=0.5)
    assert verify("1/2", "0.5")
    process = verify.process
    process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(1.0, lambda: process.send_signal(signal.SIGCONT))
    timer.start()
    start = time.monotonic()
    assert verify("2/4", "0.5") and verify.process is process
    assert time.monotonic() - start > 0.9 and verify.seconds_used < 0.5
    process.send_signal(signal.SIGSTOP)  # for ever: it is given up at last
    monkeypatch.setattr(worker_process, "PATIENCE", 2)
    assert not verify("2/4", "0.5") and verify.process is None
    assert verify("2/4", "0.5")
    verify.stop()


def test_a_dead_process_is_replaced():
    verify = math_verifier.MathVerifier()
    assert verify("2/4", "0.5")
    verify.process.kill()
    verify.process.wait()
    assert verify("2/4", "0.5")
    verify.stop()


def test_a_process_that_starts_too_slowly_is_told_and_not_listened_to_later(monkeypatch):
    slow, real = math_verifier.MathVerifier(), math_verifier.MathVerifier.read_line
    monkeypatch.setattr(math_verifier.MathVerifier, "read_line", lambda self, _: real(self, 0.0))
    with pytest.raises(UserError, match="pip install"):
        slow("1", "2")
    monkeypatch.undo()
    assert slow("1", "2") is False and slow("1", "1") is True


def test_off_the_main_thread_too():
    found = []
    work = threading.Thread(target=lambda: found.append(answers.answers_equal(r"\sqrt{4}", "2")))
    work.start()
    work.join()
    assert found == [True]


# ── Scores ──


def sample(answer: int, said: list[int]) -> list[int]:
    bos, eos, _, user, assistant = SPECIAL_TOKENS
    return [bos, user, 9, assistant, 10 + answer, eos, user, 8, assistant, *said, eos]


def test_a_score_is_its_samples_alone_and_a_product_with_one_row(micro):
    model, parts = Transformer(micro), [sample(1, [20, 21]), sample(2, [22]), sample(3, [])]
    line = torch.tensor([sum(parts, [])])
    cu_seqlens = to_cu_seqlens([len(p) for p in parts])
    h_1nd = model.hidden_states(line, cu_seqlens=cu_seqlens)[0]
    got = reward_scores(h_1nd[0], model.head.weight, cu_seqlens, SPECIAL_TOKENS)
    for part, reward in zip(parts, got):
        want = model(torch.tensor([part]))[0, -1, SPECIAL_TOKENS.pad]
        torch.testing.assert_close(reward, want, atol=1e-4, rtol=1e-4)


def test_only_judgments_are_learnt_by_heart(micro):
    line = torch.tensor([sample(1, [20, 21]) + sample(2, [22]) + sample(1, [20])[:6]])
    assert line[judgment_mask(line, SPECIAL_TOKENS)].tolist() == [20, 21, 1, 22, 1]


def test_an_answer_among_several_turns_is_no_judgment():
    """A prompt that holds an answer already: only the judge's turn, the last, counts."""
    bos, eos, _, user, assistant = SPECIAL_TOKENS
    talk = [bos, user, 9, assistant, 10, eos, user, 11, assistant, 12, eos]
    line = torch.tensor([talk + [user, 13, assistant, 14, eos]])
    assert line[judgment_mask(line, SPECIAL_TOKENS)].tolist() == [14, eos]


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=6))
def test_bradley_terry_is_the_log_likelihood(pairs):
    reward_m = torch.tensor(pairs, dtype=torch.double).flatten()
    loss, agrees = bradley_terry(reward_m)
    for (a, b), x, agree in zip(pairs, loss, agrees):
        assert x.item() == pytest.approx(math.log(1 + math.exp(b - a)), rel=1e-9)
        assert bool(agree) == (a > b)


def loss_of(model, line, weight: float):
    mask, cu_seqlens = judgment_mask(line, SPECIAL_TOKENS), sample_cu_seqlens(line, SPECIAL_TOKENS)
    return preference_loss(model, line, mask, cu_seqlens, SPECIAL_TOKENS, weight)


def test_the_loss_of_pairs_is_both_of_its_parts(micro):
    model, weight = Transformer(micro), 0.3
    good, bad = sample(1, [20, 21]), sample(2, [22])
    line = torch.tensor([good + bad])
    found = loss_of(model, line, weight)
    logp = [model(torch.tensor([s]))[0].log_softmax(-1) for s in (good, bad)]
    spoken = []
    for p, tokens in zip(logp, (good, bad)):
        spoken += [-p[i - 1, tokens[i]] for i in range(9, len(tokens))]
    want = bradley_terry(found.reward_m)[0].mean() + weight * torch.stack(spoken).sum() / 2
    torch.testing.assert_close(found.losses.main, want, atol=1e-5, rtol=1e-5)
    without = loss_of(model, line, 0.0).losses.main
    torch.testing.assert_close(without, bradley_terry(found.reward_m)[0].mean())


def test_training_on_pairs_tells_them_apart(micro):
    model = Transformer(micro)
    line = torch.tensor([sample(1, [20]) + sample(2, [21])])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss_of(model, line, 0.0).losses.main.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, line, 0.0).losses.main < 0.1


# ── Calibration ──


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_counts_each_pair_once(pairs):
    claim_n = torch.tensor([p for p, _ in pairs])
    table = calibration(claim_n, torch.tensor([r for _, r in pairs]), 4)
    assert table[:, 2].sum() == len(pairs)
    for i, (claim, right, n) in enumerate(table.tolist()):
        if n:
            assert 0.5 + i / 8 - 1e-6 <= claim <= 0.5 + (i + 1) / 8 + 1e-6
            assert 0 <= right <= 1


def test_a_pair_counts_from_the_side_that_is_preferred():
    table = calibration(torch.tensor([0.1, 0.9]), torch.tensor([False, True]), 1)
    assert table[0].tolist() == pytest.approx([0.9, 1.0, 2.0])


def test_a_table_of_calibration_by_hand():
    claim_n = torch.tensor([0.5, 0.65, 0.35, 0.95, 1.0, 0.0])
    table = calibration(claim_n, torch.tensor([True, True, False, True, False, True]))
    assert table[:, 2].tolist() == [1, 2, 0, 0, 3]
    assert table[0].tolist() == [0.5, 1, 1] and table[2:4, :2].isnan().all()
    assert table[1].tolist() == pytest.approx([0.65, 1.0, 2])
    assert table[4].tolist() == pytest.approx([(0.95 + 1 + 1) / 3, 1 / 3, 3])


# ── Votes ──


def test_what_judges_and_voters_are_asked():
    assert judge_prompt() == "Is this right? Work it out."
    assert judge_prompt("7") == "Is this right? Work it out. It should be 7."
    assert vote_prompt("1+1?", "2") == (
        "An answer is good if it is true, keeps to the question, and says no more than needed.\n"
        "Question: 1+1?\nAnswer: 2\nIs it good, yes or no?"
    )


def test_a_self_reward_is_the_share_of_the_first_votes():
    yes_nk = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]).bool()
    assert vote_reward(yes_nk, 2).tolist() == [0.5, 0.5]
    assert vote_reward(yes_nk, 4).tolist() == [0.5, 0.75]


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("p", [0.3, 0.5, 0.8])
def test_condorcet_by_enumeration(p, k):
    total = 0.0
    for votes in itertools.product([0, 1], repeat=k):
        chance = math.prod(p if v else 1 - p for v in votes)
        total += chance * {True: 1.0, False: 0.0}[2 * sum(votes) > k]
        total += chance * 0.5 * (2 * sum(votes) == k)
    assert majority_accuracy(p, k) == pytest.approx(total)


def test_votes_agree_with_the_truth_or_not():
    yes_nk = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    good_n = torch.tensor([True, False, True])
    assert majority_agreement(yes_nk, good_n, 3) == pytest.approx(2 / 3)
    assert majority_agreement(yes_nk, good_n, 1) == 1.0
    assert majority_agreement(yes_nk, good_n, 2) == pytest.approx((1 + 1 + 0.5) / 3)


@pytest.mark.parametrize("k, share", [(1, 0.4), (2, 0.7), (3, 0.9), (4, 1.0), (5, 1.0)])
def test_one_of_k_samples_is_correct(k, share):
    """Of five samples two are correct, so three of ten pairs and one of ten triples are wrong."""
    assert pass_at_k(2, 5, k) == pytest.approx(share) and pass_at_k(0, 5, k) == 0


def test_the_answer_of_most_samples():
    assert majority(["1", None, "2", "2"]) == "2" and majority(["2", "1"]) == "2"
    assert majority([None]) is None
