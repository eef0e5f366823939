"""What a user puts beside a run's checkpoints is neither loaded, nor resumed from, nor deleted.

Habits: a copy of the best checkpoint before an experiment, an archive for a colleague, a file
manager's "(copy)", a checkpoint moved to a larger disk with a link in its place.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import randomize

from dsv3_ref.checkpoints.atomic import clean_temp
from dsv3_ref.checkpoints.manifest import write_manifest
from dsv3_ref.checkpoints.native import (
    list_checkpoints,
    load,
    resolve_checkpoint_dir,
    save,
    step_number,
)
from dsv3_ref.model import Transformer
from dsv3_ref.training.checkpointer import drop_after, prune, rollback_point


@pytest.fixture
def run(micro, tmp_path):
    """Return a run with checkpoints after steps 2, 4, 6 and 8; the best is that of step 4."""
    for step, loss in ((2, 5.0), (4, 1.0), (6, 3.0), (8, 4.0)):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:07}"
        save(randomize(Transformer(micro)), folder)
        monitored = {"name": "val_loss", "mode": "min", "value": loss}
        state = {"monitored": monitored, "spike_guard": {"consecutive_skips": 0}}
        (folder / "state.json").write_text(json.dumps(state))
        write_manifest(folder)
    return tmp_path / "run"


def copy(name: str):
    def add(folder: Path) -> None:
        shutil.copytree(folder / "step_0000008", folder / name)

    return add


def write_archive(folder: Path) -> None:
    (folder / "step_0000009.tar").write_bytes(b"tar")


def write_file(folder: Path) -> None:
    (folder / "step_0000009").write_text("note to myself")


ADDED = {
    "a copy of the best": copy("step_0000008_best"),
    "a file manager's copy": copy("step_0000008 (copy)"),
    "a copy with a later number": copy("step_0000010.bak"),
    "another number of digits": copy("step_10"),
    "a leading zero too many": copy("step_00000009"),
    "digits of another script": copy("step_000000٩"),
    "a prefix": copy("old_step_0000009"),
    "a hidden folder": copy(".step_0000009"),
    "an archive": write_archive,
    "a file of this name": write_file,
}


@pytest.mark.parametrize("add", ADDED.values(), ids=ADDED)
def test_what_is_not_ours_is_left_alone(add, run):
    folder = run / "checkpoints"
    add(folder)
    before = {p.name for p in folder.iterdir()}
    own = [f"step_{step:07}" for step in (2, 4, 6, 8)]
    assert [p.name for p in list_checkpoints(run)] == own
    assert resolve_checkpoint_dir(run).name == rollback_point(run).name == own[-1]
    newest = load(folder / own[-1]).head.weight
    assert torch.equal(load(run).head.weight, newest)
    clean_temp(folder)
    prune(run, keep_latest_k=1)
    assert {p.name for p in folder.iterdir()} == before - {own[0], own[2]}
    drop_after(run, folder / own[1])
    assert {p.name for p in folder.iterdir()} == before - {own[0], own[2], own[3]}


def test_steps_are_ordered_by_number(run):
    folder = run / "checkpoints"
    for step in (9_999_999, 10_000_000):
        shutil.copytree(folder / "step_0000008", folder / f"step_{step:07}")
    assert [step_number(p) for p in list_checkpoints(run)][-2:] == [9_999_999, 10_000_000]
    assert resolve_checkpoint_dir(run).name == "step_10000000"


def test_rotation_removes_a_link_and_not_its_target(run, tmp_path):
    folder = run / "checkpoints"
    (folder / "step_0000002").rename(tmp_path / "moved")
    (folder / "step_0000002").symlink_to(tmp_path / "moved")
    prune(run, keep_latest_k=1)
    assert not (folder / "step_0000002").is_symlink()
    assert load(tmp_path / "moved")
