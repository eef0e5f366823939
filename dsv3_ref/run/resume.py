"""What makes a run survive `kill -9`: whole checkpoints, and a metrics file that fits them."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv3_ref.config import UserError
from dsv3_ref.run import checkpoint


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def last_good(run: Path) -> str:
    """A sentence that says where the newest checkpoint is."""
    found = folders(run)
    return (
        f"The last good checkpoint is {found[-1]}." if found else "No checkpoint was written yet."
    )


# ── Saving ──


def save(trainer, val_loss: float) -> None:
    """Write model, optimizer, data position and random state as one directory; drop old ones."""
    data, tensors = trainer.rows.state()
    state = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "val_loss": val_loss,
        "data": data,
    }
    tensors = {f"data.{k}": v for k, v in tensors.items()}
    tensors |= optimizer_tensors(trainer.optimizer) | random_tensors()
    with checkpoint.replacing(trainer.folder / "checkpoints" / f"step_{trainer.step:07}") as tmp:
        checkpoint.write(
            tmp, asdict(trainer.args.model), trainer.model.state_dict(), checkpoint.SHARD
        )
        save_file(tensors, tmp / "training.safetensors")
        (tmp / "state.json").write_text(json.dumps(state))
    prune(trainer.folder, trainer.args.keep)


def prune(run: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints and the one with the lowest validation loss."""
    found = folders(run)
    best = min(found, key=lambda f: state_of(f)["val_loss"])
    for folder in found[: -max(1, keep)]:
        if folder != best:
            checkpoint.remove(folder)


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
    found = folders(trainer.folder)
    if not found:
        return  # killed before the first checkpoint: start again from step 0
    folder = found[-1]
    state, tensors = state_of(folder), load_file(folder / "training.safetensors")
    trainer.model.load_state_dict(checkpoint.load(folder).state_dict())
    restore_optimizer(trainer.optimizer, part(tensors, "optimizer."))
    trainer.rows.restore(state["data"], part(tensors, "data."))
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


class Metrics:
    """metrics.jsonl, one row a step; rows after the checkpoint that a run resumes from are cut."""

    def __init__(self, path: Path, step: int):
        self.path = path
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        keep = b"".join(rows[:step])
        if len(rows) < step:
            raise UserError(f"{path} has {len(rows)} rows, the checkpoint is of step {step}")
        part = path.with_suffix(".part")
        part.write_bytes(keep)
        part.replace(path)

    def __enter__(self):
        self.file = self.path.open("a")
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def last_row(run: Path) -> dict:
    """The last row of a run that is already finished."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
