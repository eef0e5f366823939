"""Manifests: every changed byte is found, and the newest whole checkpoint is loaded."""

import json
import os
import random
import shutil
from importlib.metadata import version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from miniruns import flip_bit
from support import randomize

from dsv3_ref.checkpoints import atomic, manifest
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.manifest import DamageError, verified, verify, write_manifest
from dsv3_ref.checkpoints.native import load, load_into, save
from dsv3_ref.cli.main import main
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
    flip_bit(folder / "model.safetensors", -9)
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
    with pytest.raises(DamageError, match="step_0000003.*step_0000002.*step_0000001"):
        load(run)
    assert load(run, verify=False).head.weight[0, 0] == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1}', '{"format": 1, "files": [1]}',
     '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
     '{"format": 1, "files": {"x\\u0000": {"bytes": 1, "sha256": ""}}}',
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
    monkeypatch.setattr(manifest, "read_digest", lambda path, name: hashed.append(path.name))
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
    xxh3 = "06b05ab6733a618578af5f94892f3950"  # as `xxhsum -H2` says
    assert value["files"] == {"sub/a": {"bytes": 3, "sha256": sha256, "xxh3_128": xxh3}}
    assert value["versions"]["torch"] == version("torch") and value["mesh"] == {"pp": 2}


def test_saving_over_a_directory_renews_its_manifest(run, micro):
    save(Transformer(micro), step_of(run, 1))
    verify(step_of(run, 1))
    assert "lm_head" not in load_file(step_of(run, 1) / "model.safetensors")


def edit_entry(folder, name: str, **changes) -> None:
    """Change the entry of a file in a manifest; None removes a checksum."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    entry = value["files"][name] | changes
    value["files"][name] = {k: x for k, x in entry.items() if x is not None}
    path.write_text(json.dumps(value))


def test_loading_compares_the_fast_checksum(run, monkeypatch):
    """SHA-256 takes longer than loading; without XXH3, in an old manifest, it is compared."""
    folder, name = step_of(run, 1), "model.safetensors"
    edit_entry(folder, "config.json", sha256="0" * 64)
    load(folder)
    with pytest.raises(DamageError, match="config.json is damaged .its sha256"):
        verify(folder, by_sha256=True)
    edit_entry(folder, name, xxh3_128=None)
    load(folder)
    flip_bit(folder / name, -9)
    with pytest.raises(DamageError, match="model.safetensors is damaged .its sha256"):
        load(folder)


@pytest.mark.parametrize("size", [0, 1, manifest.HASH_BLOCK, manifest.HASH_BLOCK + 7])
def test_checksums_in_blocks_are_those_of_the_whole(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(size))
    sha256, xxh3 = manifest.file_sha256(path), manifest.file_xxh3(path)
    assert manifest.file_checksums(path) == {"sha256": sha256, "xxh3_128": xxh3}


@pytest.mark.parametrize("name", ["other.safetensors", "tensors.json"])
def test_a_file_that_is_not_in_the_manifest_is_damage(run, name):
    """Weights of another model in the same folder would be loaded in place of its own."""
    shutil.copy(step_of(run, 1) / "model.safetensors", step_of(run, 3) / name)
    with pytest.raises(DamageError, match=f"{name} is damaged .manifest.json does not list it"):
        load(step_of(run, 3))
    (step_of(run, 1) / "notes.txt").write_text("a user's notes")
    load(step_of(run, 1))


def test_a_manifest_without_entries_verifies_nothing_and_is_damage(run):
    path = step_of(run, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    with pytest.raises(DamageError, match="does not list it"):
        load(step_of(run, 1))


def test_a_checkpoint_of_a_run_must_have_a_manifest(run):
    """A directory on its own may have none, as those of Hugging Face."""
    (step_of(run, 3) / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step_0000003 has no manifest.json"):
        assert load(run).head.weight[0, 0] == 2
    assert load(step_of(run, 3)).head.weight[0, 0] == 3


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_cannot_be_read_to_its_end_is_refused(run, kind, name, has_manifest):
    """Reading a pipe waits for ever, /dev/zero fills the memory; an archive may hold links."""
    folder = step_of(run, 1)
    (folder / "notes.txt").write_text("")
    write_manifest(folder)
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    if not has_manifest:
        (folder / "manifest.json").unlink()
    if has_manifest or name != "notes.txt":
        with pytest.raises(UserError, match=name):
            load(folder)
    else:
        load(folder)


def test_json_without_end_is_refused(run, monkeypatch):
    monkeypatch.setattr(atomic, "MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match="bytes, more than 100"):
        load(step_of(run, 1))


@pytest.mark.parametrize("text", ['{"weights": "v1"}', "[]", "not JSON", "{}"])
def test_a_manifest_of_another_program_is_not_damage(model, tmp_path, text):
    """A Hugging Face directory may hold any manifest.json; one in our format is verified."""
    save_hf(model, tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").write_text(text)
    load(tmp_path / "hf")
    assert main(["check", str(tmp_path / "hf")]) == 0
    write_manifest(tmp_path / "hf")
    load(tmp_path / "hf")
    flip_bit(tmp_path / "hf" / "model.safetensors", 5000)
    with pytest.raises(DamageError, match="model.safetensors is damaged"):
        load(tmp_path / "hf")
    save(model, tmp_path / "ours")
    (tmp_path / "ours" / "manifest.json").write_text(text)
    with pytest.raises(DamageError, match="manifest.json cannot be read"):
        load(tmp_path / "ours")
