"""What a rank holds: its stages' layers, its share of the experts, with one device's first weights.

Order of construction: on meta → cut the stages → shard the experts → draw the weights.
"""

import re

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.config import Config, UserError
from dsv3_ref.model import Transformer
from dsv3_ref.scale import partition_layers

# ── Stages ──


def stages_with_param(name: str, c: Config, n: int) -> tuple[int, ...]:
    """Which of n stages need a parameter; MTP lies in the last one, and so needs the embedding."""
    if place := re.match(r"layers\.(\d+)\.", name):
        return tuple(
            s for s, layers in enumerate(partition_layers(c, n)) if int(place[1]) in layers
        )
    if name.startswith("embed."):
        return tuple(sorted({0, n - 1} if c.n_mtp_layers else {0}))
    return (n - 1,)


def owning_ranks(name: str, c: Config, held: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The pp ranks that hold a parameter; held: the stages of every pp rank."""
    needs = set(stages_with_param(name, c, 1 + max(s for of_rank in held for s in of_rank)))
    return tuple(p for p, of_rank in enumerate(held) if needs & set(of_rank))


# ── First weights ──


class RNGReplay(TorchDispatchMode):
    """Where in the stream of random numbers each parameter on meta would begin.

    The numbers are drawn and dropped, so that the stream is that of a model built in memory.
    """

    FILL = {
        op.default
        for op in map(torch.ops.aten.__getattr__, ("normal_", "uniform_", "fill_", "zero_"))
        if hasattr(op, "default")
    } | {torch.ops.aten.fill_.Scalar}

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.starts = device, WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.FILL or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        self.starts[args[0]] = get_rng_state(self.device), func, args[1:]
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:])
        return args[0]

    def draw(self, p: torch.Tensor) -> torch.Tensor:
        """The numbers that p would have begun with."""
        before, func, args = self.starts[p]
        set_rng_state(self.device, before)
        return func(torch.empty(p.shape, dtype=p.dtype, device=self.device), *args)


def get_rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(device: torch.device, value: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(value, device)
    else:
        torch.set_rng_state(value)


# ── The rank's model ──


def build_local_model(c: Config, mesh, held: tuple[int, ...], n: int, seed: int) -> Transformer:
    """What this rank holds of `Transformer(c)` after `torch.manual_seed(seed)`, bit for bit."""
    if c.n_routed_experts % mesh.ep:
        raise UserError(f"--ep {mesh.ep} does not divide {c.n_routed_experts} routed experts")
    torch.manual_seed(seed)
    with RNGReplay(mesh.device) as starts, torch.device("meta"):
        model = Transformer(c)
    drop_unused_stages(model, c, held, n)
    after = get_rng_state(mesh.device)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        set_param(model, name, local_experts_of(mesh, name, starts.draw(t)))
    set_rng_state(mesh.device, after)
    return model


def local_experts_of(mesh, name: str, x: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a tensor: its experts, or all."""
    return x.chunk(mesh.ep)[mesh.ep_rank].clone() if is_expert(name) else x


def drop_unused_stages(model: Transformer, c: Config, held: tuple[int, ...], n: int) -> None:
    """Drop what none of the held stages needs; what stays keeps its name."""
    for name, module in dict(model.named_children()).items():
        for key in [*module] if isinstance(module, nn.ModuleDict) else [None]:
            full = f"{name}." + (f"{key}." if key else "")
            if not set(stages_with_param(full, c, n)) & set(held):
                if key:
                    module.pop(key)
                else:
                    setattr(model, name, None)


def set_param(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """A parameter or buffer with these values, by its name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = nn.Parameter(value)
    setattr(module, leaf, value)
