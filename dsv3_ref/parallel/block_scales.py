"""Quantization of slices of FP8 weights, whose 128 × 128 blocks may be divided among slices.

A scale depends on the largest element of its block. Each rank takes the largest of what its slice
contains of every block, an all-reduce makes these the largest of whole blocks, and each rank
quantizes its own slice. The result is that of `weight_quant` bit for bit, and slices of equal
length need no padding. Megatron-Core's FP8 parameters with block scales are updated the same way.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref.config import ceil_div
from dsv3_ref.fp8 import BLOCK_SIZE, amax_to_scale, quantize


def scale_shape(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of the scales of a weight, (…, ⌈o/128⌉, ⌈i/128⌉)."""
    *lead, o, i = shape
    return *lead, ceil_div(o, BLOCK_SIZE), ceil_div(i, BLOCK_SIZE)


def num_scales(shapes: Iterable[torch.Size]) -> int:
    """Return the number of scales of weights of these shapes."""
    return sum(torch.Size(scale_shape(shape)).numel() for shape in shapes)


def rows_around(x_n: Tensor, start: int, width: int) -> tuple[Tensor, int]:
    """Return the whole rows (r, width) that a part of a flattened matrix touches.

    x_n: the elements from number `start` on; the others are 0. Return the first row's number, too.
    """
    before = start % width
    after = -(before + len(x_n)) % width
    return F.pad(x_n, (before, after)).view(-1, width), start // width


class BlockScales:
    """The scales of some FP8 weights, in one flat fp32 tensor."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device):
        self.shapes = shapes
        self.flat = torch.zeros(num_scales(shapes.values()), device=device)
        sizes = [num_scales([shape]) for shape in shapes.values()]
        self.parts = dict(zip(shapes, self.flat.split(sizes)))

    def view(self, name: str) -> Tensor:
        """Return the scales of a weight, (…, ⌈o/128⌉, ⌈i/128⌉)."""
        return self.parts[name].view(scale_shape(self.shapes[name]))

    def rows_of_blocks(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return a weight's scales as a matrix, and its row for each of `count` rows of weights."""
        *_, rows_of_scales, columns = scale_shape(self.shapes[name])
        o = self.shapes[name][-2]
        row_r = torch.arange(first, first + count, device=self.flat.device)
        block_r = row_r // o * rows_of_scales + row_r % o // BLOCK_SIZE
        return self.parts[name].view(-1, columns), block_r

    def add_amax(self, name: str, x_n: Tensor, start: int) -> None:
        """Raise the entries of the touched blocks to the largest |x| of a part of a weight.

        x_n: elements of the flattened weight from number `start` on, in fp32.
        """
        rows, first = rows_around(x_n, start, self.shapes[name][-1])
        amax, block_r = self.rows_of_blocks(name, first, len(rows))
        tiles = F.pad(rows.abs(), (0, -rows.shape[1] % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
        largest = tiles.amax(-1)
        amax.scatter_reduce_(0, block_r[:, None].expand_as(largest), largest, "amax")

    def set_from_amax(self) -> None:
        """Replace every entry, the largest |x| of its block, by the block's scale."""
        self.flat.copy_(amax_to_scale(self.flat, False))

    def quantize(self, name: str, x_n: Tensor, start: int) -> Tensor:
        """Return a part of a weight in E4M3; x_n and start as for `add_amax`."""
        width = self.shapes[name][-1]
        before = start % width
        num_rows = ceil_div(before + len(x_n), width)
        scales, block_r = self.rows_of_blocks(name, start // width, num_rows)
        s_rows = scales[block_r].repeat_interleave(BLOCK_SIZE, 1)[:, :width]
        return quantize(x_n, s_rows.flatten()[before : before + len(x_n)])
