"""The part of the model that a rank holds, with the same initial weights as on one device.

Order of construction: build on meta → drop other stages → shard the experts → draw the weights.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.checkpoints.meta import FILL_OPS, RANDOM_OPS, build_on_meta
from dsv3_ref.config import Config, UserError
from dsv3_ref.model import Transformer
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.scale import partition_layers

# ── Stages ──


def count_stages(stages_by_rank: Sequence[Sequence[int]]) -> int:
    """Return the number of stages of a pipeline from the stages of every rank."""
    return 1 + max(map(max, stages_by_rank))


def stages_with_param(name: str, config: Config, num_stages: int) -> tuple[int, ...]:
    """Return the stages that need a parameter.

    The MTP modules are in the last stage, so that stage needs the embedding too.
    """
    if layer := re.match(r"layers\.(\d+)\.", name):
        parts = partition_layers(config, num_stages)
        return tuple(s for s, layers in enumerate(parts) if int(layer[1]) in layers)
    last = num_stages - 1
    if name.startswith("embed."):
        return tuple(sorted({0, last})) if config.n_mtp_layers else (0,)
    return (last,)


def owning_ranks(
    name: str, config: Config, stages_by_rank: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Return the pp ranks that hold a parameter."""
    needed = set(stages_with_param(name, config, count_stages(stages_by_rank)))
    return tuple(p for p, stages in enumerate(stages_by_rank) if needed & set(stages))


# ── First weights ──


class RNGReplay(TorchDispatchMode):
    """A mode that records the state of the random generator before each parameter on meta.

    The random numbers are drawn and discarded, so the generator's state advances as it would for a
    model built in memory.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.starts = device, WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in FILL_OPS or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        self.starts[args[0]] = get_rng_state(self.device), func, args[1:]
        if func in RANDOM_OPS:
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:])
        return args[0]

    def draw(self, parameter: Tensor) -> Tensor:
        """Return the initial values that a parameter on meta would have in memory."""
        rng_state, func, args = self.starts[parameter]
        set_rng_state(self.device, rng_state)
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        return func(values, *args)


def get_rng_state(device: torch.device) -> Tensor:
    """Return the state of a device's random number generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(device: torch.device, value: Tensor) -> None:
    """Set the state of a device's random number generator."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(value, device)
    else:
        torch.set_rng_state(value)


# ── The rank's model ──


def build_local_model(
    config: Config, mesh: Mesh, stages: Sequence[int], num_stages: int, seed: int
) -> Transformer:
    """Build this rank's part of `Transformer(config)` after `torch.manual_seed(seed)`.

    The values are equal bit for bit, and so is the state of the random generator afterwards.
    """
    if config.n_routed_experts % mesh.ep:
        raise UserError(
            f"--ep {mesh.ep} does not divide the {config.n_routed_experts} routed experts: "
            "choose a divisor"
        )
    torch.manual_seed(seed)
    with RNGReplay(mesh.device) as replay, torch.device("meta"):
        model = Transformer(config)
    drop_unused_stages(model, config, stages, num_stages)
    rng_state = get_rng_state(mesh.device)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        set_param(model, name, local_experts_of(mesh, name, replay.draw(t)))
    set_rng_state(mesh.device, rng_state)
    return model


def build_empty_model(
    config: Config, mesh: Mesh, stages: Sequence[int], num_stages: int
) -> Transformer:
    """Build this rank's part of a model that is not trained, with uninitialized weights."""
    model = build_on_meta(config)
    drop_unused_stages(model, config, stages, num_stages)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        set_param(
            model, name, torch.empty_like(local_experts_of(mesh, name, t), device=mesh.device)
        )
    return model.requires_grad_(False)


def local_experts_of(mesh: Mesh, name: str, x: Tensor) -> Tensor:
    """Return this rank's part of a tensor: its own experts, or all of a dense tensor."""
    return x.chunk(mesh.ep)[mesh.ep_rank].clone() if is_expert(name) else x


def drop_unused_stages(
    model: Transformer, config: Config, stages: Sequence[int], num_stages: int
) -> None:
    """Drop the modules that none of these stages needs; the others keep their names."""

    def is_needed(name: str) -> bool:
        return bool(set(stages_with_param(name, config, num_stages)) & set(stages))

    for name, module in dict(model.named_children()).items():
        if isinstance(module, nn.ModuleDict):
            for key in [*module]:
                if not is_needed(f"{name}.{key}."):
                    module.pop(key)
        elif not is_needed(f"{name}."):
            setattr(model, name, None)


def set_param(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = nn.Parameter(value)
    setattr(module, leaf, value)
