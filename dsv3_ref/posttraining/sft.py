"""`dsv3 sft`: fine-tuning on packed conversations (chapter 14)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import tyro

from dsv3_ref.data.conversations import (
    read_conversations,
    split_samples,
)
from dsv3_ref.data.files import print_to_stderr
from dsv3_ref.data.fingerprint import fingerprint_samples
from dsv3_ref.data.loader import VAL_BATCH
from dsv3_ref.data.packing import (
    LOSS,
    TOKEN,
    PackedDataset,
    find_cu_seqlens,
    pack_rows,
    read_flags,
)
from dsv3_ref.data.tokenizer import byte_lengths
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.model import Transformer
from dsv3_ref.optim import TrainingRecipe, get_batch_size_schedule
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.sft import SFT_RECIPES, sft_loss
from dsv3_ref.training.objective import CompletionLoss, Objective, RowBatch
from dsv3_ref.training.settings import MAX_EPOCHS, TrainConfig, unused_loss_rules
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import (
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    BalanceLossScope,
    Batch,
    Data,
    evaluate_other_sources,
    find_chat_template,
    split_rows,
    summarize_rows,
    validate_rows,
)


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Fine-tune a model on conversations.

    A row of data is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]},
    or of ShareGPT's, Alpaca's or TRL's prompt-completion form. A message with "weight": 0 or
    "train": false has no loss. Invalid rows are reported by number and skipped.
    """

    data: tuple[str, ...] = ()
    """files of rows (.jsonl, .json, .csv, .parquet; docs/data.md), folders of them, or datasets
    owner/name:config@split on the Hugging Face hub"""
    epochs: float = 2.0
    """passes over the conversations, unless --steps is given"""
    fim_rate: Annotated[float, tyro.conf.Suppress] = 0.0
    streaming: Annotated[bool, tyro.conf.Suppress] = False
    data_streams: Annotated[int, tyro.conf.Suppress] = 1

    COMMAND: ClassVar[str] = "sft"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = SFT_RECIPES
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of this command: whether each holds, and the error if not."""
        return [
            (self.init is not None, "--init is missing: the run or model to start from"),
            (len(self.data) > 0, "--data needs at least one file of conversations"),
            (self.recipe.steps >= 0, "--steps must be at least 0 (0: as many as --epochs needs)"),
            (
                0 < self.epochs <= MAX_EPOCHS,
                f"--epochs must be above 0 and at most {MAX_EPOCHS:,}",
            ),
            *unused_loss_rules(self.recipe),
        ]


class SFTTask:
    """Fine-tuning on packed conversations; only the assistant's tokens are learned."""

    requires_whole_model: ClassVar[bool] = False
    replicates_data: ClassVar[bool] = False
    objective: ClassVar[Objective] = CompletionLoss()
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: SFTConfig):
        self.config = config
        self.samples: list[list[int]] = []  # held-out conversations for the summary

    def build_data(self) -> Data:
        """Read conversations, hold some out, and decide how many rows each step has."""
        config, recipe = self.config, self.config.recipe
        length = recipe.seq_len + 1
        chat = find_chat_template(config)
        tokenizer, special_tokens = chat.tokenizer, chat.special_tokens
        train_samples: list[list[int]] = []
        val, held_out = {}, {}
        fingerprints = []
        for name in config.data:
            samples = read_conversations(name, chat, length, print_to_stderr)
            fingerprints.append(fingerprint_samples(name, samples))
            if not config.val_data:
                samples, held_out[name] = split_samples(samples)
            train_samples += samples
        for name in config.val_data:
            held_out[name] = read_conversations(name, chat, length, print_to_stderr)
            fingerprints.append(fingerprint_samples(name, held_out[name]))
        for name, samples in held_out.items():
            self.samples += samples[:2]
            rows = torch.tensor(pack_rows(samples, length, special_tokens.pad))
            val[name] = list(rows.split(VAL_BATCH))
        dataset = PackedDataset(train_samples, length, config.seed, special_tokens.pad)
        steps = recipe.steps or max(
            1, round(config.epochs * len(dataset.rows) / recipe.global_batch_size)
        )
        return Data(
            names=list(config.data),
            batch_size_schedule=get_batch_size_schedule(replace(recipe, steps=steps), steps),
            val=val,
            special_tokens=special_tokens,
            chat=chat,
            token_bytes=torch.tensor(byte_lengths(tokenizer)),
            loader=dataset,
            tokenizer=tokenizer,
            fingerprints=tuple(fingerprints),
        )

    def prepare(self, run: Run) -> None:
        """Do nothing: the rows say which tokens count."""

    def next_batch(self, run: Run, n: int) -> Batch:
        """Return this process's part of the next n rows of T + 1 tokens."""
        return run.strategy.next_rows(run, n)

    def minibatches(self, run: Run, batch: Batch) -> list[Batch]:
        """Return the batch as one minibatch: it takes one optimizer step."""
        return [batch]

    def micro_batches(self, run: Run, batch: torch.Tensor) -> list[torch.Tensor]:
        """Split a minibatch into parts of --micro-batch rows."""
        return split_rows(batch, self.config.micro_batch)

    def row_batch(self, run: Run, batch: torch.Tensor) -> RowBatch:
        """Return the rows of a minibatch."""
        return RowBatch(batch)

    def loss(
        self, model: Transformer, micro_batch: torch.Tensor, balance_loss_scope: BalanceLossScope
    ) -> LossOutput:
        """Return `sft_loss` of a micro-batch, averaged over its loss tokens."""
        return flagged_loss(model, micro_batch)

    def loss_weight(self, micro_batch: torch.Tensor) -> int:
        """Return the number of loss tokens: those of answers."""
        return num_loss_tokens(micro_batch)

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of tokens that the model reads, padding included."""
        return len(batch) * self.config.recipe.seq_len

    def nll(self, model: Transformer, rows_bs: torch.Tensor) -> float:
        """Return Σ −log p of the answers' tokens, in nats."""
        mean = flagged_loss(model, rows_bs).main.item()
        return mean * self.loss_weight(rows_bs)

    def loss_targets(self, rows_bs: torch.Tensor) -> torch.Tensor:
        """Return the tokens of answers, whose loss counts, (n,)."""
        rows = read_flags(rows_bs)
        return rows.tokens_bs[:, 1:][rows.mask_bs[:, 1:]]

    def metrics(self, run: Run, row: dict) -> dict:
        """Return the metrics row unchanged."""
        return row

    def validate(self, run: Run) -> dict:
        """Return loss and bits per byte of held-out answers."""
        return validate_rows(self, run)

    def summarize(self, run: Run, row: dict) -> dict:
        """Return the contents of summary.json, with answers to held-out prompts."""
        summary = summarize_rows(self, run, row)
        return summary | {"baselines": {}, "samples": self.answer_prompts(run)}

    def summarize_rank(self, run: Run) -> None:
        """Take part in the collective operations of `summarize`."""
        evaluate_other_sources(self, run)

    def describe_data(self, run: Run) -> str:
        """Return how many tokens of which files are trained on, for the start message."""
        tokens = sum(run.data.batch_size_schedule) * self.config.recipe.seq_len
        return f"{tokens:,} tokens of {' and '.join(run.data.names)}"

    def result_line(self, run: Run, row: dict) -> str:
        """Return the result in one sentence: bits per byte of held-out answers."""
        return f"{row['val_bpb']:.3f} bits per byte on held-out answers of {run.data.val_name}"

    def answer_prompts(self, run: Run) -> list[dict]:
        """Return the answers to the prompts of held-out conversations, if the model fits here."""
        model, device = run.strategy.load_whole_model(run.run_dir), run.strategy.device
        if model is None:
            return []
        generator = torch.Generator(device).manual_seed(self.config.seed)
        tokenizer = run.data.tokenizer
        samples = []
        assert run.data.chat is not None  # `build_data` sets it
        stops = set(run.data.chat.stop_token_ids)
        for sample in self.samples:
            prompt = last_prompt(sample)
            room = max(0, min(SAMPLE_TOKENS, self.config.model.max_seq_len - len(prompt)))
            params = SamplingParams(SAMPLE_TEMPERATURE, generator=generator)
            steps = stream(model, [prompt], room, params, stops)
            completion: list[int] = []
            for (new_tokens,) in steps:
                completion += new_tokens
            samples.append({
                "prompt": tokenizer.decode(prompt), "text": tokenizer.decode(completion),
                "temperature": SAMPLE_TEMPERATURE,
            })  # fmt: skip
        return samples


# ── Packed rows with flags ──


def flagged_loss(model: Transformer, rows_bs: torch.Tensor) -> LossOutput:
    """Return `sft_loss` of packed rows of T + 1 tokens with flags."""
    rows = read_flags(rows_bs)
    cu_seqlens = find_cu_seqlens(rows.start_bs[:, :-1])
    return sft_loss(model, rows.tokens_bs, rows.mask_bs, cu_seqlens)


def num_loss_tokens(rows_bs: torch.Tensor) -> int:
    """Return the number of tokens of packed rows that carry the loss."""
    return int(read_flags(rows_bs).mask_bs[:, 1:].sum())


def last_prompt(sample: list[int]) -> list[int]:
    """Return the tokens of a flagged sample before its last answer."""
    start = len(sample)
    while start and not sample[start - 1] & LOSS:
        start -= 1
    while start and sample[start - 1] & LOSS:
        start -= 1
    return [token & TOKEN for token in sample[:start]]
