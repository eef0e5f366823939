"""Checkpoints of a mesh: own slices only, written once, read by any other mesh or one process."""

import json
import struct
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from support import randomize
from test_parallel import MICRO

from dsv3_ref import ops
from dsv3_ref.checkpoints import safetensors_files
from dsv3_ref.checkpoints.hf_config import FP8_CONFIG, config_to_hf
from dsv3_ref.checkpoints.huggingface import save_hf, write_hf
from dsv3_ref.checkpoints.manifest import write_manifest
from dsv3_ref.checkpoints.native import fill_tensors, fill_weights, load, save
from dsv3_ref.checkpoints.sharded import (
    AsyncCheckpointer,
    held_ranges,
    stage,
    weight_ranges,
)
from dsv3_ref.checkpoints.storage import ShardedFiles, read_table, whole_ranges
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.build import local_experts_of
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.training.ema import EMA

CPU = torch.device("cpu")
RECIPE = replace(RECIPES["tiny"], balance_loss_coeff=0.01)
MESHES = [((2, 1, 2), "dualpipe", True), ((1, 2, 2), "1f1b", False), ((4, 1, 1), "1f1b", True)]
FULL_MESH = pytest.param(MESHES[2], marks=pytest.mark.full)


def build_engine(shape, schedule: str, zero: bool) -> tuple[ParallelEngine, EMA]:
    settings = EngineSettings(schedule, zero=zero)
    engine = ParallelEngine(MICRO, RECIPE, Mesh(*shape, CPU), settings, 1)
    optimizer = engine.optimizer
    return engine, EMA(optimizer.masters(), optimizer.adamw, 0.9, optimizer.gather_weights)


def write(engine, ema, folder) -> None:
    """Save a checkpoint and wait for it."""
    checkpointer = AsyncCheckpointer(dist.new_group(backend="gloo"))
    extra = ({"optimizer_steps": 1}, {}, {}) if dist.get_rank() == 0 else None
    checkpointer.save(engine, folder, extra, ema)
    checkpointer.wait()


def train_and_save(shape, schedule: str, zero: bool, folder) -> tuple[int, int]:
    """Take two steps and save; return the bytes that this rank stages, and its elements."""
    engine, ema = build_engine(shape, schedule, zero)
    torch.manual_seed(2)
    for _ in range(2):
        with ops.use("zero_bubble", "auto"):
            engine.train_step(torch.randint(0, 64, (4, 17)), RECIPE, 1e-2, 1e-2, 0.3)
        ema.update()
    ema.wait()
    write(engine, ema, folder)
    staged = stage(held_ranges(engine, ema, once=True))
    storages = {part.values.untyped_storage() for part in staged.values()}
    own = sum(b.flat.numel() / b.size for b in engine.optimizer.buckets)
    return sum(storage.nbytes() for storage in storages), own


def load_and_save(shape, schedule: str, zero: bool, old, new) -> bool:
    """Load a checkpoint, check the model against its masters, and save it again."""
    engine, ema = build_engine(shape, schedule, zero)
    fill_tensors(old, held_ranges(engine, ema))
    engine.optimizer.gather_weights()
    write(engine, ema, new)
    want = load(old).state_dict()
    got = engine.model.state_dict()
    return all(torch.equal(x, local_experts_of(engine.mesh, n, want[n])) for n, x in got.items())


def contents(folder) -> dict[str, torch.Tensor]:
    """Return all tensors of a sharded checkpoint."""
    files = ShardedFiles(folder)
    tensors = {n: torch.empty(e.shape, dtype=e.dtype) for n, e in files.table.items()}
    for name, x in tensors.items():
        files.fill(name, whole_ranges("", x)[""])
    return tensors


@pytest.fixture(scope="module")
def saved(gang, tmp_path_factory):
    """Return a function of a mesh that returns its checkpoint, and what its ranks staged."""

    @cache
    def save_once(*case):
        folder = tmp_path_factory.mktemp("saved") / "step"
        return folder, gang.run(prod(case[0]), train_and_save, *case, folder)

    return save_once


@pytest.mark.parametrize("case", [*MESHES[:2], FULL_MESH], ids=str)
def test_a_rank_stages_its_slices_once(case, saved):
    """Master 4, moments 2 + 2, average 4 bytes per element of the slice; gate biases on a rank."""
    folder, ranks = saved(*case)
    biases = 4 * MICRO.n_routed_experts * (MICRO.n_layers + MICRO.n_mtp_layers)
    for staged, own in ranks:
        assert staged <= 12 * own + biases
    table = read_table(folder)
    stored = sum(entry.shape.numel() * entry.dtype.itemsize for entry in table.values())
    assert sum(staged for staged, _ in ranks) == stored
    files = sorted(folder.glob("rank_*.safetensors"))
    headers = sum(struct.unpack("<Q", path.read_bytes()[:8])[0] + 8 for path in files)
    assert len(files) == len(ranks)
    assert sum(path.stat().st_size for path in files) == stored + headers
    for name, x in Transformer(MICRO).named_parameters():
        for key in whole_ranges(name, x):
            assert {f"{kind}.{key}" for kind in ("model", "exp_avg", "exp_avg_sq", "ema")} <= {
                *table
            }


NEW_MESHES = [((2, 2, 1), "1f1b", False), ((1, 1, 4), "1f1b", True)]
SHORT = [(MESHES[0], NEW_MESHES[1]), (MESHES[1], NEW_MESHES[0])]
PAIRS = [
    pytest.param(*pair, marks=[] if pair in SHORT else pytest.mark.full)
    for pair in product(MESHES, NEW_MESHES)
]


@pytest.mark.parametrize("old, new", PAIRS, ids=str)
def test_another_mesh_loads_it_bit_for_bit(old, new, saved, gang, tmp_path):
    folder, _ = saved(*old)
    assert all(gang.run(prod(new[0]), load_and_save, *new, folder, tmp_path / "again"))
    want, got = contents(folder), contents(tmp_path / "again")
    assert want.keys() == got.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def test_one_process_loads_it(saved):
    folder, _ = saved(*MESHES[0])
    want, model = contents(folder), load(folder)
    for name, x in model.state_dict().items():
        for key, part in whole_ranges(name, x).items():
            assert torch.equal(want[f"model.{key}"].flatten(), part.values), key


def test_a_state_that_is_incomplete_is_refused(saved, tmp_path):
    folder, _ = saved(*MESHES[0])
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    table = json.loads((folder / "tensors.json").read_text())
    del table["tensors"]["exp_avg.embed.weight"]
    (tmp_path / "tensors.json").unlink()
    (tmp_path / "tensors.json").write_text(json.dumps(table))
    x = torch.zeros(MICRO.vocab_size, MICRO.dim)
    with pytest.raises(UserError, match="lacks exp_avg.embed.weight"):
        fill_tensors(tmp_path, whole_ranges("exp_avg.embed.weight", x))


def fail_on_one(rank: int, folder) -> str:
    """Return the error with which a checkpoint fails that one rank cannot write."""
    engine, ema = build_engine((1, 1, 2), "1f1b", True)

    def no_space(*args):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr("dsv3_ref.checkpoints.storage.save_file", no_space)
        with pytest.raises((UserError, SystemExit)) as caught:
            write(engine, ema, folder)
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_stops_all(rank, gang, tmp_path):
    [error, other] = gang.run(2, fail_on_one, rank, tmp_path / "step")
    assert other == "2" and f"rank_0000{rank}.safetensors (No space left" in error
    assert not (tmp_path / "step").exists()


# ── Starting weights ──


class CountingFile:
    """A safetensors file that counts the bytes of what is read from it."""

    def __init__(self, file, counted: list[int]):
        self.file, self.counted = file, counted

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        return self.count(self.file.get_tensor(name))

    def get_slice(self, name):
        return CountingSlice(self.file.get_slice(name), self.count)

    def count(self, x):
        self.counted.append(x.nbytes)
        return x


class CountingSlice:
    def __init__(self, stored, count):
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype
        self.stored, self.count = stored, count

    def __getitem__(self, key):
        return self.count(self.stored[key])


@contextmanager
def counted_reads():
    """Yield a list to which the bytes of everything that is read are appended."""
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = safetensors_files.safe_open
        patch.setattr(
            safetensors_files, "safe_open",
            lambda path, framework: CountingFile(real(path, framework=framework), counted),
        )  # fmt: skip
        yield counted


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Return a directory of every format, with weights of `WIDE`."""
    folder = tmp_path_factory.mktemp("starts")
    torch.manual_seed(3)
    model = randomize(Transformer(WIDE))
    save(model, folder / "native", 400_000)
    write_manifest(folder / "native")
    model = model.bfloat16()
    save_hf(model, folder / "bf16", 200_000)
    (folder / "fp8").mkdir()
    values = config_to_hf(WIDE, torch.bfloat16) | {"quantization_config": FP8_CONFIG}
    write_hf(folder / "fp8", model, values, torch.bfloat16, True, 100_000)
    return folder


# matrices of several blocks of 128 × 128
WIDE = replace(MICRO, dim=264, inter_dim=392, moe_inter_dim=136, vocab_size=97)


def start_from(shape, schedule: str, folder) -> tuple[int, int, bool]:
    """Load the weights of a directory.

    Return the bytes that this rank has read, those of its part of the model as it is stored, and
    whether its model is right.
    """
    engine = ParallelEngine(WIDE, RECIPE, Mesh(*shape, CPU), EngineSettings(schedule), 1)
    with counted_reads() as counted:
        fill_weights(weight_ranges(engine), folder)
    engine.optimizer.gather_weights()
    whole = load(folder, dtype=torch.float32).state_dict()
    got = engine.model.state_dict()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    per_element = stored / sum(x.numel() for x in whole.values())
    own = per_element * sum(x.numel() for x in got.values())
    exact = all(torch.equal(x, local_experts_of(engine.mesh, n, whole[n])) for n, x in got.items())
    return sum(counted), int(own), exact


@pytest.mark.parametrize("kind", ["native", "bf16", "fp8"])
@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2)], ids=str)
def test_a_start_reads_what_the_rank_holds(shape, kind, starts, gang):
    """The ranks together read little more than the files; rows and blocks that are cut count."""
    ranks = gang.run(4, start_from, shape, "dualpipe" if shape[0] > 1 else "1f1b", starts / kind)
    stored = sum(path.stat().st_size for path in (starts / kind).glob("*.safetensors"))
    for read, own, exact in ranks:
        assert exact and 0 < read <= own
    assert sum(read for read, *_ in ranks) < (1.6 if kind == "fp8" else 1.1) * stored


def test_so_does_a_start_from_a_sharded_checkpoint(gang, tmp_path):
    gang.run(4, save_wide, tmp_path / "step")
    stored = sum(path.stat().st_size for path in (tmp_path / "step").glob("rank_*.safetensors"))
    ranks = gang.run(4, start_from, (2, 1, 2), "1f1b", tmp_path / "step")
    assert all(exact for *_, exact in ranks)
    assert sum(read for read, *_ in ranks) < 0.51 * stored  # moments stay where they are


def save_wide(folder) -> None:
    engine = ParallelEngine(WIDE, RECIPE, Mesh(1, 2, 2, CPU), seed=5)
    write(engine, None, folder)
    if dist.get_rank() == 0:
        assert json.loads((folder / "config.json").read_text()) == asdict(WIDE)
