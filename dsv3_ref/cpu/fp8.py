"""RMSNorm with its quantized output, for FP8 emulated on CPU."""

import torch
from torch import Tensor

from dsv3_ref.cpu.fused import rms_norm
from dsv3_ref.fp8 import act_quant
from dsv3_ref.ops import impl


@impl("rms_norm_quant", "cpu")
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize x and quantize the result: (y, values, scales); the gradient flows through y."""
    y = rms_norm(x, weight, eps, dtype)
    values, scales = act_quant(y.detach(), use_ue8m0)
    return y, values, scales
