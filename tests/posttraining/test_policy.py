"""Completions of a policy: which prompt each one has, when it has ended, and what must fit."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from miniruns import MINI

from dsv3_ref.config import UserError, from_dict
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.tokenizer import train_tokenizer
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining import policy as policy_module
from dsv3_ref.posttraining.policy import (
    MAX_VOTE_TOKENS,
    Policy,
    as_transformer,
    check_prompt_length,
    truncate_prompts,
)

TEXT = ["yes and no, we talk again and again <think>\n"] * 50
LIMIT = MINI["max_seq_len"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(from_dict(MINI)).eval()


class Sampler:
    """A rollout function that returns given completions in turn and records what it is asked."""

    def __init__(self, completions):
        self.completions, self.asked = completions, []

    def __call__(self, prompts, num_generations, max_new_tokens, stops, temperature):
        self.asked.append((prompts, num_generations, max_new_tokens, temperature))
        n = len(prompts) * num_generations
        tokens = [self.completions[i % len(self.completions)] for i in range(n)]
        return tokens, [[-0.5 * i] * len(x) for i, x in enumerate(tokens)]


@pytest.fixture
def chat():
    return ChatTemplate(train_tokenizer(TEXT, MINI["vocab_size"]))


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ── What fits ──


def test_a_prompt_and_its_answer_fill_the_context_at_most(model):
    check_prompt_length(model, [[5], [5] * (LIMIT - 10)], 10)
    check_prompt_length(model, [], LIMIT)
    sentence = f"a prompt of {LIMIT - 9} tokens and 10 new ones are more than the {LIMIT} of"
    with pytest.raises(UserError, match=sentence):
        check_prompt_length(model, [[5] * (LIMIT - 9), [5]], 10)
    with pytest.raises(UserError, match=str(MINI["vocab_size"])):
        check_prompt_length(model, [[MINI["vocab_size"]]], 1)


def test_long_prompts_keep_their_last_tokens(model):
    room = LIMIT - 60
    prompts = [[1, 2, 3, 4], [1, 2, 3, 4, 5], [7], [1, 2, 3, 4, 5, 6]]
    cut = [[1, 2, 3, 4], [2, 3, 4, 5], [7], [3, 4, 5, 6]]
    assert room == 4 and truncate_prompts(model, prompts, 60, "x", True) == (cut, 2)
    assert truncate_prompts(model, prompts[:1], 60, "x", False) == (prompts[:1], 0)
    with pytest.raises(UserError, match="x: 2 of 4 prompts have up to 6 tokens, .*--truncate"):
        truncate_prompts(model, prompts, 60, "x", False)
    assert truncate_prompts(model, prompts, LIMIT - 1, "x", True)[0] == [[4], [5], [7], [6]]
    with pytest.raises(UserError, match="x: 3 of 4 prompts .*--truncate"):
        truncate_prompts(model, prompts, LIMIT - 1, "x", False)
    with pytest.raises(UserError, match="x: 4 of 4 prompts") as e:  # no room at all
        truncate_prompts(model, prompts, LIMIT, "x", True)
    assert "--truncate" not in str(e.value)


def test_a_part_of_a_model_is_no_policy(model):
    assert as_transformer(model) is model
    with pytest.raises(AssertionError, match="Linear"):
        as_transformer(torch.nn.Linear(1, 1))


# ── Completions ──


def test_every_completion_has_its_prompt_and_its_end(model, chat):
    a, eos = chat.encode("a"), chat.special_tokens.eos
    sampler = Sampler([[*a, eos], [*a, *a], [eos]])
    policy = Policy(model, chat, sampler)
    found = policy.complete([[5], [6, 7], [8]], 2, 9, 0.7)
    assert [x.prompt for x in found] == [[5], [5], [6, 7], [6, 7], [8], [8]]
    assert [x.tokens for x in found] == [[*a, eos], [*a, *a], [eos]] * 2
    assert [x.text for x in found] == ["a", "aa", ""] * 2
    assert [x.is_finished for x in found] == [True, False, True] * 2
    assert [x.logps[0] for x in found] == [0, -0.5, -1, -1.5, -2, -2.5]
    assert sampler.asked == [([[5], [6, 7], [8]], 2, 9, 0.7)]
    with pytest.raises(UserError, match="of the model's context"):
        policy.complete([[5] * (LIMIT - 8)], 2, 9, 0.7)


def test_a_token_that_the_model_lacks_is_refused(model, chat):
    size = MINI["vocab_size"]
    Policy(model, chat, Sampler([[size - 1]])).complete([[5]], 1, 9, 1.0)
    with pytest.raises(UserError, match=f"wrote token {size}, but the model has only {size}"):
        Policy(model, chat, Sampler([[4, size]])).complete([[5]], 1, 9, 1.0)


def test_a_text_begins_with_the_thought_that_its_prompt_opens(model, chat):
    opened, said = chat.encode("a<think>\n"), chat.encode(" <think>a")
    sampler = Sampler([chat.encode("a"), said])
    texts = [x.text for x in Policy(model, chat, sampler).complete([opened, [5]], 2, 9, 1.0)]
    assert texts == ["<think>\na", " <think>a", "a", " <think>a"]


@pytest.mark.parametrize("most, sizes", [(6, [6, 4]), (7, [6, 4]), (4, [4, 4, 2]), (1, [2] * 5)])
def test_conversations_are_completed_some_at_a_time(model, chat, monkeypatch, most, sizes):
    monkeypatch.setattr(policy_module, "BATCH_COMPLETIONS", most)
    policy = Policy(model, chat, Sampler([[5]]))
    talks = [ask("a" * (1 + i)) for i in range(5)]
    batches = list(policy.iter_batches(talks, 2, 9, 0.7))
    assert [len(batch) for batch in batches] == sizes
    completions = list(chain.from_iterable(batches))
    prompts = [[chat.render_prompt(talk)] * 2 for talk in talks]
    assert [x.prompt for x in completions] == list(chain.from_iterable(prompts))
    assert policy.generate(talks, 2, 9, 0.7) == completions


def test_the_models_own_sampling_is_the_default(model, chat):
    (one,), (other,) = (Policy(model, chat).complete([[5, 6]], 1, 4, 0.0) for _ in range(2))
    assert one == other and 1 <= len(one.tokens) <= 4 and len(one.logps) == len(one.tokens)


# ── Votes ──


def test_a_vote_begins_with_yes_or_no(model, chat):
    sampler = Sampler([chat.encode(x) for x in (" Yes,", "no", "YES", "maybe", "yes", "Not")])
    policy = Policy(model, chat, sampler)
    long = from_dict(MINI | {"max_seq_len": 4096, "original_seq_len": 4096})
    policy.model = SimpleNamespace(config=long)  # the prompts exceed the model's context
    votes = policy.sample_votes([("a", "b"), ("c", "d")], 3)
    assert votes.tolist() == [[True, False, True], [False, True, False]]
    assert policy.num_malformed == 1  # "maybe"; "Not" begins with no
    ((prompts, k, max_new_tokens, temperature),) = sampler.asked
    assert (len(prompts), k, max_new_tokens, temperature) == (2, 3, MAX_VOTE_TOKENS, 1.0)
    asked = [chat.tokenizer.decode(prompt) for prompt in prompts]
    assert "Question: a\nAnswer: b" in asked[0] and "Question: c\nAnswer: d" in asked[1]
    policy.sample_votes([("a", "b")], 6)
    assert policy.num_malformed == 2
