"""`dsv3 train`: from text to a checkpoint, a metrics file and a report."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from dsv3_ref import ops, pretrain
from dsv3_ref.checkpoints import native
from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import UserError
from dsv3_ref.data.loader import (
    VAL_BATCH,
    PackedDataLoader,
    load_or_train_tokenizer,
    sample_texts,
    val_windows,
)
from dsv3_ref.data.sources import open_sources, stored_tokenizer
from dsv3_ref.data.tokenizer import (
    BOS,
    byte_lengths,
    load_tokenizer,
    save_tokenizer,
    vocab_size,
)
from dsv3_ref.decode import generate
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import max_vio
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.optim import (
    build_adamw,
    get_batch_size_schedule,
    get_bias_update_rate,
    get_lr,
    get_mtp_weight,
)
from dsv3_ref.pretrain import LossOutput, StepStats, train_step
from dsv3_ref.sft import SpecialTokens
from dsv3_ref.training import resume, settings
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.malloc import tune_malloc
from dsv3_ref.training.recompute import saved_tensors
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.spike_guard import EXIT_CODES, SpikeGuard, catch_signals

# ── The run ──


class Trainer:
    """One run: model, optimizer and data, and where they stand."""

    sharded = True  # on several ranks: stages and experts apart, or the whole model on each
    together = None  # of several ranks: see `train_step`
    first = True  # among ranks: it writes
    replicas = 1  # processes that each hold the whole model and share the work
    parts = 1  # optimizer steps from one batch
    KNOWN = ("names", "val", "bytes", "plan", "special_tokens")  # of the data, on every rank
    special_tokens: SpecialTokens | None = None  # of conversations

    def __init__(self, args: TrainConfig, folder: Path):
        self.args, self.folder = args, folder
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.spike_guard = SpikeGuard(
            args.skip_grad_norm_factor, args.grad_norm_window, args.max_skipped_steps
        )
        self.rolled_from: int | None = None  # for the next row
        self.asked: list[int] = []  # signals that ask for an early end
        self.device = self.pick_device()
        self.open_data()
        torch.manual_seed(args.seed)
        self.build()

    def pick_device(self) -> torch.device:
        return pick_device(self.args.device)

    def open_data(self) -> None:
        """Sources, tokenizer, training rows, held-out windows, and how many rows each step has."""
        args, r = self.args, self.args.recipe
        self.plan = get_batch_size_schedule(r, r.steps)
        self.sources = open_sources(args.data, args.seed, args.streaming)
        self.names = [s.name for s in self.sources]
        self.tokenizer = self.find_tokenizer()
        self.rows = PackedDataLoader(
            self.sources, self.tokenizer, r.seq_len + 1, args.seed, args.fim_rate
        )
        self.bytes = torch.tensor(byte_lengths(self.tokenizer))
        self.val = {
            s.name: val_windows(s.val_texts, self.tokenizer, r.seq_len) for s in self.sources
        }

    def build(self) -> None:
        """The model with its first weights, and what changes them."""
        moments = torch.bfloat16 if self.args.optimizer_dtype == "bf16" else torch.float32
        self.model = Transformer(self.args.model).to(self.device)
        if self.fresh:
            native.load_into(self.model, self.args.init)
        self.optimizer = build_adamw(self.model, self.args.recipe, moments)
        self.ema = (
            EMA(self.model, self.optimizer, self.args.ema_decay) if self.args.ema_decay else None
        )

    @property
    def fresh(self) -> bool:
        """Whether weights come from --init: it has some, and this run has no checkpoint yet."""
        return self.args.init is not None and not native.list_checkpoints(self.folder)

    def find_tokenizer(self):
        """--tokenizer, that of --init, of shards, or one trained on this data; it must fit."""
        room = self.args.model.vocab_size
        given = self.args.tokenizer or (
            self.args.init and native.find_tokenizer_dir(self.args.init)
        )
        own = stored_tokenizer(self.sources)
        t = load_tokenizer(given) if given else own
        t = t or load_or_train_tokenizer(self.sources, room, tqdm.write)
        if own and t.to_str() != own.to_str():
            raise UserError(f"the shards were made with another tokenizer than that of {given}")
        if vocab_size(t) > room:
            raise UserError(
                f"the tokenizer has {vocab_size(t)} tokens, the model only {room}: "
                f"raise --model.vocab-size to {vocab_size(t)}"
            )
        return t

    @property
    def params(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def where(self) -> str:
        """What trains it."""
        return str(self.device)

    @property
    def done(self) -> float:
        """Fraction of the run's tokens seen so far."""
        return sum(self.plan[: self.step]) / sum(self.plan)

    @contextmanager
    def arithmetic(self):
        """How products are computed: bf16 by autocast, FP8 by a backend before the active ones."""
        wanted, on_gpu = self.args.precision, self.device.type == "cuda"
        bf16 = wanted == "bf16" or (on_gpu and wanted != "fp32")
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=bf16))
            if wanted == "fp8":
                stack.enter_context(ops.use("fp8", *ops.ACTIVE_BACKENDS))
            yield

    def one_step(self) -> dict:
        """Train one step; the row for metrics.jsonl."""
        r, start, done = self.args.recipe, time.perf_counter(), self.done
        lr, gamma, weight = (
            get_lr(r, self.step, done),
            get_bias_update_rate(r, done),
            get_mtp_weight(r, done),
        )
        batch = None
        try:
            batch = self.batch(self.plan[self.step])
            with (
                self.arithmetic(),
                saved_tensors(True) if self.args.recompute else nullcontext(),
            ):
                s = self.compute(batch, r, lr, gamma, weight, self.spike_guard.grad_norm_limit)
        except torch.OutOfMemoryError:
            rows = self.args.micro_batch or (2 if batch is None else len(batch))
            hint = f"--micro-batch {max(1, rows // 2)} computes fewer rows at a time"
            raise UserError(f"{self.device} is out of memory: {hint}") from None
        self.step += 1
        if self.ema and not s.skipped:
            self.ema.update()
        self.spike_guard.update(s)
        self.last = s
        trained, seconds = self.trained(batch), time.perf_counter() - start
        self.tokens, self.seconds = self.tokens + trained, self.seconds + seconds
        return {"step": self.step, "tokens": self.tokens} | self.row(s) | {
            "lr": lr, "bias_update_rate": gamma, "mtp_weight": weight, "batch_size": len(batch),
            "tokens_per_s": trained / seconds, "seconds": self.seconds,
        }  # fmt: skip

    def batch(self, n: int) -> torch.Tensor:
        """The next n rows of T + 1 tokens."""
        return self.rows.next_batch(n).to(self.device)

    def trained(self, tokens_bs) -> int:
        """Tokens of a batch."""
        return tokens_bs[:, 1:].numel()

    def compute(self, tokens_bs, *settings) -> StepStats:
        """`train_step` on a batch."""
        micro = tokens_bs.split(self.args.micro_batch or len(tokens_bs))
        return self.step_on(micro, *settings)

    def step_on(self, micro, *settings) -> StepStats:
        """`train_step` over micro-batches."""
        return train_step(
            self.model,
            self.optimizer,
            micro,
            *settings,
            self.losses,
            self.loss_weight,
            self.together,
        )

    def losses(self, model: Transformer, tokens_bs, balance_over: str) -> LossOutput:
        """Those of chapter 07."""
        return pretrain.compute_losses(model, tokens_bs, balance_over)

    def loss_weight(self, tokens_bs) -> int:
        """How much these rows count in a mean over a batch."""
        return len(tokens_bs)

    def share(self, items: list) -> list:
        """What this process has to do of something: all of it."""
        return items

    def gathered(self, items: list) -> list:
        """The shares of all processes."""
        return items

    def summed(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        return values

    def give_up(self, name: str, value: float, more: str = "") -> None:
        """Stop the run: weights that give such a number are of no use."""
        raise UserError(
            f"the {name} became {value:.6g} at step {self.step}{more}, so training stopped. "
            f"{resume.last_good(self.folder)} A lower --lr usually helps."
        )

    def roll_back(self) -> None:
        """Go back to the newest good checkpoint, past the data since; a second time is the end."""
        to = self.rollback_point()
        if to is None or resume.step_number(to) == self.spike_guard.last_rollback:
            s, more = (
                self.last,
                f", and {self.spike_guard.consecutive_skips} steps in succession were skipped",
            )
            loss = s.skipped == "nan" and not math.isfinite(s.total)
            self.give_up(*(("loss", s.total) if loss else ("gradient", s.grad_norm)), more)
        self.rolled_from = self.step
        self.go_back(to)
        n = self.spike_guard.max_skipped_steps
        tqdm.write(f"{n} steps skipped: back from step {self.rolled_from} "
                   f"to {self.step}, past the data between", sys.stderr)  # fmt: skip

    def row(self, s) -> dict:
        """The measured part of a metrics row."""
        share_le = s.load_le / s.load_le.sum(-1, keepdim=True)
        biases = self.biases()
        rolled_from, self.rolled_from = self.rolled_from, None
        return {
            "loss": known(s.loss),
            "loss_total": known(s.total),
            "mtp_loss": [known(x) for x in s.mtp],
            "val_loss": None,
            "val_bpb": None,
            "val_loss_ema": None,
            "grad_norm": known(s.grad_norm),
            "skipped": s.skipped,
            "rolled_back_from": rolled_from,
            "expert_load": [[round(x, 6) for x in row] for row in share_le.tolist()],
            "max_vio": [round(max_vio(load_e), 4) for load_e in s.load_le],
            "expert_bias": [[] if b is None else [round(x, 6) for x in b.tolist()] for b in biases],
        }

    def biases(self) -> list:
        """Of the gates of all MoE layers."""
        return [m.gate.bias for m in moe_layers(self.model).values()]

    def counted(self, rows_bs):
        """The predicted tokens of rows that a loss counts."""
        return rows_bs[:, 1:]

    def nll(self, rows_bs) -> float:
        """Σ −log p of the tokens of rows of T + 1, in nats."""
        h_n = self.model.hidden_states(rows_bs[:, :-1])[0].flatten(0, 1)
        return linear_cross_entropy(h_n, self.model.head.weight, rows_bs[:, 1:].flatten()).item()

    @torch.no_grad()
    def evaluate(self, name: str, batches: int | None = None) -> tuple[float, float]:
        """Held-out documents of a source: nats a token, bits a byte."""
        nll = n_bytes = n_tokens = 0
        for window_bs in self.val[name][:batches]:
            with self.arithmetic():
                nll += self.nll(window_bs.to(self.device))
            counted = self.counted(window_bs)
            n_bytes += self.bytes[counted].sum().item()
            n_tokens += counted.numel()
        return nll / n_tokens, nll / math.log(2) / max(1, n_bytes)

    def validate(self, row: dict) -> None:
        """Add to a row how well the first source is predicted, by all its windows at the end."""
        batches = None if self.step == len(self.plan) else -(-self.args.val_sequences // VAL_BATCH)
        row["val_loss"], row["val_bpb"] = self.evaluate(self.names[0], batches)
        if not math.isfinite(row["val_loss"]):
            self.give_up("validation loss", row["val_loss"])
        if self.ema:
            with self.ema.swapped_in():
                row["val_loss_ema"] = known(self.evaluate(self.names[0], batches)[0])

    def train(self) -> Iterator[dict]:
        """All remaining steps: a row each, with validation and a checkpoint every `save_every`.

        A signal ends it after a step, with a checkpoint that is not validated: later rows, and
        what a rollback goes back to, are then those of a run that was not disturbed.
        """
        every = self.args.save_every or max(1, len(self.plan) // 10)
        while self.step < len(self.plan):
            if self.spike_guard.should_roll_back:
                self.roll_back()
            row = self.one_step()
            due = self.step == len(self.plan) or self.step % every == 0
            if due:
                self.validate(row)
            yield row  # written before the checkpoint that follows it
            leave = self.leaves()
            if due or leave:
                self.save(row["val_loss"])
            if leave:
                return

    def leaves(self) -> bool:
        """Whether a signal asks for an early end."""
        return bool(self.asked)

    def save(self, val_loss: float | None) -> None:
        """A checkpoint of all that a run is."""
        resume.save(self, val_loss)

    def load(self, folder: Path, data: bool = True) -> None:
        """The reverse of `save`."""
        resume.restore_from(self, folder, data)

    def restore(self) -> None:
        """To the newest checkpoint, if there is one."""
        resume.restore(self)

    def rollback_point(self) -> Path | None:
        """The newest good checkpoint."""
        return resume.rollback_point(self.folder)

    def go_back(self, to: Path) -> None:
        """To a checkpoint, in everything but the data."""
        resume.drop_after(self.folder, to)
        seconds = self.seconds
        resume.read(self, to, data=False)
        self.seconds, self.spike_guard.last_rollback = seconds, self.step

    def samples(self) -> list[dict]:
        """Continuations of the first words of held-out documents."""
        out, generator = [], torch.Generator(self.device).manual_seed(self.args.seed)
        bos, decode = self.tokenizer.token_to_id(BOS), self.tokenizer.decode
        for text in [text for source in self.sources for text in source.val_texts[:2]]:
            ids = [bos, *self.tokenizer.encode(text[:2000], add_special_tokens=False).ids[:12]]
            room = max(0, min(160, self.args.model.max_seq_len - len(ids)))
            prompt_bs = torch.tensor([ids], device=self.device)
            new = generate(self.model, prompt_bs, room, 0.8, generator)[0, len(ids) :]
            out.append({"prompt": decode(ids), "text": decode(new.tolist()), "temperature": 0.8})
        return out

    def baselines(self) -> dict[str, float]:
        """gzip, bzip2 and single tokens on the held-out text of the first source."""
        from dsv3_ref.training.report import baselines  # draws: half a second to import

        def encode(texts):
            coded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [i for e in coded for i in e.ids]

        first = self.sources[0]
        seen = Counter(encode(sample_texts([first])))
        counts = [seen[i] for i in range(vocab_size(self.tokenizer))]
        return baselines("".join(first.val_texts), counts, encode(first.val_texts))

    def other_sources(self) -> dict[str, float]:
        """Bits a byte of held-out documents of all sources but the first."""
        return {name: self.evaluate(name, 16)[1] for name in self.names[1:]}

    def goal(self) -> str:
        """What will be trained on."""
        tokens = sum(self.plan) * self.args.recipe.seq_len
        return f"{tokens:,} tokens of {' and '.join(self.names)}"

    def verdict(self, row: dict) -> str:
        """The result in a sentence."""
        return f"{row['val_bpb']:.3f} bits per byte on unseen {self.names[0]} documents"

    def summary(self, row: dict) -> dict:
        """What summary.json holds."""
        return {
            "val_loss": row["val_loss"],
            "val_bpb": row["val_bpb"],
            "val_bpb_by_source": {self.names[0]: row["val_bpb"]} | self.other_sources(),
            "baselines": self.baselines(),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "samples": self.samples(),
        }


def known(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return torch.device(name)


@contextmanager
def tensorboard(args: TrainConfig, folder: Path, step: int):
    """A function that logs a row, or one that does nothing; rows after `step` are hidden."""
    if not args.tensorboard:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs: pip install 'dsv3-ref[tensorboard]'") from None
    with SummaryWriter(folder / "tensorboard", purge_step=step + 1) as writer:

        def log(row):
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, row["step"])
            for k, value in enumerate(row["mtp_loss"], 1):
                if value is not None:
                    writer.add_scalar(f"mtp_loss/{k}", value, row["step"])

        yield log


# ── From start to report ──


def run(args: TrainConfig, command: str | None = None, make=Trainer) -> Path:
    """Train (or go on training) and write the report; returns the folder of the run."""
    settings.validate_args(args)
    tune_malloc()
    with settings.lock_run_dir(args) as folder, catch_signals() as asked:
        try:
            trainer = start(args, folder, command, make)
            trainer.asked = asked
            work(trainer)
        except OSError as e:
            raise UserError(f"could not go on: {e}. {resume.last_good(folder)}") from e
        except (KeyboardInterrupt, SystemExit):
            print(f"\nstopped; go on with: dsv3 {args.COMMAND} --resume --out {folder}",
                  file=sys.stderr)  # fmt: skip
            raise
    return folder


def start(args: TrainConfig, folder: Path, command: str | None, make) -> Trainer:
    """A trainer at step 0 or at its newest checkpoint; a mistake leaves no new run behind."""
    if not args.resume:
        write_json(folder / "run.json", settings.describe_run(args, command))
    try:
        trainer = make(args, folder)
    except UserError:
        if not args.resume:
            (folder / "run.json").unlink()
        raise
    trainer.restore()
    save_tokenizer(trainer.tokenizer, folder / "tokenizer.json")
    return trainer


def work(trainer: Trainer) -> None:
    """Steps, rows, checkpoints, and at the end the report."""
    say_start(trainer)
    row, folder = None, trainer.folder
    bar = tqdm(total=len(trainer.plan), initial=trainer.step, unit="step", smoothing=0.05)
    metrics = resume.MetricsWriter(folder / "metrics.jsonl", trainer.step)
    with bar, metrics, tensorboard(trainer.args, folder, trainer.step) as log:
        for row in trainer.train():
            metrics.write(row)
            log(row)
            what = f"skipped: {row['skipped']}" if row["skipped"] else f"loss {row['loss']:.3f}"
            bar.set_postfix_str(f"{what}, {row['tokens_per_s']:,.0f} tokens/s")
            bar.update(row["step"] - bar.n)
    if trainer.step < len(trainer.plan):
        raise SystemExit(EXIT_CODES[trainer.asked[-1]])
    finish(trainer, row or resume.last_row(folder))


def say_start(trainer: Trainer) -> None:
    """Two lines: what is trained on what, and where it goes."""
    print(
        f"{trainer.args.config}: {trainer.params / 1e6:.1f}M parameters (MTP included) "
        f"on {trainer.where}"
    )
    print(f"{len(trainer.plan)} steps, {trainer.goal()} → {trainer.folder}")
    if trainer.step:
        print(f"going on after step {trainer.step}")


def finish(trainer: Trainer, row: dict) -> None:
    """Summary, report, and the sentence that a user waits for."""
    from dsv3_ref.training.report import write_report

    write_json(trainer.folder / "summary.json", trainer.summary(row))
    report = write_report(trainer.folder)
    print(f"{trainer.verdict(row)}; open {report}")
