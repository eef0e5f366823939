"""The hop within a node by kernels, in the interpreter: ranks are processes that share memory."""

import interpreter  # isort: skip  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import mmap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gang import Gang
from test_fixed_sizes import CPU, MICRO, SHAPE, run_layer

from dsv3_ref.config import UserError
from dsv3_ref.moe import GroupedExperts
from dsv3_ref.optim import RECIPES
from dsv3_ref.parallel.engine import EngineSettings, ParallelEngine
from dsv3_ref.parallel.fan_out import FanOut
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.token_dispatcher import (
    AllToAllDispatcher,
    FixedSizes,
    Traffic,
    dispatch_levels,
)


@pytest.fixture(scope="module")
def gang():
    processes = Gang()
    yield processes
    processes.stop()


def shared_files(folder: Path):
    """Return an allocator of memory that processes share: a file of each rank, mapped by all."""

    def allocate(num_bytes, group, device):
        ranks = dist.get_process_group_ranks(group)
        paths = [folder / f"{'_'.join(map(str, ranks))}-{num_bytes}-of-{rank}" for rank in ranks]
        paths[group.rank()].write_bytes(bytes(num_bytes))
        dist.barrier(group)
        tensors = []
        for path in paths:
            with path.open("r+b") as file:
                tensors.append(torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8))
        own = tensors[group.rank()]
        own.peers = tensors  # keeps all files mapped
        return own, torch.tensor([x.data_ptr() for x in tensors])

    return allocate


def compare_hops(folder, world: int, ranks_per_node: int, fp8: bool, dtype, factor: float):
    """Return results and gradients by kernels and by all-to-alls, what was left out, the bytes."""
    mesh = Mesh(1, 1, world, CPU)
    torch.manual_seed(mesh.ep_rank)
    experts = GroupedExperts(16 // world, 128, 128)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.1)
    n = 0 if mesh.ep_rank == 1 else 5 + mesh.ep_rank  # one rank has no tokens
    x_nd, weight_nk = torch.randn(n, 128, dtype=dtype), torch.rand(n, 4)
    expert_nk = torch.randn(n, 16).topk(4).indices
    args = experts.to(dtype), x_nd, weight_nk, expert_nk, torch.randn(n, 128, dtype=dtype)
    answers = []
    for uses_kernels in (True, False):
        traffic, fixed = Traffic(), FixedSizes(factor, 16, 4, num_tokens=8)
        levels = dispatch_levels(SHAPE, mesh, ranks_per_node, traffic)
        fan_out = FanOut(levels[-1], 2, fp8, shared_files(folder)) if uses_kernels else None
        dispatcher = AllToAllDispatcher(levels, fp8, fixed, fan_out)
        results = run_layer(dispatcher, *args)
        traffic.read_device()
        answers.append((results, int(fixed.take_left_out()), dict(traffic.bytes)))
    return answers


@pytest.mark.parametrize("world, ranks_per_node, fp8", [(2, 0, False), (2, 0, True), (4, 2, True)])
def test_kernels_give_the_bits_of_all_to_alls(world, ranks_per_node, fp8, gang, tmp_path):
    args = tmp_path, world, ranks_per_node, fp8, torch.float32, 2.5
    for (got, left_out, sent), (want, _, _) in gang.run(world, compare_hops, *args):
        assert left_out == 0
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert bool(ranks_per_node) == ("internode" in sent)


def test_bf16_is_summed_in_fp32(gang, tmp_path):
    for (got, *_), (want, *_) in gang.run(
        2, compare_hops, tmp_path, 2, 0, False, torch.bfloat16, 2.5
    ):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-6)


def test_what_exceeds_the_capacity_is_counted(gang, tmp_path):
    args = tmp_path, 2, 0, False, torch.float32, 0.5
    answers = gang.run(2, compare_hops, *args)
    assert sum(kernels[1] for kernels, _ in answers) > 0
    assert all(kernels[1] == all_to_all[1] for kernels, all_to_all in answers)


def test_only_rows_that_exist_are_sent(gang, tmp_path):
    """Out: a bf16 token with ids and weights, forward, and its gradient alone, backward."""
    answers = gang.run(2, compare_hops, tmp_path, 2, 0, False, torch.bfloat16, 2.5)
    (_, _, sent), (_, _, padded) = answers[0]
    assert sent["intranode"] % (2 * 256 + 4 * 4 * 2) == 0
    assert 0 < sent["intranode"] < padded["intranode"]


def refused(capacity: float) -> str:
    with pytest.raises(UserError) as error:
        settings = EngineSettings(dispatch_capacity=capacity, fan_out_sms=4)
        ParallelEngine(MICRO, RECIPES["tiny"], Mesh(1, 1, 2, CPU), settings)
    return str(error.value)


def test_it_needs_gpus_and_fixed_sizes(gang):
    message = "--token-dispatcher symmetric needs GPUs and fixed sizes"
    assert all(message in text for text in gang.run(2, refused, 1.5))
