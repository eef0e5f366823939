"""What is learned: the `Task` protocol, and pre-training on text.

A task builds its data, draws batches, computes losses and validates under metric names of its own.
It does not know where it runs: that is a `Strategy`. The loop in `training.loop` joins the two.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsv3_ref import pretrain
from dsv3_ref.checkpoints import native
from dsv3_ref.config import UserError, ceil_div
from dsv3_ref.data.loader import (
    VAL_BATCH,
    PackedDataLoader,
    load_or_train_tokenizer,
    sample_texts,
    val_windows,
)
from dsv3_ref.data.sources import open_sources, stored_tokenizer
from dsv3_ref.data.tokenizer import BOS, byte_lengths, load_tokenizer, vocab_size
from dsv3_ref.decode import generate
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.optim import get_batch_size_schedule
from dsv3_ref.pretrain import LossOutput
from dsv3_ref.sft import SpecialTokens
from dsv3_ref.training.settings import TrainConfig

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run

OTHER_SOURCE_BATCHES = 16  # validation batches of each source but the first, for the summary
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 160, 0.8  # of the texts in the summary


class Loader(Protocol):
    """A stream of training rows that can be stopped and resumed anywhere."""

    def next_batch(self, n: int) -> Any:
        """Return the next n rows."""

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the position in the stream: values for JSON, and tensors."""

    def load_state_dict(self, values: dict, tensors: dict[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken."""


@dataclass
class Data:
    """What a task learns from. Ranks that do not read it have only the fields up to the loader."""

    names: list[str]  # sources or tasks; the first is the one that validation reports
    batch_size_schedule: list[int]  # rows of each step
    val: dict[str, list[Tensor]]  # validation batches of each source
    special_tokens: SpecialTokens | None = None  # of conversations
    token_bytes: Tensor | None = None  # UTF-8 bytes of each token
    minibatches: int = 1  # optimizer steps taken from one batch
    loader: Loader | None = None
    tokenizer: Any = None
    sources: tuple = ()
    fingerprints: tuple[dict, ...] = ()  # of each source: name, documents, hashes of their text

    def without_loader(self) -> "Data":
        """Return what ranks know that do not read the data themselves."""
        return replace(self, loader=None, tokenizer=None, sources=(), fingerprints=())


class Task(Protocol):
    """What a run learns: data, loss, validation and results of one `dsv3` command."""

    config: TrainConfig
    requires_whole_model: bool
    """Whether every rank must hold the whole model, so that only data parallelism is possible."""
    monitor: str
    """The validation metric whose best checkpoint is kept."""
    monitor_mode: Literal["min", "max"]

    def build_data(self) -> Data:
        """Open the data and decide how many rows each step has."""

    def prepare(self, run: "Run") -> None:
        """Build what the task needs besides the model, such as a reference model."""

    def next_batch(self, run: "Run", n: int) -> Any:
        """Return this process's part of the next n rows."""

    def minibatches(self, run: "Run", batch: Any) -> list:
        """Split a batch into the parts that take an optimizer step each."""

    def micro_batches(self, run: "Run", batch: Any) -> list:
        """Split a minibatch into the parts that one forward pass reads."""

    def loss(self, model: nn.Module, micro_batch: Any, balance_loss_scope: str) -> LossOutput:
        """Return the losses of a micro-batch, averaged over what `loss_weight` counts."""

    def loss_weight(self, micro_batch: Any) -> int:
        """Return how much a micro-batch counts in the mean over its batch."""

    def num_tokens(self, batch: Any) -> int:
        """Return how many tokens of a batch are trained on."""

    def metrics(self, run: "Run", row: dict) -> dict:
        """Return the metrics row of the step just taken, from the part that all tasks share."""

    def validate(self, run: "Run") -> dict:
        """Return validation metrics under the task's own names."""

    def summarize(self, run: "Run", row: dict) -> dict:
        """Return the contents of summary.json; `row` is the last metrics row."""

    def summarize_rank(self, run: "Run") -> None:
        """Take part in the collective operations of `summarize`, on ranks that do not write."""

    def describe_data(self, run: "Run") -> str:
        """Describe what will be trained on, for the start message."""

    def result_line(self, run: "Run", row: dict) -> str:
        """Return the result in one sentence."""


class RowTask(Task, Protocol):
    """A task on rows of tokens, which any strategy can run and validate by log-probabilities."""

    def nll(self, model: nn.Module, rows_bs: Tensor) -> float:
        """Return Σ −log p of the targets of validation rows, in nats."""

    def loss_targets(self, rows_bs: Tensor) -> Tensor:
        """Return the tokens of validation rows whose loss counts."""


# ── What several tasks share ──


def find_tokenizer(config: TrainConfig, sources: tuple = ()) -> Any:
    """Return the tokenizer of --tokenizer, of --init, of the shards, or train one on the data."""
    room = config.model.vocab_size
    folder = config.tokenizer
    if not folder and config.init:
        folder = native.find_tokenizer_dir(config.init)
    stored = stored_tokenizer(sources)
    tokenizer = load_tokenizer(folder) if folder else stored
    if not tokenizer:
        tokenizer = load_or_train_tokenizer(sources, room, tqdm.write)
    if stored and tokenizer.to_str() != stored.to_str():
        raise UserError(f"the shards were made with another tokenizer than that of {folder}")
    size = vocab_size(tokenizer)
    if size > room:
        raise UserError(
            f"the tokenizer has {size} tokens, the model only {room}: "
            f"raise --model.vocab-size to {size}"
        )
    return tokenizer


def next_rows(run: "Run", n: int) -> Tensor:
    """Return the next n rows of T + 1 tokens, drawn by the rank that reads the data."""
    rows_bs = run.data.loader.next_batch(n) if run.data.loader else None
    shape = n, run.config.recipe.seq_len + 1
    return run.strategy.broadcast_rows(rows_bs, shape, run.state.step + 1)


def split_rows(rows_bs: Tensor, size: int) -> list[Tensor]:
    """Split rows into micro-batches of `size` rows; 0: one micro-batch."""
    return list(rows_bs.split(size or len(rows_bs)))


@torch.no_grad()
def evaluate(
    task: RowTask, run: "Run", name: str, batches: int | None = None
) -> tuple[float, float]:
    """Return nats per token and bits per byte on held-out documents of a source."""
    nll = n_bytes = n_tokens = 0
    for window_bs in run.data.val[name][:batches]:
        with run.strategy.precision_context():
            nll += run.strategy.nll(task, window_bs.to(run.strategy.device))
        targets = task.loss_targets(window_bs)
        n_bytes += run.data.token_bytes[targets].sum().item()
        n_tokens += targets.numel()
    return nll / n_tokens, nll / math.log(2) / max(1, n_bytes)


def validate_rows(task: RowTask, run: "Run") -> dict:
    """Return the loss on the first source, also of the averaged weights; all of it at the end."""
    is_last = run.state.step == len(run.data.batch_size_schedule)
    batches = None if is_last else ceil_div(run.config.val_sequences, VAL_BATCH)
    name = run.data.names[0]
    val_loss, val_bpb = evaluate(task, run, name, batches)
    if not math.isfinite(val_loss):
        run.abort("validation loss", val_loss)
    row = {"val_loss": val_loss, "val_bpb": val_bpb}
    if run.state.ema:
        with run.state.ema.swapped_in():
            mean_loss = evaluate(task, run, name, batches)[0]
        row["val_loss_ema"] = mean_loss if math.isfinite(mean_loss) else None
    return row


def evaluate_other_sources(task: RowTask, run: "Run") -> dict[str, float]:
    """Return bits per byte on held-out documents of all sources but the first."""
    names = run.data.names[1:]
    return {name: evaluate(task, run, name, OTHER_SOURCE_BATCHES)[1] for name in names}


def summarize_rows(task: RowTask, run: "Run", row: dict) -> dict:
    """Return what every summary.json of a run on rows holds."""
    first = {run.data.names[0]: row["val_bpb"]}
    return {
        "val_loss": row["val_loss"],
        "val_bpb": row["val_bpb"],
        "val_bpb_by_source": first | evaluate_other_sources(task, run),
        "seconds": run.state.seconds,
        "tokens": run.state.tokens,
    }


# ── Pre-training ──


class PretrainTask:
    """Pre-training: every token of packed text is predicted."""

    requires_whole_model: ClassVar[bool] = False
    monitor: ClassVar[str] = "val_loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, config: TrainConfig):
        self.config = config

    def build_data(self) -> Data:
        config, recipe = self.config, self.config.recipe
        sources = open_sources(config.data, config.seed, config.streaming)
        tokenizer = find_tokenizer(config, sources)
        val = {s.name: val_windows(s.val_texts, tokenizer, recipe.seq_len) for s in sources}
        return Data(
            names=[s.name for s in sources],
            batch_size_schedule=get_batch_size_schedule(recipe, recipe.steps),
            val=val,
            token_bytes=torch.tensor(byte_lengths(tokenizer)),
            loader=PackedDataLoader(
                sources, tokenizer, recipe.seq_len + 1, config.seed, config.fim_rate
            ),
            tokenizer=tokenizer,
            sources=tuple(sources),
            fingerprints=tuple(s.fingerprint() for s in sources),
        )

    def prepare(self, run: "Run") -> None:
        """Pre-training needs nothing besides the model."""

    def next_batch(self, run: "Run", n: int) -> Tensor:
        return next_rows(run, n)

    def minibatches(self, run: "Run", batch: Tensor) -> list[Tensor]:
        return [batch]

    def micro_batches(self, run: "Run", batch: Tensor) -> list[Tensor]:
        return split_rows(batch, self.config.micro_batch)

    def loss(self, model: nn.Module, micro_batch: Tensor, balance_loss_scope: str) -> LossOutput:
        return pretrain.compute_losses(model, micro_batch, balance_loss_scope)

    def loss_weight(self, micro_batch: Tensor) -> int:
        return len(micro_batch)  # all rows have as many tokens

    def num_tokens(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()

    def nll(self, model: nn.Module, rows_bs: Tensor) -> float:
        h_nd = model.hidden_states(rows_bs[:, :-1])[0].flatten(0, 1)
        return linear_cross_entropy(h_nd, model.head.weight, rows_bs[:, 1:].flatten()).item()

    def loss_targets(self, rows_bs: Tensor) -> Tensor:
        return rows_bs[:, 1:]

    def metrics(self, run: "Run", row: dict) -> dict:
        return row

    def validate(self, run: "Run") -> dict:
        return validate_rows(self, run)

    def summarize(self, run: "Run", row: dict) -> dict:
        summary = summarize_rows(self, run, row)
        return summary | {"baselines": measure_baselines(run), "samples": continue_texts(run)}

    def summarize_rank(self, run: "Run") -> None:
        evaluate_other_sources(self, run)

    def describe_data(self, run: "Run") -> str:
        tokens = sum(run.data.batch_size_schedule) * self.config.recipe.seq_len
        return f"{tokens:,} tokens of {' and '.join(run.data.names)}"

    def result_line(self, run: "Run", row: dict) -> str:
        return f"{row['val_bpb']:.3f} bits per byte on unseen {run.data.names[0]} documents"


def continue_texts(run: "Run") -> list[dict]:
    """Return continuations of the first words of held-out documents."""
    model, device = run.strategy.load_whole_model(run.run_dir), run.strategy.device
    generator = torch.Generator(device).manual_seed(run.config.seed)
    tokenizer, samples = run.data.tokenizer, []
    bos = tokenizer.token_to_id(BOS)
    for text in [text for source in run.data.sources for text in source.val_texts[:2]]:
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
    from dsv3_ref.training.report import baselines  # imports matplotlib: half a second

    tokenizer, source = run.data.tokenizer, run.data.sources[0]

    def encode(texts: list[str]) -> list[int]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [token for encoding in encodings for token in encoding.ids]

    occurrences = Counter(encode(sample_texts([source])))
    counts = [occurrences[i] for i in range(vocab_size(tokenizer))]
    return baselines("".join(source.val_texts), counts, encode(source.val_texts))
