"""`dsv3 check`: what is whole is said so, and every kind of damage is named."""

import json
import shutil

import pytest
from miniruns import flip_bit
from safetensors.torch import load_file, save_file
from support import randomize

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import save
from dsv3_ref.cli import main
from dsv3_ref.data import prepare
from dsv3_ref.model import Transformer


@pytest.fixture
def model(micro):
    return randomize(Transformer(micro))


def check(folder, capsys) -> tuple[int, str]:
    code = main.main(["check", str(folder)])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_run(model, tmp_path, capsys):
    for step in (1, 2):
        save(model, tmp_path / "run" / "checkpoints" / f"step_{step:07}")
    code, said = check(tmp_path / "run", capsys)
    assert code == 0 and said.count("is whole") == 2
    flip_bit(tmp_path / "run/checkpoints/step_0000001/model.safetensors", -8)
    code, said = check(tmp_path / "run", capsys)
    assert code == 2 and "step_0000001/model.safetensors is damaged" in said
    assert "step_0000002 is whole" in said


def test_a_model_of_ours(model, tmp_path, capsys):
    save(model, tmp_path / "m")
    assert "as manifest.json says" in check(tmp_path / "m", capsys)[1]
    flip_bit(tmp_path / "m" / "model.safetensors", -8)
    assert check(tmp_path / "m", capsys)[0] == 2


def edit_index(folder, **changes) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def wrong_size(folder) -> None:
    edit_index(folder, metadata={"total_size": 5})


def dropped_tensor(folder) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def cut(folder) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])


def stray_entry(folder) -> None:
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    name, file = next(iter(weight_map.items()))
    edit_index(folder, weight_map=weight_map | {f"{name}.extra": file})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (wrong_size, "bytes, but model.safetensors.index.json says 5"),
        (dropped_tensor, "lacks"),
        (cut, "damaged or cut off"),
        (stray_entry, "disagree about"),
    ],
)
def test_a_hugging_face_directory(model, tmp_path, capsys, damage, words):
    save_hf(model, tmp_path / "hf", shard_bytes=60_000)
    code, said = check(tmp_path / "hf", capsys)
    assert code == 0 and "no checksums" in said
    damage(tmp_path / "hf")
    code, said = check(tmp_path / "hf", capsys)
    assert code == 2 and words in said


def test_shards(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} is about {i * i}.")
    args = prepare.PrepareConfig(
        tmp_path / "shards", (str(tmp_path / "text"),), vocab_size=300, dedup=0, workers=1
    )
    prepare.prepare_shards(args)
    code, said = check(tmp_path / "shards", capsys)
    assert code == 0 and "is whole: 40 documents" in said
    flip_bit(next((tmp_path / "shards").glob("*.bin")), -8)
    code, said = check(tmp_path / "shards", capsys)
    assert code == 2 and "its checksum differs" in said


@pytest.mark.parametrize("name", ["nowhere", "a file"])
def test_what_is_nothing_of_ours(tmp_path, capsys, name):
    (tmp_path / "a file").write_text("x")
    code, said = check(tmp_path / name, capsys)
    assert code == 2 and said.startswith("error: ")
    shutil.rmtree(tmp_path)
