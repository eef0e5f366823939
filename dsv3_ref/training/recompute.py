"""Tensors that a training step saves for its backward pass: counted, and computed again if asked.

The model marks what is cheap to compute again with `ops.recompute(fn, *args)`. A block of
`saved_tensors(recompute=True)` remembers, for each result, the call that makes it; PyTorch's
saved-tensor hooks then pass every tensor that autograd saves through `SavedTensors.pack`, and
every one that it uses through `unpack`. A result is known by the memory in which it lies, so that
its views (a transpose, one head's part) are recognized; a weak reference notices when that memory
is freed, since its address may then belong to another tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3_ref import ops


def as_tuple(y: Any) -> tuple:
    """Return y if it is a tuple, else (y,)."""
    return y if isinstance(y, tuple) else (y,)


class RecomputedOutputs:
    """The results of a call fn(*args) that is made again when the backward pass asks for them.

    Its arguments may be results of other such calls: `pack` stores them. The results stay until
    as many readers have asked for one as have saved one.
    """

    def __init__(self, fn: Callable, args: tuple, pack: Callable[[Any], Any]):
        device = next(x for x in args if isinstance(x, torch.Tensor)).device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.fn, self.args = fn, [pack(x) for x in args]
        self.outputs: tuple = ()
        self.num_saved = self.num_read = 0

    def read(self, i: int) -> torch.Tensor:
        """Return result i, computing all of them if this is the first reader."""
        if not self.outputs:
            with torch.enable_grad(), self.autocast:
                self.outputs = as_tuple(self.fn(*map(unpack, self.args)))
        y = self.outputs[i].detach()
        self.num_read = (self.num_read + 1) % self.num_saved
        if not self.num_read:
            self.outputs = ()
        return y


def unpack(x: Any) -> Any:
    """Return the tensor that `SavedTensors.pack` took in."""
    if not isinstance(x, tuple):
        return x
    call, i, view = x
    return call.read(i).as_strided(*view)


class SavedTensors:
    """What a forward pass has saved for its backward pass."""

    def __init__(self, exclude: Iterable[torch.Tensor] = ()):
        self.calls: dict[int, tuple[RecomputedOutputs, int, StorageWeakRef]] = {}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.excluded = {w.untyped_storage()._cdata for w in exclude}

    def pack(self, x: Any) -> Any:
        """Return what to save for x: of a recomputed result, its call and where it lies there."""
        if not isinstance(x, torch.Tensor):
            return x
        memory = x.untyped_storage()
        if memory._cdata in self.calls:
            call, i, _ = self.calls[memory._cdata]
            call.num_saved += 1
            return call, i, (x.shape, x.stride(), x.storage_offset())
        self.storages[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        return x

    def recompute(self, fn: Callable, args: tuple) -> Any:
        """Call fn(*args) and remember the call in place of its results."""
        if not torch.is_grad_enabled():
            return fn(*args)
        self.calls = {k: c for k, c in self.calls.items() if not c[2].expired()}
        call, y = RecomputedOutputs(fn, args, self.pack), fn(*args)
        for i, output in enumerate(as_tuple(y)):
            memory = output.untyped_storage()
            self.calls[memory._cdata] = call, i, StorageWeakRef(memory)
        return y

    @property
    def bytes(self) -> int:
        """Bytes that the backward pass still holds, without the excluded tensors."""
        live = {k: n for k, (ref, n) in self.storages.items() if not ref.expired()}
        return sum(n for k, n in live.items() if k not in self.excluded)


@contextmanager
def saved_tensors(recompute: bool, exclude: Iterable[torch.Tensor] = ()) -> Iterator[SavedTensors]:
    """Count the tensors that a block saves for gradients, without those in `exclude`.

    recompute: also forget the results of `ops.recompute` calls until the backward pass (§3.2.3).
    """
    saved = SavedTensors(exclude)
    hook = saved.recompute if recompute else None
    with saved_tensors_hooks(saved.pack, unpack), ops.recomputing_with(hook):
        yield saved
