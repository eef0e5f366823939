"""Export by shards: on several ranks and in one process, equal to `save_hf`, in bounded memory."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import miniruns
import pytest
import torch
import torch.distributed as dist
from gang import Gang
from miniruns import launch
from safetensors.torch import load_file

from dsv3_ref.checkpoints.hf_config import FP8_CONFIG, config_to_hf
from dsv3_ref.checkpoints.huggingface import save_hf, write_hf
from dsv3_ref.checkpoints.native import load, save
from dsv3_ref.checkpoints.sharded import AsyncCheckpointer
from dsv3_ref.config import TINY
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.export.command import ExportConfig, run_export
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.engine import ParallelEngine
from dsv3_ref.parallel.mesh import Mesh

SMALL = replace(
    TINY, vocab_size=300, dim=160, inter_dim=256, moe_inter_dim=136, n_layers=4, n_mtp_layers=1,
    q_lora_rank=64, kv_lora_rank=64,
)  # fmt: skip
BIG = replace(SMALL, dim=512, moe_inter_dim=512, n_routed_experts=16, n_layers=4)
SHARD_BYTES = 300_000


def save_sharded(config, folder: Path) -> None:
    """Write a checkpoint of a mesh with random weights and moments."""
    mesh = Mesh(2, 1, 2, torch.device("cpu"))
    engine = ParallelEngine(config, RECIPES["tiny"], mesh, seed=7)
    checkpointer = AsyncCheckpointer(dist.new_group(backend="gloo"))
    checkpointer.save(engine, folder, ({}, {}, {}) if mesh.rank == 0 else None)
    checkpointer.wait()


@pytest.fixture(scope="module")
def sharded(home):
    """Return checkpoints of four ranks with a tokenizer: a small one and one of 130 MB."""
    processes = Gang()
    for name, config in {"small": SMALL, "big": BIG}.items():
        processes.run(4, save_sharded, config, home / name)
        tokenizer = tok.train_tokenizer(["the sea was calm and old"], 290)
        tok.save_tokenizer(tokenizer, home / name / "tokenizer.json")
    processes.stop()
    return home


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory by name, and check its index."""
    tensors: dict[str, torch.Tensor] = {}
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        own = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in own)
        tensors |= own
    assert tensors.keys() == index["weight_map"].keys() and len(files) > 3
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    return tensors


def wanted(folder: Path, out: Path, fp8: bool) -> dict[str, torch.Tensor]:
    """Return what the writer of whole models makes of a checkpoint."""
    model = load(folder)
    if not fp8:
        save_hf(model.bfloat16(), out, SHARD_BYTES)
        return stored(out)
    out.mkdir()
    values = config_to_hf(model.config, torch.bfloat16) | {"quantization_config": FP8_CONFIG}
    write_hf(out, model, values, torch.bfloat16, True, SHARD_BYTES)
    return stored(out)


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name].float(), x.float()), name


full = pytest.mark.full


@pytest.mark.parametrize(
    "world, fp8",
    [(1, False), (3, True), pytest.param(1, True, marks=full), pytest.param(3, False, marks=full)],
)
def test_ranks_write_what_save_hf_writes(world, fp8, sharded, tmp_path):
    argv = ["export", str(sharded / "small"), str(tmp_path / "out")]
    argv += ["--shard-bytes", str(SHARD_BYTES), "--fp8" if fp8 else "--no-fp8", "--no-verify"]
    processes = launch(sharded, world, argv)
    outputs = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * world, outputs
    assert sum("wrote" in text for text in outputs) == 1
    assert_equal(stored(tmp_path / "out"), wanted(sharded / "small", tmp_path / "want", fp8))
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert load(tmp_path / "out").config == load(sharded / "small").config


def test_a_rank_that_cannot_read_leaves_nothing(sharded, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in (sharded / "small").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "rank_00003.safetensors").unlink()
    argv = ["export", str(folder), str(tmp_path / "out"), "--no-verify", "--shard-bytes", "300000"]
    processes = launch(sharded, 2, argv)
    outputs = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], outputs
    assert sum("rank_00003.safetensors is named in tensors.json" in text for text in outputs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_gguf_is_for_one_process(sharded, tmp_path):
    argv = ["export", str(sharded / "small"), "--gguf", str(tmp_path / "x.gguf")]
    processes = launch(sharded, 2, argv)
    outputs = [p.communicate(timeout=200)[0] for p in processes]
    assert sum("--gguf is written by one process" in text for text in outputs) == 1


# ── Memory ──


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_of(function, *args) -> int:
    """Return by how much anonymous memory grew at most while a function ran."""
    before, peak = anonymous_bytes(), [0]
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    function(*args)
    is_done.set()
    thread.join()
    return peak[0] - before


def measure(function, pipe, *args) -> None:
    """Send the peak of `function(*args)` in this fresh process."""
    torch.set_num_threads(1)
    torch.ones(10).sum()
    pipe.send(peak_of(function, *args))


def peak_in_process(function, *args) -> int:
    """Return the peak of a function in a process of its own."""
    ours, theirs = miniruns.FORK.Pipe()
    process = miniruns.FORK.Process(target=measure, args=(function, theirs, *args))
    process.start()
    assert ours.poll(200), "no answer"
    process.join()
    return ours.recv()


def export(folder: Path, out: Path, fp8: bool) -> None:
    run_export(ExportConfig(folder, out, fp8=fp8, verify=False, shard_bytes=4_000_000))


@pytest.mark.parametrize("fp8", [pytest.param(False, marks=full), True])
def test_memory_is_bounded_by_the_shard_not_by_the_model(fp8, sharded, tmp_path):
    """A shard of 4 MB, its source in fp32 and the copies of one tensor; the model has 60 MB."""
    n_bytes = sum(4 * p.numel() for p in Transformer(BIG).parameters())
    peak = peak_in_process(export, sharded / "big", tmp_path / "out", fp8)
    assert n_bytes > 60e6 and peak < 0.45 * n_bytes, (peak, n_bytes)
    whole = peak_in_process(load, sharded / "big")
    assert whole > 0.9 * n_bytes  # the measurement sees a whole model


def export_gguf(folder: Path, out: Path) -> None:
    run_export(ExportConfig(folder, gguf=out, verify=False))


def test_a_gguf_file_is_written_expert_by_expert(sharded, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'dsv3-ref[gguf]'")
    n_bytes = sum(4 * p.numel() for p in Transformer(BIG).parameters())
    peak = peak_in_process(export_gguf, sharded / "big", tmp_path / "big.gguf")
    assert peak < 0.45 * n_bytes, (peak, n_bytes)
    assert (tmp_path / "big.gguf").stat().st_size > 0.35 * n_bytes  # in bf16, without MTP


def test_a_native_directory_is_streamed_too(tmp_path, sharded):
    torch.manual_seed(1)
    model = Transformer(SMALL)
    save(model, tmp_path / "native", SHARD_BYTES)
    (tmp_path / "native/tokenizer.json").symlink_to(sharded / "small/tokenizer.json")
    args = ExportConfig(tmp_path / "native", tmp_path / "out", shard_bytes=SHARD_BYTES)
    run_export(args)
    save_hf(model.bfloat16(), tmp_path / "want", SHARD_BYTES)
    assert_equal(stored(tmp_path / "out"), stored(tmp_path / "want"))
