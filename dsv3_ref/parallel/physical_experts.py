"""Physical experts: slots with copies of a layer's experts, which can change at run time (§3.4).

They are for inference only, since the copies are not trained. In one process all slots are local.
With several ranks, each holds `per` slots, rank·per … (rank + 1)·per − 1, and dispatch uses slots
in place of experts.
"""

from collections.abc import Sequence

import torch

from dsv3_ref.config import UserError
from dsv3_ref.eplb import assign_replicas, logical_to_physical
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.moe import GroupedExperts, MoE


class PhysicalExperts:
    """Slots with copies of a layer's experts, used as the `token_dispatcher` of a `MoE`.

    This is not a module, so that the copies are not part of a checkpoint.
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
        """Copy experts to the slots whose expert changes, and return the number of those slots."""
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
            raise UserError(
                "redundant experts are copies that are not trained: use torch.no_grad()"
            )
        slot_nk = assign_replicas(expert_nk, self.slot_eu, self.count_e)
        return apply_local_experts(self.physical, x_nd, weight_nk, slot_nk)


def set_expert_placement(moe: MoE, physical_to_logical: torch.Tensor | Sequence[int]) -> int:
    """Compute the layer with slots of these experts (a,); return how many slots were filled.

    Another call between two steps changes the placement; `clear_expert_placement` undoes it. Slots
    have the device and the dtype of the experts. Raise a `UserError` unless the placement contains
    every expert.
    """
    n_experts = len(moe.experts.w1)
    expert_a = torch.as_tensor(physical_to_logical, device=moe.experts.w1.device).clone()
    if expert_a.ndim != 1 or set(expert_a.tolist()) != set(range(n_experts)):
        raise UserError(
            f"a placement of one layer must contain each of its {n_experts} experts at least once"
        )
    slots = moe.token_dispatcher
    if not isinstance(slots, PhysicalExperts) or len(slots.expert_a) != len(expert_a):
        slots = PhysicalExperts(moe.experts, len(expert_a))
    num_filled = slots.set_placement(expert_a)
    moe.token_dispatcher = slots
    return num_filled


def clear_expert_placement(moe: MoE) -> None:
    """Compute the layer with its own experts again."""
    moe.token_dispatcher = None
