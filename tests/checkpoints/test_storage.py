"""Sharded files: what was written is read in any cut, and a table from a stranger runs nothing."""

import json
import pickle
from dataclasses import asdict
from itertools import pairwise, zip_longest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.checkpoints.safetensors_files import FlatRange
from dsv3_ref.checkpoints.sharded import consolidate
from dsv3_ref.checkpoints.storage import (
    ShardedFiles,
    read_table,
    split_experts,
    whole_ranges,
    write_ranges,
    write_table,
)
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


def ranges_of(state: dict[str, torch.Tensor]) -> dict[str, FlatRange]:
    ranges: dict[str, FlatRange] = {}
    for name, x in state.items():
        ranges |= whole_ranges(name, x)
    return ranges


def save(folder, state):
    write_table(folder, [write_ranges(folder, "rank_00000.safetensors", ranges_of(state))])


def read(folder, targets):
    files = ShardedFiles(folder)
    for name, part in ranges_of(targets).items():
        files.fill(name, part)
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


def cut(data, name: str, x: torch.Tensor, by_rank: int) -> list[dict[str, FlatRange]]:
    """Cut a tensor (experts: a stack of them) into flat ranges, as ZeRO does."""
    ends = data.draw(st.lists(st.integers(0, x.numel()), max_size=by_rank).map(sorted))
    bounds = [0, *ends, x.numel()]
    flat = x.view(-1)
    return [
        split_experts(name, FlatRange(x.shape, begin, flat[begin:end]))
        for begin, end in pairwise(bounds)
        if begin < end
    ]


@given(rows=st.integers(1, 9), data=st.data())
def test_a_tensor_in_flat_ranges_is_read_in_any_other_cut(tmp_path_factory, rows, data):
    """The tables and files of ranks with any slices give the same tensor to ranks with others."""
    folder = tmp_path_factory.mktemp("ranges")
    state = {"x": torch.randn(rows, 3), "layers.0.experts.w1": torch.randn(4, 2, 3).bfloat16()}
    parts: dict[str, list[dict[str, FlatRange]]] = {k: cut(data, k, x, 3) for k, x in state.items()}
    reports = []
    for rank, both in enumerate(zip_longest(*parts.values(), fillvalue={})):
        own: dict[str, FlatRange] = {}
        for ranges in both:
            own |= ranges
        reports.append(write_ranges(folder, f"rank_{rank:05}.safetensors", own))
    write_table(folder, reports)
    got = {name: torch.zeros_like(x) for name, x in state.items()}
    files = ShardedFiles(folder)
    for name, x in got.items():
        for ranges in cut(data, name, x, 3):
            for key, part in ranges.items():
                files.fill(key, part)
    for name, x in state.items():
        assert torch.equal(got[name], x), name


DAMAGED = {
    "format": lambda t: t.update(format=1),
    "no tensors": lambda t: t.pop("tensors"),
    "a list": lambda t: t.update(tensors=[1]),
    "dtype": lambda t: t["tensors"]["layers.0.w"].update(dtype="nn"),
    "negative": lambda t: t["tensors"]["layers.0.w"].update(shape=[-3, -4]),
    "a bool": lambda t: t["tensors"]["layers.1.w"].update(shape=[True]),
    "too small": lambda t: t["tensors"]["layers.0.w"].update(shape=[2, 4]),
    "hole": lambda t: t["tensors"]["layers.0.w"].update(ranges=[]),
    "twice": lambda t: t["tensors"]["layers.0.w"]["ranges"].append([0, 12, "x.safetensors"]),
    "outside": lambda t: t["tensors"]["layers.0.w"]["ranges"][0].__setitem__(2, "../x.safetensors"),
    "absolute": lambda t: t["tensors"]["layers.0.w"]["ranges"][0].__setitem__(2, "/x.safetensors"),
    "not a name": lambda t: t["tensors"]["layers.0.w"]["ranges"][0].__setitem__(2, 3),
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
    with pytest.raises(UserError, match="rank_00000.safetensors is named in tensors.json but"):
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
    save(tmp_path, {f"model.{name}": x for name, x in model.state_dict().items()})
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
