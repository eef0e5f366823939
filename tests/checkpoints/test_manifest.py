"""Manifests: every changed byte is found, and the newest whole checkpoint is loaded."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import randomize

from dsv3_ref.checkpoints import manifest
from dsv3_ref.checkpoints.manifest import DamageError, verified, verify, write_manifest
from dsv3_ref.checkpoints.native import load, load_into, save
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer


@pytest.fixture
def model(micro):
    return randomize(Transformer(micro))


@pytest.fixture
def run(model, tmp_path):
    """A run with checkpoints of steps 1 to 3, whose weights differ."""
    for step in (1, 2, 3):
        with torch.no_grad():
            model.head.weight[0, 0] = step
        save(model, tmp_path / "run" / "checkpoints" / f"step_{step:07}")
    return tmp_path / "run"


def flip_bit(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at // 8 % len(content)] ^= 1 << at % 8
    path.write_bytes(content)


def step_of(run, step: int):
    return run / "checkpoints" / f"step_{step:07}"


@given(at=st.integers(0, 10**7), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_every_flipped_bit_is_found(tmp_path_factory, micro, at, name):
    folder = tmp_path_factory.mktemp("flip") / "model"
    save(Transformer(micro), folder)
    flip_bit(folder / name, at)
    with pytest.raises(DamageError, match=f"{name} is damaged"):
        load(folder)
    shutil.rmtree(folder.parent)


def test_a_flipped_bit_changes_the_weights_without_verification(run):
    folder = step_of(run, 3)
    before = load(folder)
    flip_bit(folder / "model.safetensors", 8 * (folder / "model.safetensors").stat().st_size - 9)
    after = load(folder, verify=False).state_dict()
    assert any(not torch.equal(x, after[name]) for name, x in before.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_sizes_are_compared(run, damage):
    path = step_of(run, 1) / "model.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    words = "it is missing" if damage == "missing" else f"not {len(content):,}"
    with pytest.raises(DamageError, match=words):
        load(step_of(run, 1))


def test_of_a_run_the_newest_whole_checkpoint_is_loaded(run, micro):
    flip_bit(step_of(run, 3) / "model.safetensors", 80_000)
    with pytest.warns(UserWarning, match="step_0000003.*An earlier checkpoint is loaded instead"):
        assert load(run).head.weight[0, 0] == 2
    target = Transformer(micro)
    with pytest.warns(UserWarning, match="step_0000003"):
        load_into(target, run)
    assert target.head.weight[0, 0] == 2
    for step in (1, 2):
        flip_bit(step_of(run, step) / "model.safetensors", 80_000)
    with pytest.warns(UserWarning), pytest.raises(DamageError, match="step_0000001"):
        load(run)
    assert load(run, verify=False).head.weight[0, 0] == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1}', '{"format": 1, "files": [1]}',
     '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
     '{"format": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
     '{"format": 1, "files": {"config.json": {"bytes": "1", "sha256": ""}}}',
     '{"format": 1, "files": {"config.json": {}}}'],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_damage(run, text):
    (step_of(run, 1) / "manifest.json").write_text(text)
    with pytest.raises(DamageError, match="manifest.json cannot be read"):
        load(step_of(run, 1))


def test_damage_explains_other_errors(run):
    """The body's own error would blame the config."""
    (step_of(run, 1) / "config.json").write_text("{")
    with pytest.raises(DamageError, match="config.json is damaged"):
        load(step_of(run, 1))
    with pytest.raises(UserError, match="the body's"), verified(step_of(run, 2)):
        raise UserError("the body's")


def test_ranks_share_the_work(run, monkeypatch):
    hashed = []
    monkeypatch.setattr(manifest, "read_digest", lambda path: hashed.append(path.name))
    names = sorted(json.loads((step_of(run, 1) / "manifest.json").read_text())["files"])
    for rank in range(2):
        with pytest.raises(DamageError):
            verify(step_of(run, 1), rank, 2)
    assert sorted(hashed) == names
    verify(step_of(run, 1), 5, 7)  # nothing to do


def test_a_manifest_names_versions_and_what_it_is_given(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    write_manifest(tmp_path, {"mesh": {"pp": 2}})
    value = json.loads((tmp_path / "manifest.json").read_text())
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert value["files"] == {"sub/a": {"bytes": 3, "sha256": sha256}}
    assert value["versions"]["torch"] == version("torch") and value["mesh"] == {"pp": 2}


def test_saving_over_a_directory_renews_its_manifest(run, micro):
    save(Transformer(micro), step_of(run, 1))
    verify(step_of(run, 1))
    assert "lm_head" not in load_file(step_of(run, 1) / "model.safetensors")
