"""Physical experts in a layer's place: copies of busy ones, changed while it runs (§3.4).

For inference: copies would not learn. On one process all slots are here; on many a rank holds
slots rank·per … (rank+1)·per − 1, and the exchange takes slots for experts.
"""

import torch

from dsv3_ref.config import UserError
from dsv3_ref.eplb import assign_replicas, logical_to_physical
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.moe import GroupedExperts, MoE


class PhysicalExperts:
    """Takes `MoE.routed`'s place; not a module, so a checkpoint never sees the copies."""

    def __init__(self, logical: GroupedExperts, slots: int):
        n, inter_dim, dim = logical.w1.shape
        with torch.device("meta"):
            physical = (
                GroupedExperts(slots, dim, inter_dim).to(logical.w1.dtype).requires_grad_(False)
            )
        self.logical, self.physical = logical, physical.to_empty(device=logical.w1.device)
        self.expert_a = torch.full((slots,), -1, device=logical.w1.device)

    @torch.no_grad()
    def set_placement(self, expert_a: torch.Tensor) -> int:
        """Fill the slots whose expert is another one now; how many."""
        (stale_m,) = torch.where(expert_a != self.expert_a)
        for p, own in zip(self.physical.parameters(), self.logical.parameters()):
            p[stale_m] = own[expert_a[stale_m]]
        self.slot_eu, self.count_e = logical_to_physical(expert_a, len(self.logical.w1))
        self.expert_a = expert_a
        return len(stale_m)

    def __call__(self, x_nd, weight_nk, expert_nk):
        """Σ_k w_nk·expert_nk(x_n), each choice at one of its expert's copies."""
        if torch.is_grad_enabled() and self.logical.w1.requires_grad:
            raise UserError("redundant experts are copies that do not learn: use torch.no_grad()")
        slot_nk = assign_replicas(expert_nk, self.slot_eu, self.count_e)
        return apply_local_experts(self.physical, x_nd, weight_nk, slot_nk)


def set_expert_placement(moe: MoE, physical_to_logical) -> int:
    """Let slots with these experts (a,) compute, from now on; how many had to be filled.

    Call it again between two steps to change the placement; `clear_expert_placement` undoes it.
    Slots are allocated on the device of the experts and in their dtype.
    """
    n = len(moe.experts.w1)
    expert_a = torch.as_tensor(physical_to_logical, device=moe.experts.w1.device).clone()
    if expert_a.ndim != 1 or set(expert_a.tolist()) != set(range(n)):
        raise UserError(f"a placement of one layer names each of its {n} experts at least once")
    slots = vars(moe).get("routed")
    if slots is None or len(slots.expert_a) != len(expert_a):
        slots = PhysicalExperts(moe.experts, len(expert_a))
    filled = slots.set_placement(expert_a)
    moe.routed = slots
    return filled


def clear_expert_placement(moe: MoE) -> None:
    """The layer's own experts compute again."""
    vars(moe).pop("routed", None)
