"""Checkpoints of a run: written atomically, pruned to the newest and the best, resumed from."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from dsv3_ref.checkpoints import atomic
from dsv3_ref.checkpoints.layout import STATE
from dsv3_ref.checkpoints.manifest import (
    DamageError,
    first_whole,
    has_manifest,
    installed_versions,
    read_manifest,
)
from dsv3_ref.checkpoints.native import list_checkpoints, step_number
from dsv3_ref.config import UserError
from dsv3_ref.training.settings import METRICS, describe_losses, world_size

if TYPE_CHECKING:
    from dsv3_ref.training.state import Run


class Checkpointer:
    """The checkpoints of a run, `run_dir/checkpoints/step_…`."""

    def __init__(self, run: "Run"):
        self.run = run
        self.run_dir = run.run_dir
        self.strategy = run.strategy
        self.about = describe_origin(run) if self.strategy.is_main else {}

    def save(self, row: dict[str, Any], is_planned: bool, is_final: bool) -> None:
        """Flush the metrics to disk, write a checkpoint and remove old ones.

        row: the metrics of the step. A planned checkpoint has validation metrics and is ranked by
        them; one that was requested by a signal has none. is_final: wait until it is complete.
        """
        state, task = self.run.state, self.run.task
        if state.ema:
            state.ema.wait()
        values, tensors = split_tensors(state.state_dict())  # collective: every rank reads data
        if self.strategy.is_main:
            atomic.fsync_path(self.run_dir / METRICS)
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
        """Wait for the checkpoint being written, then remove old ones."""
        self.strategy.wait_for_checkpoint()
        if self.strategy.is_main and list_checkpoints(self.run_dir):
            prune(self.run_dir, self.run.config.keep_latest_k)
        self.strategy.barrier()

    def load_latest(self) -> None:
        """Load the newest undamaged checkpoint; a run killed before its first one has none.

        Raise a `UserError` if all are damaged, or if the data, the tokenizer or the settings have
        changed since.
        """
        self.strategy.broadcast(lambda: require_own_checkpoints(self.run_dir))
        if self.strategy.is_main:
            atomic.clean_temp(self.run_dir / "checkpoints")
        self.strategy.barrier()
        checkpoints = list_checkpoints(self.run_dir)
        if checkpoints:
            folder = self.find_undamaged(checkpoints)
            self.strategy.broadcast(lambda: check_same_run(self.about, folder))
            # `prune` needs them: fail now, not at the next save
            self.strategy.broadcast(lambda: monitored_values(list_checkpoints(self.run_dir)))
            self.load(folder)

    def find_undamaged(self, checkpoints: list[Path]) -> Path:
        """Return the newest undamaged checkpoint; rename the damaged ones after it."""
        if not self.run.config.verify:
            return checkpoints[-1]
        try:
            folder, damaged = first_whole(reversed(checkpoints), self.check_whole)
        except DamageError:
            raise UserError(
                f"all checkpoints of {self.run_dir} are damaged: restore one from a copy, or start "
                f"a new run from damaged weights with --init {checkpoints[-1]} --no-verify"
            ) from None
        if self.strategy.is_main:
            for path in damaged:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"set aside as {aside}; resuming from {folder}", file=sys.stderr)
        self.strategy.barrier()
        return folder

    def check_whole(self, folder: Path) -> Path:
        """Return the checkpoint; warn and raise a `DamageError` on every rank if it is damaged."""
        damage = self.strategy.find_damage(folder)
        if damage:
            if self.strategy.is_main:
                print(f"warning: {damage}", file=sys.stderr)
            raise DamageError(damage)
        return folder

    def load(self, folder: Path, with_data: bool = True) -> None:
        """Load a checkpoint; without `with_data` keep the data position."""
        state = self.run.state
        try:
            values, tensors = self.strategy.load_checkpoint(folder, state.ema)
            state.load_state_dict(join_tensors(values, tensors), with_data)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"the checkpoint {folder} cannot be loaded: {e}") from None

    def find_rollback(self) -> Path | None:
        """Return `rollback_point` of the run's directory, as the main process sees it."""
        if self.strategy.saves_async:
            self.settle()

        def find() -> list[Path]:
            folder = rollback_point(self.run_dir)
            return [folder] if folder else []

        return next(iter(self.strategy.broadcast(find)), None)

    def roll_back_to(self, folder: Path) -> None:
        """Load a checkpoint except for its data position, and remove the later ones."""
        if self.strategy.is_main:
            drop_after(self.run_dir, folder)
        self.strategy.barrier()
        state = self.run.state
        seconds = state.seconds
        self.load(folder, with_data=False)
        state.seconds, state.spike_guard.last_rollback = seconds, state.step


# ── The origin of a checkpoint ──


def describe_origin(run: "Run") -> dict[str, Any]:
    """Return the mesh and the fingerprints of settings, tokenizer and data, for the manifest."""
    config = run.config
    dp = config.dp or max(1, world_size() // (config.pp * config.ep))
    text = run.data.tokenizer.to_str()
    return {
        "mesh": {"pp": config.pp, "dp": dp, "ep": config.ep, "cp": config.cp},
        "fingerprints": {
            "settings": json.loads(json.dumps(describe_losses(config), default=str)),
            "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
            "data": list(run.data.fingerprints),
        },
    }


def check_same_run(about: dict[str, Any], folder: Path) -> bool:
    """Raise a `UserError` if a checkpoint was trained with other data, tokenizer or settings.

    Print a note if another version of torch wrote it, since results can then differ in rounding.
    Return True if there was a manifest to compare with.
    """
    if not has_manifest(folder):  # --no-verify
        return False
    manifest = read_manifest(folder)
    try:
        differences = list_differences(manifest.get("fingerprints"), about["fingerprints"])
        writer = manifest.get("versions", {}).get("torch")
    except (AttributeError, LookupError, TypeError) as e:
        raise UserError(
            f"the manifest of {folder} is damaged ({e}): restore it from a copy"
        ) from None
    if not manifest.get("fingerprints"):
        print(f"note: the manifest of {folder} has no fingerprints: its data, tokenizer and "
              "settings are not compared with those of the run")  # fmt: skip
    if differences:
        raise UserError(
            f"{folder} cannot be resumed: {'; '.join(differences[:3])}. Restore what it was "
            f"trained with, or start a new run from its weights: --init {folder}"
        )
    installed = installed_versions()["torch"]
    if writer != installed:
        print(f"note: torch {writer} wrote {folder}, {installed} resumes it; "
              "results can differ in rounding")  # fmt: skip
    return True


def list_differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Return a phrase for each difference between two fingerprints; `before` may be missing."""
    if before is None or before == now:
        return []
    return [
        *differing_settings(before["settings"], now["settings"]),
        *(["the tokenizer has changed"] * (before["tokenizer"] != now["tokenizer"])),
        *differing_data(before["data"], now["data"]),
    ]


def differing_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for each setting that differs."""
    names = [name for name in now if name not in before or before[name] != now[name]]
    return [f"{name} was {before.get(name)!r}, not {now[name]!r}" for name in names]


def differing_data(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Return a phrase for each source that differs, with the first changed documents."""
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


def describe_last(run_dir: Path) -> str:
    """Return a sentence that names the newest checkpoint."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return "No checkpoint was written yet."
    return f"The last good checkpoint is {checkpoints[-1]}."


def prune(run_dir: Path, keep_latest_k: int) -> None:
    """Keep the newest k planned checkpoints, the best of them, and the newest of all."""
    checkpoints = list_checkpoints(run_dir)
    scores = monitored_values(checkpoints)
    planned = list(scores)
    best = sorted(planned, key=scores.__getitem__)[:1]
    keep = {checkpoints[-1], *planned[-keep_latest_k:], *best}
    for folder in checkpoints:
        if folder not in keep:
            atomic.remove_dir(folder)


def monitored_values(checkpoints: list[Path]) -> dict[Path, float]:
    """Return the value by which each planned checkpoint is ranked; lower is better.

    Raise a `UserError` for a checkpoint whose state does not say whether it has one.
    """
    values: dict[Path, float] = {}
    for folder in checkpoints:
        try:
            monitored = atomic.read_json(folder / STATE)["monitored"]
            if monitored:
                values[folder] = float(monitored["value"]) * (
                    1 if monitored["mode"] == "min" else -1
                )
        except (LookupError, TypeError, ValueError, OverflowError) as e:
            raise UserError(
                f"{folder / STATE} is damaged ({e}): restore {folder} from a copy, or remove it"
            ) from None
    return values


def require_own_checkpoints(run_dir: Path) -> bool:
    """Return True; raise a `UserError` if the checkpoints of a run are a link to those of another.

    A run removes old checkpoints, and it may come from a stranger.
    """
    folder = run_dir / "checkpoints"
    home = folder.resolve().parent
    if folder.is_symlink() and (home / "run.json").exists() and not home.samefile(run_dir):
        raise UserError(
            f"{folder} is a link to the checkpoints of another run, {home}, which would be "
            "removed: resume that run, or copy them"
        )
    return True


def rollback_point(run_dir: Path) -> Path | None:
    """Return the newest planned checkpoint that does not follow a skipped step."""
    for folder in reversed(list_checkpoints(run_dir)):
        state = atomic.read_json(folder / STATE)
        if state["monitored"] and not state["spike_guard"]["consecutive_skips"]:
            return folder
    return None


def drop_after(run_dir: Path, last: Path) -> None:
    """Remove the checkpoints after `last`."""
    for folder in list_checkpoints(run_dir):
        if step_number(folder) > step_number(last):
            atomic.remove_dir(folder)


# ── A state as JSON and safetensors ──


def split_tensors(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a state into values for JSON and tensors, which are named `data.buffer`, `rng.cpu`."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part, content in state.items():
        if isinstance(content, dict):
            tensors |= {f"{part}.{k}": x for k, x in content.items() if isinstance(x, Tensor)}
            content = {k: x for k, x in content.items() if not isinstance(x, Tensor)}
        values[part] = content
    return values, tensors


def join_tensors(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state that `split_tensors` has split; tensors of other parts are ignored."""
    state = dict(values)
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part in ("data", "rng"):
            state[part] = state.get(part, {}) | {key: tensor}
    return state
