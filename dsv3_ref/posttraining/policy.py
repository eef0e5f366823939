"""A model with its tokenizer: conversations in, groups of completions out."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dsv3_ref.checkpoints import native
from dsv3_ref.config import UserError
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.marks import THINK_TAGS
from dsv3_ref.data.tokenizer import check_tokens
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining.prompts import build_messages
from dsv3_ref.rewards import vote_prompt

BATCH_COMPLETIONS = 256  # completions that are generated at a time
MAX_VOTE_TOKENS = 4
# (prompts, num_generations, max_new_tokens, stop tokens, temperature) → (tokens, log π)
RolloutFn = Callable[
    [list[list[int]], int, int, Collection[int], float], tuple[list[list[int]], list[list[float]]]
]


def as_transformer(model: nn.Module) -> Transformer:
    """Return a strategy's model, which is whole if the task requires it."""
    assert isinstance(model, Transformer), type(model).__name__
    return model


def check_prompt_length(
    model: Transformer, prompts: Sequence[list[int]], max_new_tokens: int
) -> None:
    """Raise a `UserError` if a prompt and its answer are longer than the model's context.

    Also raises one if a prompt has a token that the model lacks.
    """
    check_tokens(prompts, model.config.vocab_size)
    longest = max(map(len, prompts), default=0)
    limit = model.config.max_seq_len
    if longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
            f"{limit} of the model's context: lower --max-new-tokens or shorten the prompts"
        )


def truncate_prompts(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, name: str, truncate: bool
) -> tuple[list[list[int]], int]:
    """Keep as many last tokens of each prompt as leave room for its answer, and count the cut ones.

    Raises a `UserError` if any is too long and `truncate` is False, or if there is no room at all.
    """
    limit = model.config.max_seq_len
    room = limit - max_new_tokens
    lengths = [len(prompt) for prompt in prompts if len(prompt) > room]
    if lengths and (room < 1 or not truncate):
        remedy = "" if room < 1 else ", or pass --truncate to keep the last tokens of each"
        raise UserError(
            f"{name}: {len(lengths)} of {len(prompts)} prompts have up to {max(lengths)} tokens, "
            f"which with {max_new_tokens} new ones are more than the {limit} of the model's "
            f"context: lower --max-new-tokens or --num-fewshot{remedy}"
        )
    return [prompt[-room:] for prompt in prompts], len(lengths)


class Completion(NamedTuple):
    """A sampled completion of a prompt."""

    prompt: list[int]
    tokens: list[int]
    logps: list[float]  # log π of each token when it was sampled
    text: str  # it begins with the <think> with which the prompt ends, if it does
    is_finished: bool  # it ends with the end token, not at the limit on tokens


class Policy:
    """A model with the form of its conversations and a function that samples completions."""

    def __init__(self, model: Transformer, chat: ChatTemplate, rollout_fn: RolloutFn | None = None):
        self.model = model
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.special_tokens = chat.special_tokens
        self.rollout_fn = rollout_fn or partial(generate_rollouts, model)
        self.num_malformed = 0  # votes that were neither yes nor no

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
    ) -> "Policy":
        """Load a policy from a run, a checkpoint or a Hugging Face directory."""
        model = native.load(folder, device, dtype, verify).eval()
        return cls(model, ChatTemplate.from_dir(native.find_tokenizer_dir(Path(folder))))

    def generate(
        self, conversations: Sequence[list[dict]], num_generations: int, max_new_tokens: int,
        temperature: float,
    ) -> list[Completion]:  # fmt: skip
        """Sample `num_generations` consecutive completions of each conversation."""
        batches = self.iter_batches(conversations, num_generations, max_new_tokens, temperature)
        return list(chain.from_iterable(batches))

    def iter_batches(
        self, conversations: Sequence[list[dict]], num_generations: int, max_new_tokens: int,
        temperature: float,
    ) -> Iterator[list[Completion]]:  # fmt: skip
        """Yield the completions of `generate`, some conversations at a time."""
        n = max(1, BATCH_COMPLETIONS // num_generations)
        for start in range(0, len(conversations), n):
            prompts = [self.chat.render_prompt(x) for x in conversations[start : start + n]]
            yield self.complete(prompts, num_generations, max_new_tokens, temperature)

    def complete(
        self, prompts: list[list[int]], num_generations: int, max_new_tokens: int,
        temperature: float,
    ) -> list[Completion]:  # fmt: skip
        """Sample `num_generations` consecutive completions of each prompt, all in one batch."""
        check_prompt_length(self.model, prompts, max_new_tokens)
        stops = self.chat.stop_token_ids
        rollouts = self.rollout_fn(prompts, num_generations, max_new_tokens, stops, temperature)
        self.check_tokens(rollouts[0])
        batch = []
        for i, (tokens, logps) in enumerate(zip(*rollouts)):
            is_finished = tokens[-1] in stops
            text = self.tokenizer.decode(tokens[:-1] if is_finished else tokens)
            prompt = prompts[i // num_generations]
            if not text.lstrip().startswith(THINK_TAGS[0]):
                text = self.chat.opened_thought(prompt) + text
            batch.append(Completion(prompt, tokens, logps, text, is_finished))
        return batch

    def check_tokens(self, completions: list[list[int]]) -> None:
        """Raise a `UserError` if the model lacks a token that another engine has written."""
        largest, vocab_size = max(map(max, completions), default=0), self.model.config.vocab_size
        if largest >= vocab_size:
            raise UserError(
                f"an engine wrote token {largest}, but the model has only {vocab_size}: start the "
                "engine with the model that is trained"
            )

    def sample_votes(self, answers: Sequence[tuple[str, str]], k: int) -> torch.Tensor:
        """Sample k votes on each (question, answer) at temperature 1, (n, k): True is a yes."""
        ballots = [build_messages(vote_prompt(*answer)) for answer in answers]
        votes = self.generate(ballots, k, MAX_VOTE_TOKENS, 1.0)
        texts = [vote.text.strip().lower() for vote in votes]
        self.num_malformed += sum(not text.startswith(("yes", "no")) for text in texts)
        return torch.tensor([text.startswith("yes") for text in texts]).view(-1, k)
