"""Checkpoints of a run: written whole, the newest and the best kept, read by --resume."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safetensors import SafetensorError

from dsv3_ref.checkpoints import atomic
from dsv3_ref.checkpoints.layout import STATE
from dsv3_ref.checkpoints.manifest import has_manifest, read_manifest
from dsv3_ref.checkpoints.native import list_checkpoints
from dsv3_ref.config import UserError
from dsv3_ref.training.settings import describe_losses

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run


class Checkpointer:
    """Saves and loads the checkpoints of a run, `run_dir/checkpoints/step_…`."""

    def __init__(self, run: "Run"):
        self.run, self.run_dir, self.strategy = run, run.run_dir, run.strategy
        self.about = describe(run) if self.strategy.is_main else {}

    def save(self, row: dict, is_planned: bool, is_final: bool) -> None:
        """Write all that a run is, its metrics on disk before it, and drop old checkpoints.

        row: the metrics of the step, with those of validation if the checkpoint is planned. One
        that a signal asked for is not, and is not ranked. is_final: wait until it is complete.
        """
        state, task = self.run.state, self.run.task
        if state.ema:
            state.ema.wait()
        values, tensors = {}, {}
        if self.strategy.is_main:
            atomic.fsync_path(self.run_dir / "metrics.jsonl")
            values, tensors = state.state_dict()
            monitored = {"name": task.monitor, "mode": task.monitor_mode}
            values["monitored"] = None
            if is_planned:
                values["monitored"] = monitored | {"value": row[task.monitor]}
        if self.strategy.saves_async:
            self.settle()
        folder = self.run_dir / "checkpoints" / f"step_{state.step:07}"
        try:
            self.strategy.save_checkpoint(folder, values, tensors, state.ema, self.about)
        except UserError as e:
            raise UserError(f"{e}. {describe_last(self.run_dir)}") from e
        if is_final or not self.strategy.saves_async:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint being written, then drop old ones."""
        self.strategy.wait_for_checkpoint()
        if self.strategy.is_main and list_checkpoints(self.run_dir):
            prune(self.run_dir, self.run.config.keep_latest_k)
        self.strategy.barrier()

    def load_latest(self) -> None:
        """Continue from the newest checkpoint that is whole, if there is any checkpoint.

        Raise a `UserError` if none is whole, or if the run's data, tokenizer or settings are not
        those that it was trained with.
        """
        if self.strategy.is_main:
            atomic.clean_temp(self.run_dir / "checkpoints")
        self.strategy.barrier()
        checkpoints = list_checkpoints(self.run_dir)
        if checkpoints:  # else it was killed before the first
            folder = self.newest_whole(checkpoints)
            self.strategy.broadcast(lambda: check_same_run(self.about, folder) or True)
            self.load(folder)

    def newest_whole(self, checkpoints: list[Path]) -> Path:
        """Return the newest checkpoint without damage; set damaged ones after it aside."""
        if not self.run.config.verify:
            return checkpoints[-1]
        damaged: list[Path] = []
        for folder in reversed(checkpoints):
            damage = self.strategy.find_damage(folder)
            if damage is None:
                break
            if self.strategy.is_main:
                print(f"warning: {damage}", file=sys.stderr)
            damaged.append(folder)
        else:
            raise UserError(
                f"no checkpoint of {self.run_dir} is whole. Copy one back; or start a new run from "
                f"the weights of a damaged one: --init {checkpoints[-1]} --no-verify"
            )
        if self.strategy.is_main:
            for path in damaged:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"set aside as {aside}; resuming from {folder}", file=sys.stderr)
        self.strategy.barrier()
        return folder

    def load(self, folder: Path, data: bool = True) -> None:
        """Load a checkpoint; without `data` the data position stays."""
        state = self.run.state
        try:
            values, tensors = self.strategy.load_checkpoint(folder, state.ema)
            state.load_state_dict(values, tensors, data)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"the checkpoint {folder} cannot be loaded: {e}") from None

    def find_rollback(self) -> Path | None:
        """Return the newest planned checkpoint that was not taken among skipped steps."""
        if self.strategy.saves_async:
            self.settle()
        return self.strategy.broadcast(lambda: (rollback_point(self.run_dir),))[0]

    def roll_back_to(self, folder: Path) -> None:
        """Load a checkpoint in everything but the data, and drop the later ones."""
        if self.strategy.is_main:
            drop_after(self.run_dir, folder)
        self.strategy.barrier()
        state = self.run.state
        seconds = state.seconds
        self.load(folder, data=False)
        state.seconds, state.spike_guard.last_rollback = seconds, state.step


# ── What a checkpoint belongs to ──


def describe(run: "Run") -> dict[str, Any]:
    """Return what the manifest says of a run: its mesh and the fingerprints of what shaped it."""
    config, tokenizer = run.config, run.data.tokenizer
    text = tokenizer.to_str() if tokenizer else ""
    return {
        "mesh": {"pp": config.pp, "dp": config.dp, "ep": config.ep},
        "fingerprints": {
            "settings": json.loads(json.dumps(describe_losses(config), default=str)),
            "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
            "data": list(run.data.fingerprints),
        },
    }


def check_same_run(about: dict[str, Any], folder: Path) -> None:
    """Raise a `UserError` if a checkpoint was trained with other data, tokenizer or settings.

    Print a note if another torch wrote it: results can then differ in rounding.
    """
    if not has_manifest(folder):  # --no-verify
        return
    manifest = read_manifest(folder)
    before, now = manifest.get("fingerprints"), about["fingerprints"]
    if before is None or before == now:
        differences = []
    else:
        differences = [
            *differing_settings(before["settings"], now["settings"]),
            *(["the tokenizer has changed"] * (before["tokenizer"] != now["tokenizer"])),
            *differing_data(before["data"], now["data"]),
        ]
    if differences:
        raise UserError(
            f"{folder} cannot be resumed: {'; '.join(differences[:3])}. Restore what it was trained "
            f"with, or start a new run from its weights: --init {folder}"
        )
    wrote = manifest.get("versions", {}).get("torch")
    if wrote != torch.__version__:
        print(f"note: torch {wrote} wrote {folder}, {torch.__version__} resumes it; "
              "results can differ in rounding")  # fmt: skip


def differing_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for each setting that differs."""
    names = [name for name in now if name not in before or before[name] != now[name]]
    return [f"{name} was {before.get(name)!r}, not {now[name]!r}" for name in names]


def differing_data(before: list[dict], now: list[dict]) -> list[str]:
    """Return a phrase for each source that differs, with the first documents that do."""
    if [s["name"] for s in before] != [s["name"] for s in now]:
        names = [", ".join(s["name"] for s in sources) for sources in (before, now)]
        return [f"its sources were {names[0]}, not {names[1]}"]
    phrases = []
    for old, new in zip(before, now):
        if old == new:
            continue
        if old.get("documents") != new.get("documents"):
            phrases.append(
                f"the data {new['name']} had {old.get('documents')} documents, not "
                f"{new.get('documents')}"
            )
            continue
        size, blocks = new.get("block", 0), zip(old.get("blocks", ()), new.get("blocks", ()))
        changed = [i for i, (a, b) in enumerate(blocks) if a != b]
        where = f": documents from {changed[0] * size} on" if changed else ""
        phrases.append(f"the data {new['name']} has changed{where}")
    return phrases


def step_number(folder: Path) -> int:
    """Return the step of a checkpoint: `step_0000012` → 12."""
    return int(folder.name.removeprefix("step_"))


def describe_last(run_dir: Path) -> str:
    """Return a sentence that says where the newest checkpoint is."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return "No checkpoint was written yet."
    return f"The last good checkpoint is {checkpoints[-1]}."


def prune(run_dir: Path, keep_latest_k: int) -> None:
    """Keep the newest k planned checkpoints, the best of them, and whatever is newest."""
    checkpoints, scores = list_checkpoints(run_dir), {}
    for folder in checkpoints:
        monitored = atomic.read_json(folder / STATE)["monitored"]
        if monitored:
            sign = 1 if monitored["mode"] == "min" else -1
            scores[folder] = sign * monitored["value"]
    planned = list(scores)
    best = sorted(planned, key=scores.__getitem__)[:1]
    keep = {checkpoints[-1], *planned[-keep_latest_k:], *best}
    for folder in checkpoints:
        if folder not in keep:
            atomic.remove_dir(folder)


def rollback_point(run_dir: Path) -> Path | None:
    """Return the newest planned checkpoint that was not taken among skipped steps."""
    for folder in reversed(list_checkpoints(run_dir)):
        state = atomic.read_json(folder / STATE)
        if state["monitored"] and not state["spike_guard"]["consecutive_skips"]:
            return folder
    return None


def drop_after(run_dir: Path, last: Path) -> None:
    """Remove the checkpoints after the one that a run goes back to."""
    for folder in list_checkpoints(run_dir):
        if step_number(folder) > step_number(last):
            atomic.remove_dir(folder)
