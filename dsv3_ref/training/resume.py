"""What makes a run survive `kill -9`: whole checkpoints, and a metrics file that fits them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.checkpoints.layout import STATE, TENSORS
from dsv3_ref.config import UserError


def last_good(run: Path) -> str:
    """A sentence that says where the newest checkpoint is."""
    found = native.list_checkpoints(run)
    return (
        f"The last good checkpoint is {found[-1]}." if found else "No checkpoint was written yet."
    )


# ── Saving ──


def save(trainer, val_loss: float | None) -> None:
    """Write all that a run is as one directory, its rows on disk before it; drop old ones."""
    atomic.fsync_path(trainer.folder / "metrics.jsonl")
    state, tensors = train_state(trainer, val_loss)
    tensors |= optimizer_tensors(trainer.optimizer)
    tensors |= trainer.ema.state_dict() if trainer.ema else {}
    config, weights = asdict(trainer.args.model), trainer.model.state_dict()
    try:
        folder = trainer.folder / "checkpoints" / f"step_{trainer.step:07}"
        with atomic.atomic_dir(folder) as tmp:
            native.write_safetensors(tmp, config, weights, native.SHARD_BYTES)
            save_file(tensors, tmp / TENSORS)
            (tmp / STATE).write_text(json.dumps(state))
    except UserError as e:
        raise UserError(f"{e}. {last_good(trainer.folder)}") from e
    prune(trainer.folder, trainer.args.keep_latest_k)


def train_state(trainer, val_loss: float | None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Where a run stands, but for the model: values for JSON, and tensors."""
    data, tensors = trainer.rows.state_dict()
    state = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "val_loss": val_loss,  # None: a signal asked for this checkpoint, the plan did not
        "spike_guard": trainer.spike_guard.state_dict(),
        "data": data,
    }
    return state, {f"data.{k}": v for k, v in tensors.items()} | random_tensors()


def prune(run: Path, keep: int) -> None:
    """Keep the newest `keep` planned checkpoints, the best of them, and whatever is newest."""
    found = native.list_checkpoints(run)
    loss = {folder: atomic.read_json(folder / STATE)["val_loss"] for folder in found}
    planned = [folder for folder in found if loss[folder] is not None]
    kept = {found[-1], *planned[-keep:], *sorted(planned, key=loss.get)[:1]}
    for folder in found:
        if folder not in kept:
            atomic.remove_dir(folder)


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts as `optimizer.<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": v.cpu() for i, s in state.items() for k, v in s.items()}


def random_tensors() -> dict[str, torch.Tensor]:
    """States of torch's random generators."""
    out = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        out["rng.cuda"] = torch.cuda.get_rng_state()
    return out


# ── Going on ──


def restore(trainer) -> None:
    """Put a freshly built trainer where the newest checkpoint of its folder was taken."""
    atomic.clean_temp(trainer.folder / "checkpoints")
    if found := native.list_checkpoints(trainer.folder):  # else it was killed before the first one
        read(trainer, found[-1])


def read(trainer, folder: Path, data: bool = True) -> None:
    """`restore_from`, but a damaged checkpoint is a user's business."""
    try:
        trainer.load(folder, data)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as e:
        earlier = [
            f
            for f in native.list_checkpoints(trainer.folder)
            if step_number(f) < step_number(folder)
        ]
        raise UserError(
            f"the checkpoint {folder} is damaged ({e}): delete it, and --resume "
            f"goes on from step {step_number(earlier[-1]) if earlier else 0}"
        ) from None


def step_number(folder: Path) -> int:
    """`step_0000012` → 12."""
    return int(folder.name.removeprefix("step_"))


def rollback_point(run: Path) -> Path | None:
    """The newest planned checkpoint that was not taken among skipped steps."""
    for folder in reversed(native.list_checkpoints(run)):
        state = atomic.read_json(folder / STATE)
        if state["val_loss"] is not None and not state["spike_guard"]["consecutive_skips"]:
            return folder
    return None


def drop_after(run: Path, to: Path) -> None:
    """Remove the checkpoints after the one that a run goes back to."""
    for folder in native.list_checkpoints(run):
        if step_number(folder) > step_number(to):
            atomic.remove_dir(folder)


def restore_from(trainer, folder: Path, data: bool = True) -> None:
    """The reverse of `save`."""
    state, tensors = atomic.read_json(folder / STATE), load_file(folder / TENSORS)
    if trainer.ema:
        trainer.ema.wait()  # it reads the weights
    trainer.model.load_state_dict(native.load(folder).state_dict())
    restore_optimizer(trainer.optimizer, part(tensors, "optimizer."))
    if trainer.ema:
        trainer.ema.load_state_dict(tensors)
    load_train_state(trainer, state, tensors, data)


def load_train_state(trainer, state: dict, tensors: dict, data: bool) -> None:
    """The reverse of `train_state`."""
    trainer.spike_guard.load_state_dict(state["spike_guard"])
    if data and trainer.rows:
        trainer.rows.load_state_dict(state["data"], part(tensors, "data."))
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    trainer.step, trainer.tokens, trainer.seconds = (
        state[k] for k in ("step", "tokens", "seconds")
    )


def part(tensors: dict, prefix: str) -> dict:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The reverse of `optimizer_tensors`."""
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        i, key = name.split(".")
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


# ── Metrics ──


class MetricsWriter:
    """metrics.jsonl, one row a step; rows after the checkpoint that a run resumes from are cut."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if step and not is_row(lines[step - 1 : step], step):
            raise UserError(
                f"{path} is damaged: it lacks the row of step {step}, where the newest checkpoint "
                "is. Put a whole copy back, or delete the checkpoints after its last whole row"
            )
        self.cut(lines, step)

    def cut(self, lines: list[bytes], step: int) -> None:
        """Keep the rows up to a step."""
        part, self.step = self.path.with_suffix(".part"), step
        part.write_bytes(b"".join(lines[:step]))
        atomic.fsync_path(part)
        part.replace(self.path)

    def __enter__(self):
        self.file = self.path.open("a")
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, row: dict) -> None:
        """Add a row; after a rollback it takes the place of those that were given up."""
        if row["step"] <= self.step:
            self.file.close()
            self.cut(self.path.read_bytes().splitlines(keepends=True), row["step"] - 1)
            self.file = self.path.open("a")
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.step = row["step"]


def is_row(lines: list[bytes], step: int) -> bool:
    """Whether this is the whole row of a step."""
    try:
        return bool(lines) and lines[0].endswith(b"\n") and json.loads(lines[0])["step"] == step
    except (ValueError, LookupError, TypeError):
        return False


def last_row(run: Path) -> dict:
    """The last row of a run that is already finished."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
