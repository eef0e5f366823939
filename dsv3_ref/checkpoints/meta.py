"""Models without memory: the names, shapes and dtypes of all tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_ref.config import Config
from dsv3_ref.model import Transformer

ATEN = torch.ops.aten
RANDOM_OPS = (ATEN.normal_.default, ATEN.uniform_.default)
FILL_OPS = (*RANDOM_OPS, ATEN.fill_.Scalar, ATEN.zero_.default)


class WithoutFills(TorchDispatchMode):
    """A mode that skips operations that only fill a tensor; on meta each takes milliseconds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0] if func in FILL_OPS else func(*args, **(kwargs or {}))


def build_on_meta(config: Config) -> Transformer:
    """Build a model on the meta device, without first weights."""
    with WithoutFills(), torch.device("meta"):
        return Transformer(config)
