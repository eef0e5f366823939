"""The numbers of ranks and of their groups, without any process."""

from itertools import product

import pytest

from dsv3_ref.config import UserError
from dsv3_ref.parallel.mesh import MeshLayout, resolve_parallel_dims

OWNERS = [(0,), (1,), (0, 3), (1, 2)]


def test_the_world_is_the_product_of_its_dimensions():
    assert resolve_parallel_dims(24, 2, 3, 4) == (2, 4, 3)
    assert resolve_parallel_dims(24, 2, 3) == (2, 4, 3)
    assert resolve_parallel_dims(2048, 16, 64) == (16, 2, 64)
    for world, pp, ep, dp in (
        (23, 2, 3, 4),
        (12, 4, 3, 2),
        (24, 2, 3, -4),
        (6, 2, 3, 0),
        (5, 2, 3, None),
    ):
        with pytest.raises(UserError, match=f"the world size is {world}"):
            resolve_parallel_dims(world, pp, ep, dp)


def test_a_rank_is_its_coordinates():
    """pp is the slowest dimension and ep the fastest."""
    places = list(product(range(2), range(3), range(4)))
    for rank, place in enumerate(places):
        layout = MeshLayout(2, 3, 4, rank)
        assert (layout.pp_rank, layout.dp_rank, layout.ep_rank) == place
        assert layout.rank_of(*place) == layout.rank_of(layout.pp_rank) == rank
        assert (layout.world, layout.data_size, layout.data_rank) == (24, 12, rank % 12)
        assert layout.pipeline_ranks() == [rank % 12, rank % 12 + 12]
    assert MeshLayout(2, 3, 4, 5).ranks_of([0, 1], [2], [1, 3]) == [9, 11, 21, 23]


def test_neighbors_share_rows():
    for rank in range(16):
        layout = MeshLayout(2, 2, 4, rank, cp=2)
        assert layout.data_size == 4
        assert (layout.data_rank, layout.cp_rank) == divmod(rank % 8, 2)
        assert layout.context_ranks() == [rank - rank % 2, rank - rank % 2 + 1]
    assert MeshLayout(2, 2, 4, 5).context_ranks() == [5]


def test_pairs_of_neighbors_meet_in_turns():
    assert [MeshLayout(5, 1, 1, rank).neighbors() for rank in range(5)] == [
        [1], [0, 2], [3, 1], [2, 4], [3]
    ]  # fmt: skip
    assert MeshLayout(1, 2, 2, 3).neighbors() == []


def test_experts_are_in_one_group_or_across_nodes_and_within_them():
    layout = MeshLayout(2, 2, 8, 16 + 8 + 5)
    everyone = list(range(24, 32))
    assert layout.expert_ranks() == layout.expert_ranks(8) == layout.expert_ranks(16) == [everyone]
    assert layout.expert_ranks(4) == [[25, 29], [28, 29, 30, 31]]
    assert layout.expert_ranks(2) == [[25, 27, 29, 31], [28, 29]]


def test_gradients_of_experts_are_summed_over_other_ranks():
    layout = MeshLayout(4, 2, 2, 3)  # pp 0, dp 1, ep 1
    groups = layout.reduce_ranks(OWNERS)
    assert list(groups) == [((0, 3), False), ((0, 3), True), ((0,), False), ((0,), True)]
    assert list(groups.values()) == [
        [0, 1, 2, 3, 12, 13, 14, 15], [1, 3, 13, 15], [0, 1, 2, 3], [1, 3]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "layout, counts",
    [
        (MeshLayout(4, 2, 2, 0), (2, 1, 0, 4)), (MeshLayout(4, 2, 2, 4), (4, 1, 0, 4)),
        (MeshLayout(4, 2, 8, 0), (2, 2, 0, 4)), (MeshLayout(4, 2, 1, 0), (2, 0, 0, 4)),
        (MeshLayout(4, 2, 2, 8, cp=2), (4, 1, 1, 2)), (MeshLayout(1, 1, 1, 0), (0, 0, 0, 2)),
    ],
)  # fmt: skip
def test_the_communicators_of_a_rank(layout, counts):
    names = ("neighbors", "experts", "context", "gradients")
    owners = OWNERS if layout.pp > 1 else [(0,)]
    assert layout.count_communicators(owners, 4) == {"all ranks": 1} | dict(zip(names, counts))
