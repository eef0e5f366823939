"""`dsv3 sft`: fine-tuning on conversations, packed (chapter 14)."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import tyro
from torch import nn

from dsv3_ref import sft
from dsv3_ref.config import UserError
from dsv3_ref.data import files, sources
from dsv3_ref.data.loader import VAL_BATCH
from dsv3_ref.data.tokenizer import EOS, byte_lengths, get_special_tokens
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.sft import (
    SpecialTokens,
    assistant_mask,
    num_loss_tokens,
    pack_samples,
    render_conversation,
    sft_loss,
)
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    Data,
    evaluate_other_sources,
    find_tokenizer,
    next_rows,
    split_rows,
    summarize_rows,
    validate_rows,
)

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
        """Return conditions on the options, each with the sentence for when it is false."""
        return [
            (self.init is not None, "--init is missing: the run or model to start from"),
            (len(self.data) > 0, "--data needs at least one file of conversations"),
            (self.recipe.steps >= 0, "--steps must be at least 0 (0: as many as --epochs take)"),
            (0 < self.epochs < float("inf"), "--epochs must be above 0"),
        ]


# ── Conversations ──


def encode_conversation(row, encode, special_tokens: SpecialTokens, room: int) -> list[int]:
    """Encode a row of data; raise a `UserError` if there is nothing to learn from it."""
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


def read_conversations(
    name: str, encode, special_tokens: SpecialTokens, room: int, say=print
) -> list[list[int]]:
    """Read the conversations of a source; report bad rows by number and leave them out."""
    found, bad = files.valid_rows(
        name, lambda row: encode_conversation(row, encode, special_tokens, room), say
    )
    if not found:
        raise UserError(f"{name} has no conversation to learn from ({bad} rows were left out)")
    return found


class PackedDataset:
    """Conversations packed in rows of `length` tokens, in a new random order each epoch."""

    def __init__(self, samples: list[list[int]], length: int, seed: int, pad: int):
        self.samples, self.length, self.seed, self.pad = samples, length, seed, pad
        self.epoch, self.index = 0, 0
        self.rows = self.packed()

    def packed(self) -> list[list[int]]:
        """Pack the conversations of this epoch, CHUNK at a time, and shuffle the rows."""
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
        """Return the next n rows, (n, length), int64."""
        return torch.tensor(list(islice(self, n)))

    def state_dict(self) -> tuple[dict, dict]:
        """Return the position in the stream."""
        return {"epoch": self.epoch, "index": self.index}, {}

    def load_state_dict(self, small: dict, _: dict) -> None:
        """Continue at the position where `state_dict` was called."""
        self.epoch = small["epoch"]
        self.rows, self.index = self.packed(), small["index"]


# ── The run ──


class SFTTask:
    """Fine-tuning on packed conversations; only the assistant's tokens are learned."""

    requires_whole_model: ClassVar[bool] = False
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: SFTConfig):
        self.config = config
        self.samples: list[list[int]] = []  # held-out conversations for the summary

    def build_data(self) -> Data:
        """Read conversations, hold some out, and decide how many rows each step has."""
        config, recipe = self.config, self.config.recipe
        length = recipe.seq_len + 1
        tokenizer = find_tokenizer(config)
        special_tokens = get_special_tokens(tokenizer)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        train_samples, val = [], {}
        for name in config.data:
            samples = read_conversations(name, encode, special_tokens, length, print_to_stderr)
            train, held_out = train_val_split(samples)
            train_samples += train
            self.samples += held_out[:2]
            rows = torch.tensor(pack_samples(held_out, length, special_tokens.pad))
            val[name] = list(rows.split(VAL_BATCH))
        dataset = PackedDataset(train_samples, length, config.seed, special_tokens.pad)
        steps = recipe.steps or max(
            1, round(config.epochs * len(dataset.rows) / recipe.global_batch_size)
        )
        self.special_tokens = special_tokens
        return Data(
            names=list(config.data),
            batch_size_schedule=get_batch_size_schedule(replace(recipe, steps=steps), steps),
            val=val,
            special_tokens=special_tokens,
            token_bytes=torch.tensor(byte_lengths(tokenizer)),
            loader=dataset,
            tokenizer=tokenizer,
        )

    def prepare(self, run: Run) -> None:
        self.special_tokens = run.data.special_tokens  # also on ranks that do not read

    def next_batch(self, run: Run, n: int) -> torch.Tensor:
        return next_rows(run, n)

    def minibatches(self, run: Run, batch: torch.Tensor) -> list[torch.Tensor]:
        return [batch]

    def micro_batches(self, run: Run, batch: torch.Tensor) -> list[torch.Tensor]:
        return split_rows(batch, self.config.micro_batch)

    def loss(
        self, model: nn.Module, micro_batch: torch.Tensor, balance_loss_scope: str
    ) -> LossOutput:
        return sft_loss(model, micro_batch, self.special_tokens)

    def loss_weight(self, micro_batch: torch.Tensor) -> int:
        return num_loss_tokens(micro_batch, self.special_tokens)

    def num_tokens(self, batch: torch.Tensor) -> int:
        return batch[:, 1:].numel()

    def nll(self, model: nn.Module, rows_bs: torch.Tensor) -> float:
        mean = sft_loss(model, rows_bs, self.special_tokens).main.item()
        return mean * self.loss_weight(rows_bs)

    def loss_targets(self, rows_bs: torch.Tensor) -> torch.Tensor:
        return rows_bs[:, 1:][assistant_mask(rows_bs, self.special_tokens)[:, 1:]]

    def metrics(self, run: Run, row: dict) -> dict:
        return row

    def validate(self, run: Run) -> dict:
        return validate_rows(self, run)

    def summarize(self, run: Run, row: dict) -> dict:
        summary = summarize_rows(self, run, row)
        return summary | {"baselines": {}, "samples": self.answer_prompts(run)}

    def summarize_rank(self, run: Run) -> None:
        evaluate_other_sources(self, run)

    def describe_data(self, run: Run) -> str:
        tokens = sum(run.data.batch_size_schedule) * self.config.recipe.seq_len
        return f"{tokens:,} tokens of {' and '.join(run.data.names)}"

    def result_line(self, run: Run, row: dict) -> str:
        return f"{row['val_bpb']:.3f} bits per byte on unseen {run.data.names[0]} documents"

    def answer_prompts(self, run: Run) -> list[dict]:
        """Return the model's answers to the prompts of held-out conversations."""
        model, device = run.strategy.load_whole_model(run.run_dir), run.strategy.device
        generator = torch.Generator(device).manual_seed(self.config.seed)
        tokenizer, samples = run.data.tokenizer, []
        for tokens in self.samples:
            prompt = tokens[: len(tokens) - tokens[::-1].index(self.special_tokens.assistant)]
            room = max(0, min(SAMPLE_TOKENS, self.config.model.max_seq_len - len(prompt)))
            params = SamplingParams(SAMPLE_TEMPERATURE, generator=generator)
            steps = stream(model, [prompt], room, params, {tokenizer.token_to_id(EOS)})
            completion = [token for (new_tokens,) in steps for token in new_tokens]
            samples.append({
                "prompt": tokenizer.decode(prompt), "text": tokenizer.decode(completion),
                "temperature": SAMPLE_TEMPERATURE,
            })  # fmt: skip
        return samples


def print_to_stderr(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr)


def train_val_split(samples: list) -> tuple[list, list]:
    """Hold out one conversation in 20, at least one and at most 1000, the same for every seed."""
    if len(samples) < 2:
        raise UserError("one conversation is too few: one must be held out for validation")
    n = min(sources.VAL_MAX, max(1, len(samples) // sources.VAL_EVERY))
    held = set(np.random.default_rng(0).permutation(len(samples))[:n].tolist())
    return tuple([s for i, s in enumerate(samples) if (i in held) == is_held] for is_held in (0, 1))
