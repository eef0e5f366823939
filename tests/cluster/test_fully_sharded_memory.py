"""All tensors that ranks hold with --fully-shard, beside the plan."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from test_memory import CONFIG, LiveStorages, S, kernels_like
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from dsv3_ref import ops
from dsv3_ref.cli.main import main
from dsv3_ref.cluster.fully_sharded import sharded_memory
from dsv3_ref.config import V2_LITE, count_params
from dsv3_ref.model import Transformer
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel import fully_sharded
from dsv3_ref.parallel.engine import EngineSettings
from dsv3_ref.parallel.fully_sharded import FullyShardedEngine, GatheringPipeline
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.training.recompute import saved_tensors


class ResizedStorages(LiveStorages):
    """The memory of every tensor, in its present size: weights that are not gathered have none."""

    def add(self, x: torch.Tensor) -> None:
        if x.device.type == "cpu" and not isinstance(x, DTensor):
            memory = x.untyped_storage()
            self.live[memory._cdata] = weakref.ref(memory)

    def sizes(self) -> dict[int, int]:
        found = {address: memory() for address, memory in self.live.items()}
        self.live = {address: self.live[address] for address, x in found.items() if x is not None}
        return {address: x.nbytes() for address, x in found.items() if x is not None}


def storages(tensors) -> int:
    """Bytes of distinct storages."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def count_step(recompute: bool, sequences: int):
    """Return the bytes of masters, moments, gradients, a forward pass, and the peak of a step."""
    mesh, recipe = Mesh(1, dist.get_world_size(), 1, torch.device("cpu")), RECIPES["tiny"]
    engine = FullyShardedEngine(CONFIG, recipe, mesh, EngineSettings(precision="bf16"))
    shards = engine.optimizer.shards.values()
    rows = torch.randint(CONFIG.vocab_size, (mesh.world * sequences, S + 1))
    counted, forward = {}, GatheringPipeline.forward

    def measured_forward(pipeline, batch, training):
        loss = forward(pipeline, batch, training)
        counted["forward"] = live.total() - live.before
        return loss

    def train():
        with saved_tensors(recompute), torch.autocast("cpu", torch.bfloat16):
            engine.train_step(rows, recipe, 1e-3, 1e-3, 0.3)

    with kernels_like(), ops.use("lean", "auto"), pytest.MonkeyPatch.context() as patch:
        train()  # the optimizer allocates its moments
        counted["masters"] = storages(shards)
        counted["moments"] = storages(tree_leaves([engine.optimizer.moments(x) for x in shards]))
        counted["gradients"] = storages([x.grad for x in shards])
        engine.optimizer.zero_grad()
        gc.collect()
        with ResizedStorages() as live:
            live.before, live.inside = live.total(), True
            patch.setattr(GatheringPipeline, "forward", measured_forward)
            train()
    return counted | {"peak": live.peak - live.before}


LONG = [(2, False, 4), (4, True, 3), (3, False, 1)]
CASES = [(2, True, 2), *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)]


@pytest.mark.parametrize("world, recompute, sequences", CASES)
def test_ranks_hold_what_was_planned(world, recompute, sequences, gang):
    """Slices to the byte, activations within 2 %, and never more than the sum.

    Without a GPU nothing is gathered ahead, and gradients grow while activations shrink.
    """
    planned = sharded_memory(CONFIG, world, S, sequences, recompute)
    for rank, counted in enumerate(gang.run(world, count_step, recompute, sequences)):
        if CONFIG.vocab_size % world == 0 or rank == 0:  # else the last slices are shorter
            assert counted["masters"] == planned.masters
            assert counted["moments"] == planned.moments
            assert counted["gradients"] == planned.gradients
        forward = planned.resident + planned.activations
        assert counted["forward"] == pytest.approx(forward, rel=0.02)
        added = planned.total - planned.masters - planned.moments
        assert 0.6 * added < counted["peak"] < added


def build_counted() -> int:
    """Return the most bytes of whole parameters and buffers that exist while an engine is built."""
    made: list[tuple[StorageWeakRef, int]] = []
    totals, set_param = [], fully_sharded.set_param

    def recorded(model, name, value):
        set_param(model, name, value)
        made.append((StorageWeakRef(value.untyped_storage()), value.nbytes))
        totals.append(sum(size for memory, size in made if not memory.expired()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fully_sharded, "set_param", recorded)
        mesh = Mesh(1, dist.get_world_size(), 1, torch.device("cpu"))
        FullyShardedEngine(CONFIG, RECIPES["tiny"], mesh)
    return max(totals)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_one_block_at_most_is_whole_while_a_model_is_built(world, gang):
    blocks = list(Transformer(CONFIG).layers.values())
    largest = max(sum(4 * p.numel() for p in block.parameters()) for block in blocks)
    biases = 4 * CONFIG.n_routed_experts * (CONFIG.n_layers + CONFIG.n_mtp_layers)
    for most in gang.run(world, build_counted):
        assert largest <= most <= largest + biases


def test_v2_lite_fits_one_node_and_the_slices_shrink_with_it():
    """All parameters of V2-Lite: 4 + 4 + 4 bytes each, divided among the ranks."""
    one, two = (sharded_memory(V2_LITE, n, 4096, 1, False) for n in (8, 16))
    assert one.masters == 4 * count_params(V2_LITE).total // 8
    assert one.masters == one.moments == one.gradients == 2 * two.masters
    assert one.total < 60e9 and one.activations == two.activations
    assert one.block * 8 > 2 * 3 * 64 * 2048 * 1408  # the experts of a layer, in bf16


def test_plan_prints_it(capsys):
    assert main(["plan", "--config", "v2_lite", "--fully-shard", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "v2_lite on 8 H800, fully sharded" in text and "fits in 80 GB" in text
    assert main(["plan", "--config", "v3", "--fully-shard", "--gpus", "64"]) == 0
    assert "does NOT fit in 80 GB" in capsys.readouterr().out
    assert main(["plan", "--config", "v2_lite", "--fully-shard", "--gpus", "0"]) == 2
    assert "--gpus must be at least 1" in capsys.readouterr().err
