"""`dsv3 sft`: fine-tuning on conversations, packed (chapter 14)."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, ClassVar

import numpy as np
import torch
import tyro

from dsv3_ref import sft
from dsv3_ref.config import UserError
from dsv3_ref.data import files, loader, sources
from dsv3_ref.data.tokenizer import EOS, byte_lengths, get_special_tokens
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.sft import (
    SpecialTokens,
    assistant_mask,
    num_loss_tokens,
    pack_samples,
    render_conversation,
    sft_loss,
)
from dsv3_ref.training.loop import Trainer
from dsv3_ref.training.settings import TrainConfig

CHUNK = 4096  # conversations that are packed together


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Fine-tune a model on conversations.

    A row of data is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]},
    perhaps with a system message first. Rows that cannot be used are reported by number.
    """

    data: tuple[str, ...] = ()
    """.jsonl or .parquet files, folders of them, or owner/name"""
    epochs: float = 2.0
    """how often each conversation is read, unless --steps says how long"""
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    streaming: Annotated[bool, tyro.conf.Suppress] = False

    COMMAND: ClassVar[str] = "sft"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = sft.RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        return [
            (self.init is not None, "--init is missing: the run or model to start from"),
            (len(self.data) > 0, "--data needs at least one file of conversations"),
            (self.recipe.steps >= 0, "--steps must be at least 0 (0: as many as --epochs take)"),
            (0 < self.epochs < float("inf"), "--epochs must be above 0"),
        ]


# ── Conversations ──


def conversation(row, encode, special_tokens: SpecialTokens, room: int) -> list[int]:
    """Tokens of a row of data; raises a `UserError` for what cannot be learnt from."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list | tuple):
        raise UserError("it has no list of messages")
    tokens = render_conversation(messages, encode, special_tokens)
    if tokens[-1] != special_tokens.eos:
        raise UserError("the last turn is not the assistant's")
    if not all(m["content"] for m in messages if m["role"] == "assistant"):
        raise UserError("an answer is empty")
    if len(tokens) > room:
        raise UserError(f"{len(tokens)} tokens, a row has {room}")
    return tokens


def read(name: str, encode, special_tokens: SpecialTokens, room: int, say=print) -> list[list[int]]:
    """The conversations of a source; bad rows are reported by number and left out."""
    found, bad = files.valid_rows(
        name, lambda row: conversation(row, encode, special_tokens, room), say
    )
    if not found:
        raise UserError(f"{name} has no conversation to learn from ({bad} rows were left out)")
    return found


class Packed:
    """Conversations in rows of `length` tokens, all once an epoch, each epoch in another order."""

    def __init__(self, samples: list[list[int]], length: int, seed: int, pad: int):
        self.samples, self.length, self.seed, self.pad = samples, length, seed, pad
        self.epoch, self.index = 0, 0
        self.rows = self.packed()

    def packed(self) -> list[list[int]]:
        """The rows of this epoch, shuffled; a chunk of the shuffled conversations at a time."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.samples)).tolist()
        chunks = (order[i : i + CHUNK] for i in range(0, len(order), CHUNK))
        rows = [
            row
            for chunk in chunks
            for row in pack_samples([self.samples[i] for i in chunk], self.length, self.pad)
        ]
        return [rows[i] for i in rng.permutation(len(rows))]

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            if self.index == len(self.rows):
                self.epoch, self.index = self.epoch + 1, 0
                self.rows = self.packed()
            self.index += 1
            yield self.rows[self.index - 1]

    def next_batch(self, n: int) -> torch.Tensor:
        """n rows, (n, length), int64."""
        return torch.tensor(list(islice(self, n)))

    def state_dict(self) -> tuple[dict, dict]:
        """Where the stream stands."""
        return {"epoch": self.epoch, "index": self.index}, {}

    def load_state_dict(self, small: dict, _: dict) -> None:
        """Go on exactly where `state` was taken."""
        self.epoch = small["epoch"]
        self.rows, self.index = self.packed(), small["index"]


# ── The run ──


class SftTrainer(Trainer):
    """A run whose rows are packed conversations; what users say carries no loss."""

    def open_data(self) -> None:
        """Conversations, some of them held out, and how many rows each step has."""
        args, r = self.args, self.args.recipe
        self.sources, self.names = [], list(args.data)
        self.tokenizer = self.find_tokenizer()
        self.special_tokens, self.bytes = (
            get_special_tokens(self.tokenizer),
            torch.tensor(byte_lengths(self.tokenizer)),
        )
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids
        say = lambda text: print(text, file=sys.stderr)
        samples, self.val, self.asked_first = [], {}, []
        for name in args.data:
            kept, held = hold_out(read(name, encode, self.special_tokens, r.seq_len + 1, say))
            samples += kept
            self.asked_first += held[:2]
            rows = torch.tensor(pack_samples(held, r.seq_len + 1, self.special_tokens.pad))
            self.val[name] = list(rows.split(loader.VAL_BATCH))
        self.rows = Packed(samples, r.seq_len + 1, args.seed, self.special_tokens.pad)
        steps = r.steps or max(1, round(args.epochs * len(self.rows.rows) / r.global_batch_size))
        self.plan = get_batch_size_schedule(replace(r, steps=steps), steps)

    def losses(self, model, tokens_bs, balance_over: str):
        return sft_loss(model, tokens_bs, self.special_tokens)

    def loss_weight(self, tokens_bs) -> int:
        return num_loss_tokens(tokens_bs, self.special_tokens)

    def nll(self, rows_bs) -> float:
        return self.losses(self.model, rows_bs, "").main.item() * self.loss_weight(rows_bs)

    def counted(self, rows_bs):
        return rows_bs[:, 1:][assistant_mask(rows_bs, self.special_tokens)[:, 1:]]

    def samples(self) -> list[dict]:
        """Answers to held-out questions, beside those that were given."""
        out, generator = [], torch.Generator(self.device).manual_seed(self.args.seed)
        for tokens in self.asked_first:
            asked = tokens[: len(tokens) - tokens[::-1].index(self.special_tokens.assistant)]
            room = max(0, min(160, self.args.model.max_seq_len - len(asked)))
            choice = SamplingParams(0.8, generator=generator)
            rounds = stream(self.model, [asked], room, choice, {self.tokenizer.token_to_id(EOS)})
            new = [token for (tokens,) in rounds for token in tokens]
            prompt, text = (self.tokenizer.decode(x) for x in (asked, new))
            out.append({"prompt": prompt, "text": text, "temperature": 0.8})
        return out

    def baselines(self) -> dict[str, float]:
        return {}


def hold_out(samples: list) -> tuple[list, list]:
    """One conversation in 20, at least one and at most 1000, the same for every seed."""
    if len(samples) < 2:
        raise UserError("one conversation is too few: one must be held out for validation")
    n = min(sources.VAL_MAX, max(1, len(samples) // sources.VAL_EVERY))
    held = set(np.random.default_rng(0).permutation(len(samples))[:n].tolist())
    return tuple([s for i, s in enumerate(samples) if (i in held) == is_held] for is_held in (0, 1))
