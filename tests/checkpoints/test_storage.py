"""Sharded files: what was written is read in any cut, and a table from a stranger runs nothing."""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from dsv3_ref.checkpoints.sharded import consolidate, global_tensors
from dsv3_ref.checkpoints.storage import SafetensorsWriter, read_into, read_table
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (7,), (), (2, 1, 5)]
    return {
        f"layers.{i}.w": torch.randn(shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, DTYPES))
    }


def save(folder, state):
    dcp.save(state, storage_writer=SafetensorsWriter(folder), no_dist=True)


def read(folder, targets):
    read_into(folder, targets, alone=True)
    return targets


def test_bits_survive(tmp_path):
    want = tensors()
    save(tmp_path, want)
    got = read(tmp_path, {name: torch.zeros_like(x) for name, x in want.items()})
    for name, x in want.items():
        assert torch.equal(got[name].float(), x.float()) and got[name].dtype == x.dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank_00000.safetensors", "tensors.json"]


def test_some_tensors_are_enough(tmp_path):
    want = tensors()
    save(tmp_path, want)
    assert torch.equal(read(tmp_path, {"layers.1.w": torch.zeros(7).bfloat16()})["layers.1.w"],
                       want["layers.1.w"])  # fmt: skip


def write_in_chunks(folder, x: torch.Tensor, cuts: list[int]) -> None:
    """Write the tensor "x" as one chunk of rows per file, as ranks would that shard it."""
    writer = SafetensorsWriter(folder)
    bounds = [0, *cuts, len(x)]
    table = {"dtype": "float32", "shape": list(x.shape), "chunks": []}
    for i, (start, end) in enumerate(zip(bounds, bounds[1:])):
        item = dcp.planner.WriteItem(
            index=MetadataIndex("x", (start, 0)),
            type=dcp.planner.WriteItemType.SHARD,
            tensor_data=dcp.planner.TensorWriteData(
                dcp.metadata.ChunkStorageMetadata(
                    torch.Size([start, 0]), torch.Size([end - start, x.shape[1]])
                ),
                dcp.metadata.TensorProperties(dtype=x.dtype),
                x.shape,
            ),
        )  # fmt: skip

        class Planner:
            def resolve_data(self, item, rows=x[start:end]):
                return rows

        [plan] = writer.prepare_global_plan([SavePlan([item])])
        plan = SavePlan(plan.items, f"rank_{i:05}.safetensors")
        writer.write_data(plan, Planner()).wait()
        shape = [end - start, x.shape[1]]
        table["chunks"].append([[start, 0], shape, plan.storage_data])
    (folder / "tensors.json").write_text(json.dumps({"format": 1, "tensors": {"x": table}}))


@given(rows=st.integers(2, 9), data=st.data())
def test_a_tensor_in_chunks_is_put_together(tmp_path_factory, rows, data):
    folder = tmp_path_factory.mktemp("chunks")
    x = torch.arange(rows * 3.0).reshape(rows, 3)
    cuts = data.draw(st.sets(st.integers(1, rows - 1)).map(sorted))
    write_in_chunks(folder, x, cuts)
    assert torch.equal(read(folder, {"x": torch.zeros_like(x)})["x"], x)


DAMAGED = {
    "format": lambda t: t.update(format=2),
    "no tensors": lambda t: t.pop("tensors"),
    "a list": lambda t: t.update(tensors=[1]),
    "dtype": lambda t: t["tensors"]["layers.0.w"].update(dtype="nn"),
    "negative": lambda t: t["tensors"]["layers.0.w"].update(shape=[-3, -4]),
    "a bool": lambda t: t["tensors"]["layers.1.w"].update(shape=[True]),
    "too small": lambda t: t["tensors"]["layers.0.w"].update(shape=[2, 4]),
    "hole": lambda t: t["tensors"]["layers.0.w"].update(chunks=[]),
    "outside": lambda t: t["tensors"]["layers.0.w"]["chunks"][0].__setitem__(2, "../x.safetensors"),
    "absolute": lambda t: t["tensors"]["layers.0.w"]["chunks"][0].__setitem__(2, "/x.safetensors"),
    "not a name": lambda t: t["tensors"]["layers.0.w"]["chunks"][0].__setitem__(2, 3),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_table_that_makes_no_sense_is_refused(tmp_path, how):
    save(tmp_path, tensors())
    table = json.loads((tmp_path / "tensors.json").read_text())
    DAMAGED[how](table)
    (tmp_path / "tensors.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="tensors.json is"):
        read_table(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    save(tmp_path, tensors())
    (tmp_path / "rank_00000.safetensors").unlink()
    with pytest.raises(UserError, match="rank_00000.safetensors is missing"):
        read(tmp_path, {"layers.1.w": torch.zeros(7).bfloat16()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"n_layers": 10**9}, "asks for 1,000,000,002 layers, but"),
        ({"dim": 10**8}, "asks for more weights than the files hold"),
    ],
)
def test_a_config_without_end_fills_no_memory(tmp_path, micro, changes, words):
    model = Transformer(micro)
    state: dict[str, torch.Tensor] = {}
    for name, x in model.state_dict().items():
        state |= global_tensors("model.", name, x, 0)
    save(tmp_path, state)
    (tmp_path / "config.json").write_text(json.dumps(asdict(micro) | changes))
    if words:
        with pytest.raises(UserError, match=words):
            consolidate(tmp_path)
    else:
        assert torch.equal(consolidate(tmp_path).head.weight, model.head.weight)


class Attack:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["tensors.json", "rank_00000.safetensors", ".metadata"])
def test_a_pickle_is_never_loaded(tmp_path, name):
    save(tmp_path, tensors())
    (tmp_path / name).write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    targets = {"layers.1.w": torch.zeros(7).bfloat16()}
    if name == ".metadata":
        read(tmp_path, targets)
    else:
        with pytest.raises(UserError):
            read(tmp_path, targets)
    assert not (tmp_path / "owned").exists()
