"""`dsv3 train`: from text to a checkpoint, a metrics file and a report."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.decode import generate
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.moe import max_vio
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.optim import Recipe, adamw, batch_plan, gamma_at, lr_at, mtp_weight_at
from dsv3_ref.pretrain import train_step
from dsv3_ref.run import resume
from dsv3_ref.run.data import Rows, first_texts, open_sources, tokenizer_for, val_windows
from dsv3_ref.run.report import baselines, write_report
from dsv3_ref.run.tokenizer import BOS, byte_lengths, read_tokenizer

CACHE = Path(os.environ.get("DSV3_CACHE", Path.home() / ".cache" / "dsv3_ref"))


@dataclass(frozen=True)
class Train:
    """Train a DeepSeek-V3 from text."""

    model: Config
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: str = "tiny"
    """size: tiny, small, v2_lite, v3, or a .json file with the fields of --model"""
    seed: int = 0
    out: Path | None = None
    """folder of the run; default runs/<config>, with the next free suffix"""
    resume: bool = False
    """go on from the newest checkpoint of --out, with that run's own settings"""
    data: tuple[str, ...] = ("sotu=0.85", "stdlib=0.15")
    """sources with weights: sotu, stdlib, a .txt/.jsonl/.parquet file, a folder, owner/name"""
    streaming: bool = False
    """read files as a stream instead of into memory"""
    tokenizer: Path | None = None
    """folder with a tokenizer.json; default: train one on the data, once"""
    fim_rate: float = 0.1
    """share of documents rearranged for fill-in-the-middle"""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32 on CPU; on CUDA bf16 products over fp32 weights and gradients"""
    micro_batch: int = 0
    """rows in one forward pass; 0: the whole batch"""
    save_every: int = 0
    """steps between checkpoints with validation; 0: a tenth of the run"""
    keep: int = 3
    """newest checkpoints kept, besides the best"""
    val_rows: int = 64
    """validation rows while training; at the end all are used"""
    tensorboard: bool = False
    """also write TensorBoard files (pip install 'dsv3-ref[tensorboard]')"""


# ── The folder of a run ──


def new_folder(args: Train) -> Path:
    """--out, or runs/<config>; with -2, -3 … if a run is there already."""
    base = args.out or Path("runs") / Path(args.config).stem
    names = chain([base], (base.with_name(f"{base.name}-{i}") for i in range(2, 10_000)))
    folder = next(p for p in names if not p.exists() or not any(p.iterdir()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved_settings(args: Train) -> tuple[Train, Path]:
    """The settings of the run to resume, and its folder."""
    folder = args.out or Path("runs") / Path(args.config).stem
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"nothing to resume: {folder} holds no run.json")
    s = json.loads(path.read_text())["settings"]
    s["model"], s["recipe"] = from_dict(s["model"]), Recipe(**s["recipe"])
    s["tokenizer"] = folder
    s["data"] = tuple(s["data"])
    return Train(**{**s, "out": folder, "resume": True, "device": args.device}), folder


def describe(args: Train, model: Transformer) -> dict:
    """What run.json holds: enough to repeat the run."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    settings = {f.name: getattr(args, f.name) for f in fields(args)}
    settings |= {"model": asdict(args.model), "recipe": asdict(args.recipe)}
    return {
        "command": shlex.join(["dsv3", *sys.argv[1:]]),
        "commit": done.stdout.strip() or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "moe_layers": list(moe_layers(model)),
        "model": asdict(args.model),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "params": {"trained": sum(p.numel() for p in model.parameters())},
    }


def write_json(path: Path, value) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False))
    part.replace(path)


# ── The run ──


class Trainer:
    """One run: model, optimizer and data, and where they stand."""

    def __init__(self, args: Train, folder: Path):
        self.args, self.folder, r = args, folder, args.recipe
        self.device = pick_device(args.device)
        self.sources = open_sources(args.data, args.seed, args.streaming)
        self.tokenizer = self.find_tokenizer()
        torch.manual_seed(args.seed)
        self.model = Transformer(args.model).to(self.device)
        self.optimizer = adamw(self.model, r)
        self.rows = Rows(self.sources, self.tokenizer, r.seq_len + 1, args.seed, args.fim_rate)
        self.plan = batch_plan(r, r.steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.bytes = torch.tensor(byte_lengths(self.tokenizer))
        self.val = {
            s.name: val_windows(s.val_texts(), self.tokenizer, r.seq_len) for s in self.sources
        }

    def find_tokenizer(self):
        """--tokenizer, else one trained on this data; it must fit the embedding."""
        size = self.args.model.vocab_size
        if self.args.tokenizer:
            t = read_tokenizer(self.args.tokenizer)
        else:
            t = tokenizer_for(self.sources, size, CACHE, tqdm.write)
        if t.get_vocab_size() > size:
            raise UserError(
                f"the tokenizer has {t.get_vocab_size()} tokens, the model only {size}: "
                f"raise --model.vocab-size"
            )
        return t

    @property
    def done(self) -> float:
        """Fraction of the run's tokens seen so far."""
        return sum(self.plan[: self.step]) / sum(self.plan)

    def autocast(self):
        wanted = self.args.precision
        bf16 = wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def one_step(self) -> dict:
        """Train one step; the row for metrics.jsonl."""
        r, start, done = self.args.recipe, time.perf_counter(), self.done
        tokens_bs = self.rows.take(self.plan[self.step]).to(self.device)
        lr, gamma, weight = lr_at(r, self.step, done), gamma_at(r, done), mtp_weight_at(r, done)
        micro = tokens_bs.split(self.args.micro_batch or len(tokens_bs))
        with self.autocast():
            s = train_step(self.model, self.optimizer, micro, r, lr, gamma, weight)
        self.step += 1
        if not math.isfinite(s.total) or not math.isfinite(s.grad_norm):
            raise UserError(
                f"the loss became {s.total} at step {self.step}; stopped with the weights as they were. "
                f"{resume.last_good(self.folder)} A lower --lr usually helps."
            )
        seconds = time.perf_counter() - start
        trained = tokens_bs.shape[0] * r.seq_len
        self.tokens, self.seconds = self.tokens + trained, self.seconds + seconds
        schedule = {"lr": lr, "gamma": gamma, "mtp_weight": weight, "batch": len(tokens_bs)}
        return {"step": self.step, "tokens": self.tokens, **self.row(s), **schedule} | {
            "tok_s": trained / seconds,
            "seconds": self.seconds,
        }

    def row(self, s) -> dict:
        """The measured part of a metrics row."""
        share_le = s.load_le / s.load_le.sum(-1, keepdim=True)
        biases = [m.gate.bias for m in moe_layers(self.model).values()]
        return {
            "loss": s.loss,
            "loss_total": s.total,
            "mtp_loss": s.mtp,
            "val_loss": None,
            "val_bpb": None,
            "grad_norm": s.grad_norm,
            "load": [[round(x, 5) for x in row] for row in share_le.tolist()],
            "max_vio": [round(max_vio(load_e), 4) for load_e in s.load_le],
            "bias": [[] if b is None else [round(x, 5) for x in b.tolist()] for b in biases],
        }

    @torch.no_grad()
    def evaluate(self, name: str, most: int | None = None) -> tuple[float, float]:
        """Held-out documents of a source: nats a token, bits a byte."""
        nll = n_bytes = n_tokens = 0
        for window_bs in self.val[name][:most].split(8):
            x_bs, y_bs = window_bs[:, :-1].to(self.device), window_bs[:, 1:].to(self.device)
            with self.autocast():
                h_bsd, _ = self.model.features(x_bs)
                nll += linear_cross_entropy(
                    h_bsd.flatten(0, 1), self.model.head.weight, y_bs.flatten()
                ).item()
            n_bytes += self.bytes[window_bs[:, 1:]].sum().item()
            n_tokens += y_bs.numel()
        return nll / n_tokens, nll / math.log(2) / max(1, n_bytes)

    def train(self) -> Iterator[dict]:
        """All remaining steps: a row each, with validation and a checkpoint every `save_every`."""
        every = self.args.save_every or max(1, len(self.plan) // 10)
        while self.step < len(self.plan):
            row = self.one_step()
            last = self.step == len(self.plan)
            save = last or self.step % every == 0
            if save:
                row["val_loss"], row["val_bpb"] = self.evaluate(
                    self.sources[0].name, None if last else self.args.val_rows
                )
            yield row  # on disk before the checkpoint that follows it
            if save:
                resume.save(self, row["val_loss"])

    def samples(self) -> list[dict]:
        """Continuations of the first words of held-out documents."""
        out, generator = [], torch.Generator(self.device).manual_seed(self.args.seed)
        bos = self.tokenizer.token_to_id(BOS)
        for source in self.sources:
            for text in source.val_texts()[:2]:
                ids = [bos, *self.tokenizer.encode(text[:2000], add_special_tokens=False).ids[:12]]
                room = min(160, self.args.model.max_seq_len - len(ids))
                prompt_bs = torch.tensor([ids], device=self.device)
                new = generate(self.model, prompt_bs, room, 0.8, generator)[0, len(ids) :]
                prompt = self.tokenizer.decode(ids)
                out.append(
                    {
                        "prompt": prompt,
                        "text": self.tokenizer.decode(new.tolist()),
                        "temperature": 0.8,
                    }
                )
        return out

    def baselines(self) -> dict[str, float]:
        """gzip, bzip2 and single tokens on the held-out text of the first source."""
        first, encode = self.sources[0], self.tokenizer.encode_batch_fast
        seen = Counter()
        for e in encode(first_texts([first]), add_special_tokens=False):
            seen.update(e.ids)
        text = "".join(first.val_texts())
        counts = [seen[i] for i in range(self.tokenizer.get_vocab_size())]
        return baselines(text, counts, encode([text], add_special_tokens=False)[0].ids)

    def summary(self, row: dict) -> dict:
        """What summary.json holds."""
        return {
            "val_loss": row["val_loss"],
            "val_bpb": row["val_bpb"],
            "val_bpb_by_source": {s.name: self.evaluate(s.name)[1] for s in self.sources},
            "baselines": self.baselines(),
            "seconds": self.seconds,
            "tokens": self.tokens,
            "samples": self.samples(),
        }


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None


@contextmanager
def tensorboard(args: Train, folder: Path):
    """A function that logs a row, or one that does nothing."""
    if not args.tensorboard:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs: pip install 'dsv3-ref[tensorboard]'") from None
    with SummaryWriter(folder / "tensorboard") as writer:

        def log(row):
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, row["step"])
            for k, value in enumerate(row["mtp_loss"], 1):
                writer.add_scalar(f"mtp_loss/{k}", value, row["step"])

        yield log


def run(args: Train) -> Path:
    """Train (or go on training) and write the report; returns the folder of the run."""
    if args.resume:
        args, folder = saved_settings(args)
    else:
        folder = new_folder(args)
    trainer = Trainer(args, folder)
    if args.resume:
        resume.restore(trainer)
    else:
        trainer.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "run.json", describe(args, trainer.model))
    say_start(trainer)
    row = None
    bar = tqdm(total=len(trainer.plan), initial=trainer.step, unit="step", smoothing=0.05)
    metrics = resume.Metrics(folder / "metrics.jsonl", trainer.step)
    with bar, metrics, tensorboard(args, folder) as log:
        for row in trainer.train():
            metrics.write(row)
            log(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tok_s']:,.0f} tokens/s")
            bar.update()
    finish(trainer, row or resume.last_row(folder))
    return folder


def say_start(trainer: Trainer) -> None:
    """Two lines: what is trained on what, and where it goes."""
    n = sum(p.numel() for p in trainer.model.parameters())
    names = " and ".join(s.name for s in trainer.sources)
    tokens = sum(trainer.plan) * trainer.args.recipe.seq_len
    print(f"{trainer.args.config}: {n / 1e6:.1f}M parameters (MTP included) on {trainer.device}")
    print(f"{len(trainer.plan)} steps, {tokens:,} tokens of {names} → {trainer.folder}")


def finish(trainer: Trainer, row: dict) -> None:
    """Summary, report, and the sentence that a user waits for."""
    write_json(trainer.folder / "summary.json", trainer.summary(row))
    report = write_report(trainer.folder)
    bits = f"{row['val_bpb']:.3f} bits per byte"
    print(f"{bits} on unseen {trainer.sources[0].name} documents; open {report}")


def main(argv: list[str] | None = None) -> int:
    from dsv3_ref.run.cli import main as dsv3

    return dsv3(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
