"""Physical experts in place of a layer's own: copies of busy experts, exchanged at run time (§3.4).

For inference only, since the copies are not trained. With one process all slots are local; with
several, a rank holds slots rank·per … (rank + 1)·per − 1 and dispatch takes slots for experts.
"""

from collections.abc import Sequence

import torch

from dsv3_ref.config import UserError
from dsv3_ref.eplb import assign_replicas, logical_to_physical
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.moe import GroupedExperts, MoE


class PhysicalExperts:
    """Slots with copies of a layer's experts, the `token_dispatcher` of a `MoE`.

    It is not a module, so that the copies never enter a checkpoint.
    """

    def __init__(self, logical: GroupedExperts, num_slots: int):
        _, inter_dim, dim = logical.w1.shape
        with torch.device("meta"):
            physical = GroupedExperts(num_slots, dim, inter_dim).requires_grad_(False)
        self.logical = logical
        self.physical = physical.to(logical.w1.dtype).to_empty(device=logical.w1.device)
        self.expert_a = torch.full((num_slots,), -1, device=logical.w1.device)

    @torch.no_grad()
    def set_placement(self, expert_a: torch.Tensor) -> int:
        """Fill the slots whose expert changes, and return their number."""
        (stale_m,) = torch.where(expert_a != self.expert_a)
        for slots, experts in zip(self.physical.parameters(), self.logical.parameters()):
            slots[stale_m] = experts[expert_a[stale_m]]
        self.slot_eu, self.count_e = logical_to_physical(expert_a, len(self.logical.w1))
        self.expert_a = expert_a
        return len(stale_m)

    def __call__(
        self, x_nd: torch.Tensor, weight_nk: torch.Tensor, expert_nk: torch.Tensor
    ) -> torch.Tensor:
        """Return Σ_k w_nk·expert_nk(x_n), each choice computed by one of its expert's copies."""
        if torch.is_grad_enabled() and self.logical.w1.requires_grad:
            raise UserError("redundant experts are copies that do not learn: use torch.no_grad()")
        slot_nk = assign_replicas(expert_nk, self.slot_eu, self.count_e)
        return apply_local_experts(self.physical, x_nd, weight_nk, slot_nk)


def set_expert_placement(moe: MoE, physical_to_logical: torch.Tensor | Sequence[int]) -> int:
    """Let slots with these experts (a,) compute the layer, and return how many had to be filled.

    Call it again between two steps to change the placement; `clear_expert_placement` undoes it.
    Slots are allocated on the device of the experts and in their dtype. Raises `UserError` unless
    the placement names every expert.
    """
    n_experts = len(moe.experts.w1)
    expert_a = torch.as_tensor(physical_to_logical, device=moe.experts.w1.device).clone()
    if expert_a.ndim != 1 or set(expert_a.tolist()) != set(range(n_experts)):
        raise UserError(
            f"a placement of one layer names each of its {n_experts} experts at least once"
        )
    slots = moe.token_dispatcher
    if not isinstance(slots, PhysicalExperts) or len(slots.expert_a) != len(expert_a):
        slots = PhysicalExperts(moe.experts, len(expert_a))
    num_filled = slots.set_placement(expert_a)
    moe.token_dispatcher = slots
    return num_filled


def clear_expert_placement(moe: MoE) -> None:
    """Let the layer's own experts compute it again."""
    moe.token_dispatcher = None
