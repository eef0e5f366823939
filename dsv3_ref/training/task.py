"""The `Task` protocol, which says what is learned, and pre-training on text.

A task builds its data, draws batches, computes losses and validates under metric names of its own.
A `Strategy` decides where it runs, and the loop in `training.loop` joins the two.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from dsv3_ref import pretrain
from dsv3_ref.checkpoints import native
from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.loader import (
    VAL_BATCH,
    PackedDataLoader,
    load_or_train_tokenizer,
    sample_texts,
    val_windows,
)
from dsv3_ref.data.sources import Source, open_sources, stored_tokenizer
from dsv3_ref.data.streams import StreamLoader
from dsv3_ref.data.tokenizer import BOS, byte_lengths, check_vocab_size, load_tokenizer, vocab_size
from dsv3_ref.data.tokenizer_settings import load_tokenizer_settings
from dsv3_ref.decode import generate
from dsv3_ref.model import Transformer
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.optim import get_batch_size_schedule
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.sft import SpecialTokens
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, Objective, RowBatch
from dsv3_ref.training.settings import TrainConfig

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run

OTHER_SOURCE_BATCHES = 16  # validation batches of each source but the first, for the summary
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 160, 0.8  # of the texts in the summary
SAMPLES_PER_SOURCE = 2

Batch = Any  # what a task draws for a step: rows of tokens, pairs, or rollouts
BalanceLossScope = Literal["sequence", "batch"]


class Loader(Protocol):
    """A stream of training rows that can be stopped and resumed anywhere."""

    def next_batch(self, n: int) -> Batch:
        """Return the next n rows."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream: values for JSON, and tensors at the top level."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""


class RowLoader(Loader, Protocol):
    """A stream of rows that several readers can share, each for its part of every batch."""

    def next_part(self, n: int, begin: int, end: int) -> Tensor:
        """Return rows begin … end − 1 of the next n rows; the others count as taken."""

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the present state; it is cheap until it is called."""

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of all rows from those of several readers."""


@dataclass
class Data:
    """The data of a run."""

    names: list[str]  # sources or tasks
    batch_size_schedule: list[int]  # rows of each step
    val: dict[str, list[Tensor]]  # validation batches of each source
    tokenizer: Tokenizer
    special_tokens: SpecialTokens | None = None  # of conversations
    chat: ChatTemplate | None = None  # the form of conversations
    token_bytes: Tensor | None = None  # UTF-8 bytes of each token
    minibatches: int = 1  # optimizer steps taken from one batch
    loader: Loader | None = None
    sources: tuple[Source, ...] = ()
    val_sources: tuple[Source, ...] = ()  # whose held-out documents are validated on
    fingerprints: tuple[dict[str, Any], ...] = ()  # of each source: name, documents, text hashes

    @property
    def val_name(self) -> str:
        """The source that validation reports."""
        return next(iter(self.val))


class Task(Protocol):
    """The subject of a run: data, loss, validation and results of one `dsv3` command.

    Only the task looks into a `Batch`; the loop asks for its length.
    """

    @property
    def config(self) -> TrainConfig:
        """The options of the command."""

    @property
    def requires_whole_model(self) -> bool:
        """True if every rank holds the whole model and trains on its part of a batch."""

    @property
    def replicates_data(self) -> bool:
        """True if every rank reads the data itself, as it is small."""

    @property
    def objective(self) -> Objective:
        """The loss, for strategies that divide the model among ranks."""

    @property
    def monitor(self) -> str:
        """The validation metric whose best checkpoint is kept."""

    @property
    def monitor_mode(self) -> Literal["min", "max"]:
        """The direction in which the monitored metric improves."""

    def build_data(self) -> Data:
        """Open the data and set the number of rows of each step."""

    def prepare(self, run: "Run") -> None:
        """Build what the task needs besides the model, such as a reference model."""

    def next_batch(self, run: "Run", n: int) -> Batch:
        """Return this process's part of the next n rows."""

    def minibatches(self, run: "Run", batch: Batch) -> Sequence[Batch]:
        """Split a batch into minibatches; the optimizer takes a step on each."""

    def micro_batches(self, run: "Run", batch: Batch) -> Sequence[Batch]:
        """Split a minibatch into micro-batches, each the input of one forward pass."""

    def row_batch(self, run: "Run", batch: Batch) -> RowBatch:
        """Return a minibatch as the rows of its objective."""

    def loss(
        self, model: Transformer, micro_batch: Batch, balance_loss_scope: BalanceLossScope
    ) -> LossOutput:
        """Return the losses of a micro-batch, averaged over what `loss_weight` counts."""

    def loss_weight(self, micro_batch: Batch) -> int:
        """Return the weight of a micro-batch in the mean over its batch."""

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of tokens of a batch that are trained on."""

    def metrics(self, run: "Run", row: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics row of the step just taken; `row` has what all tasks share."""

    def validate(self, run: "Run") -> dict[str, Any]:
        """Return validation metrics under the task's own names."""

    def summarize(self, run: "Run", row: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of summary.json; `row` is the last metrics row."""

    def summarize_rank(self, run: "Run") -> None:
        """Take part in the collective operations of `summarize`, on ranks that do not write."""

    def describe_data(self, run: "Run") -> str:
        """Describe the training data, for the start message."""

    def result_line(self, run: "Run", row: dict[str, Any]) -> str:
        """Return the result in one sentence."""


class RowTask(Task, Protocol):
    """A task on rows of tokens, which any strategy can run and validate by log-probabilities."""

    def nll(self, model: Transformer, rows_bs: Tensor) -> float:
        """Return Σ −log p of the targets of validation rows, in nats."""

    def loss_targets(self, rows_bs: Tensor) -> Tensor:
        """Return the tokens of validation rows whose loss counts."""


# ── Shared by several tasks ──


def tokenizer_dir(config: TrainConfig) -> Path | None:
    """Return the folder of --tokenizer or of --init, None if neither is given."""
    if config.tokenizer or not config.init:
        return config.tokenizer
    return native.find_tokenizer_dir(config.init)


def find_chat_template(config: TrainConfig) -> ChatTemplate:
    """Return the tokenizer and the chat template of --tokenizer or of --init."""
    folder = tokenizer_dir(config)
    settings = load_tokenizer_settings(folder) if folder else None
    return ChatTemplate(find_tokenizer(config), settings)


def find_tokenizer(config: TrainConfig, sources: Sequence[Source] = ()) -> Tokenizer:
    """Return the tokenizer of --tokenizer, of --init, of the shards, or train one on the data."""
    max_size = config.model.vocab_size
    folder = tokenizer_dir(config)
    stored = stored_tokenizer(sources)
    tokenizer = load_tokenizer(folder) if folder else stored
    if tokenizer is None:
        tokenizer = load_or_train_tokenizer(sources, max_size, tqdm.write)
    if stored and tokenizer.to_str() != stored.to_str():
        raise UserError(
            f"the shards were made with another tokenizer than that of {folder}: leave --tokenizer "
            "and --init out, or prepare the shards with this tokenizer"
        )
    check_vocab_size(tokenizer, max_size, "raise --model.vocab-size to {size}")
    return tokenizer


def split_rows(rows_bs: Tensor, size: int) -> list[Tensor]:
    """Split rows into micro-batches of `size` rows; 0: one micro-batch."""
    return list(rows_bs.split(size or len(rows_bs)))


@torch.no_grad()
def evaluate_loss(
    task: RowTask, run: "Run", name: str, batches: int | None = None
) -> tuple[float, float]:
    """Return nats per token and bits per byte on held-out documents of a source.

    batches: the number of validation batches; None: all of them.
    """
    token_bytes = run.data.token_bytes
    assert token_bytes is not None, "tasks on rows count the bytes of their tokens"
    nll = 0.0
    n_bytes = n_tokens = 0
    for window_bs in run.data.val[name][:batches]:
        with run.strategy.precision_context():
            nll += run.strategy.nll(task, window_bs.to(run.strategy.device))
        targets = task.loss_targets(window_bs)
        n_bytes += int(token_bytes[targets].sum())
        n_tokens += targets.numel()
    return nll / n_tokens, nll / math.log(2) / max(1, n_bytes)


def validate_rows(task: RowTask, run: "Run") -> dict[str, float | None]:
    """Return the validation metrics on the first source, also with averaged weights.

    At the last step it evaluates all validation rows, before that --val-sequences of them.
    """
    is_last = run.state.step == len(run.data.batch_size_schedule)
    batches = None if is_last else ceil_div(run.config.val_sequences, VAL_BATCH)
    name = run.data.val_name
    val_loss, val_bpb = evaluate_loss(task, run, name, batches)
    if not math.isfinite(val_loss):
        run.abort("validation loss", val_loss)
    row: dict[str, float | None] = {"val_loss": val_loss, "val_bpb": val_bpb}
    if run.state.ema:
        with run.state.ema.swapped_in():
            mean_loss = evaluate_loss(task, run, name, batches)[0]
        row["val_loss_ema"] = mean_loss if math.isfinite(mean_loss) else None
    return row


def evaluate_other_sources(task: RowTask, run: "Run") -> dict[str, float]:
    """Return bits per byte on held-out documents of all sources but the first."""
    _, *names = run.data.val
    return {name: evaluate_loss(task, run, name, OTHER_SOURCE_BATCHES)[1] for name in names}


def summarize_rows(task: RowTask, run: "Run", row: dict[str, Any]) -> dict[str, Any]:
    """Return the part of summary.json that all tasks on rows have."""
    first = {run.data.val_name: row["val_bpb"]}
    return {
        "val_loss": row["val_loss"],
        "val_bpb": row["val_bpb"],
        "val_bpb_by_source": first | evaluate_other_sources(task, run),
        "seconds": run.state.seconds,
        "tokens": run.state.tokens,
    }


# ── Pre-training ──


class PretrainTask:
    """Pre-training on packed text, with a loss on every token."""

    requires_whole_model: ClassVar[bool] = False
    replicates_data: ClassVar[bool] = False
    objective: ClassVar[Objective] = NEXT_TOKEN_LOSS
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: TrainConfig):
        self.config = config

    def build_data(self) -> Data:
        """Open the sources, find or train a tokenizer, and hold out validation documents."""
        config, recipe = self.config, self.config.recipe
        sources = open_sources(
            config.data, config.seed, config.streaming, hold_out=not config.val_data
        )
        val_sources = open_sources(config.val_data, config.seed, False, hold_out=False) or sources
        tokenizer = find_tokenizer(config, sources)
        val = {s.name: val_windows(s.val_texts, tokenizer, recipe.seq_len) for s in val_sources}
        return Data(
            names=[s.name for s in sources],
            batch_size_schedule=get_batch_size_schedule(recipe, recipe.steps),
            val=val,
            token_bytes=torch.tensor(byte_lengths(tokenizer)),
            loader=StreamLoader(
                [
                    PackedDataLoader(
                        sources,
                        tokenizer,
                        recipe.seq_len + 1,
                        config.seed,
                        config.fim_rate,
                        stream=i,
                        num_streams=config.data_streams,
                    )
                    for i in range(config.data_streams)
                ]
            ),
            tokenizer=tokenizer,
            sources=tuple(sources),
            val_sources=tuple(val_sources),
            fingerprints=tuple(s.fingerprint() for s in dict.fromkeys([*sources, *val_sources])),
        )

    def prepare(self, run: "Run") -> None:
        """Do nothing: pre-training needs nothing besides the model."""

    def next_batch(self, run: "Run", n: int) -> Batch:
        """Return this process's part of the next n rows of T + 1 tokens."""
        return run.strategy.next_rows(run, n)

    def minibatches(self, run: "Run", batch: Batch) -> list[Batch]:
        """Return the batch as one minibatch."""
        return [batch]

    def micro_batches(self, run: "Run", batch: Tensor) -> list[Tensor]:
        """Split rows into micro-batches of --micro-batch rows."""
        return split_rows(batch, self.config.micro_batch)

    def row_batch(self, run: "Run", batch: Tensor) -> RowBatch:
        """Return the rows of a minibatch."""
        return RowBatch(batch)

    def loss(
        self, model: Transformer, micro_batch: Tensor, balance_loss_scope: BalanceLossScope
    ) -> LossOutput:
        """Return the next-token, MTP and balance losses."""
        return pretrain.compute_losses(model, micro_batch, balance_loss_scope)

    def loss_weight(self, micro_batch: Tensor) -> int:
        """Return the number of rows, which all have the same number of tokens."""
        return len(micro_batch)

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of predicted tokens."""
        return len(batch) * self.config.recipe.seq_len

    def nll(self, model: Transformer, rows_bs: Tensor) -> float:
        """Return Σ −log p of all tokens but the first of each row, in nats."""
        h_nd = model.hidden_states(rows_bs[:, :-1])[0].flatten(0, 1)
        return linear_cross_entropy(h_nd, model.head.weight, rows_bs[:, 1:].flatten()).item()

    def loss_targets(self, rows_bs: Tensor) -> Tensor:
        """Return all tokens but the first of each row."""
        return rows_bs[:, 1:]

    def metrics(self, run: "Run", row: dict[str, Any]) -> dict[str, Any]:
        """Return the row unchanged: pre-training has no metrics of its own."""
        return row

    def validate(self, run: "Run") -> dict[str, Any]:
        """Return loss and bits per byte on held-out documents of the first source."""
        return validate_rows(self, run)

    def summarize(self, run: "Run", row: dict[str, Any]) -> dict[str, Any]:
        """Return the results by source, baselines, and continuations of held-out texts."""
        summary = summarize_rows(self, run, row)
        return summary | {"baselines": measure_baselines(run), "samples": continue_texts(run)}

    def summarize_rank(self, run: "Run") -> None:
        """Take part in the evaluation of the other sources."""
        evaluate_other_sources(self, run)

    def describe_data(self, run: "Run") -> str:
        """Describe the data by its tokens and sources."""
        tokens = sum(run.data.batch_size_schedule) * self.config.recipe.seq_len
        return f"{tokens:,} tokens of {' and '.join(run.data.names)}"

    def result_line(self, run: "Run", row: dict[str, Any]) -> str:
        """Return the bits per byte on the first source's held-out documents."""
        return f"{row['val_bpb']:.3f} bits per byte on unseen {run.data.val_name} documents"


def continue_texts(run: "Run") -> list[dict[str, Any]]:
    """Return continuations of the first words of held-out documents, if the model fits here."""
    model, device = run.strategy.load_whole_model(run.run_dir), run.strategy.device
    if model is None:
        return []
    generator = torch.Generator(device).manual_seed(run.config.seed)
    tokenizer = run.data.tokenizer
    bos = tokenizer.token_to_id(BOS)
    assert bos is not None, "load_tokenizer requires the special tokens"
    samples: list[dict[str, Any]] = []
    texts: list[str] = []
    for source in run.data.val_sources:
        texts += source.val_texts[:SAMPLES_PER_SOURCE]
    for text in texts:
        ids = [bos, *tokenizer.encode(text[:2000], add_special_tokens=False).ids[:12]]
        room = max(0, min(SAMPLE_TOKENS, run.config.model.max_seq_len - len(ids)))
        prompt_bs = torch.tensor([ids], device=device)
        new = generate(model, prompt_bs, room, SAMPLE_TEMPERATURE, generator)[0, len(ids) :]
        samples.append({
            "prompt": tokenizer.decode(ids), "text": tokenizer.decode(new.tolist()),
            "temperature": SAMPLE_TEMPERATURE,
        })  # fmt: skip
    return samples


def measure_baselines(run: "Run") -> dict[str, float]:
    """Return bits per byte of gzip, bzip2 and single tokens on the first source's held-out text."""
    from dsv3_ref.training.report import compute_baselines  # imports matplotlib: half a second

    tokenizer, val_texts = run.data.tokenizer, run.data.val_sources[0].val_texts

    def encode(texts: list[str]) -> list[int]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return list(chain.from_iterable(encoding.ids for encoding in encodings))

    occurrences = Counter(encode(sample_texts(run.data.sources[:1])))
    counts = [occurrences[i] for i in range(vocab_size(tokenizer))]
    return compute_baselines("".join(val_texts), counts, encode(val_texts))
