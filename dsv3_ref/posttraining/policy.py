"""A model is asked: conversations in, groups of answers out."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_ref.checkpoints import native
from dsv3_ref.config import UserError
from dsv3_ref.data.tokenizer import get_special_tokens, load_tokenizer
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.posttraining.prompts import build_messages
from dsv3_ref.rewards import vote_prompt
from dsv3_ref.sft import render_conversation

BATCH_COMPLETIONS, MAX_VOTE_TOKENS = (
    256,
    4,
)  # answers that are written side by side; tokens of a vote


def check_prompt_length(model, prompts: Sequence[list[int]], new: int) -> None:
    """Raise if a prompt and its answer are more than the model reads."""
    longest, limit = max(map(len, prompts), default=0), model.config.max_seq_len
    if longest + new > limit:
        raise UserError(
            f"a prompt of {longest} tokens and an answer of {new} are more than the {limit} that "
            "the model reads"
        )


class Completion(NamedTuple):
    """An answer as the model wrote it."""

    prompt: list[int]
    tokens: list[int]
    logp: list[float]
    text: str
    ended: bool  # by its own end mark, not for want of room


class Policy:
    """A model with its tokenizer."""

    def __init__(self, model, tokenizer, rollout_fn=None):
        self.model, self.tokenizer, self.special_tokens = (
            model,
            tokenizer,
            get_special_tokens(tokenizer),
        )
        self.rollout_fn = rollout_fn or partial(
            generate_rollouts, model
        )  # as `generate_rollouts`, without the model

    @classmethod
    def from_pretrained(cls, folder: Path, device="cpu", dtype=torch.float32) -> "Policy":
        """From a run, a checkpoint or a Hugging Face directory."""
        model = native.load(folder, device, dtype).eval()
        return cls(model, load_tokenizer(native.find_tokenizer_dir(Path(folder))))

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """Tokens of a conversation that ends with a question."""
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids
        return render_conversation(messages, encode, self.special_tokens)

    def generate(
        self, asked: Sequence[list[dict]], group: int, max_new: int, temperature: float
    ) -> list[Completion]:
        """`group` answers to each conversation, in succession."""
        return [a for lot in self.iter_batches(asked, group, max_new, temperature) for a in lot]

    def sample_votes(self, asked: Sequence[tuple[str, str]], k: int) -> torch.Tensor:
        """Self-reward: k votes on each (question, answer), at temperature 1, (n, k)."""
        found = self.generate(
            [build_messages(vote_prompt(*pair)) for pair in asked], k, MAX_VOTE_TOKENS, 1.0
        )
        return torch.tensor([a.text.lower().startswith("yes") for a in found]).view(-1, k)

    def iter_batches(
        self, asked, group: int, max_new: int, temperature: float
    ) -> Iterator[list[Completion]]:
        """The same, some conversations at a time."""
        n = max(1, BATCH_COMPLETIONS // group)
        for i in range(0, len(asked), n):
            prompts = [self.encode_prompt(messages) for messages in asked[i : i + n]]
            check_prompt_length(self.model, prompts, max_new)
            end = self.special_tokens.eos
            found = self.rollout_fn(prompts, group, max_new, end, temperature)
            yield [
                Completion(prompts[j // group], tokens, logp, self.tokenizer.decode(tokens),
                        tokens[-1] == end)
                for j, (tokens, logp) in enumerate(zip(*found))
            ]  # fmt: skip
