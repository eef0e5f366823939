"""Saved tensors of a training step: count their bytes, and recompute the cheap ones.

The model marks cheap operations by `ops.recompute(fn, *args)`. Inside
`saved_tensors(recompute=True)` each result of such a call is recorded with the call. PyTorch's
saved-tensor hooks then pass every tensor that autograd saves through `SavedTensors.pack`, and
every saved tensor that the backward pass reads through `unpack`. A result is identified by its
storage, so that its views (a transpose, one head's part) are recognized. A weak reference to the
storage tells when it has been freed, because its address may then belong to another tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3_ref import ops


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return a tuple as it is, and anything else as a tuple of one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class RecomputedOutputs:
    """The outputs of a call fn(*args), computed again when the backward pass reads them.

    `pack` stores the arguments, which may be outputs of other such calls. The outputs are freed
    once each saved reference has been read.
    """

    def __init__(self, fn: Callable, args: tuple[Any, ...], pack: Callable[[Any], Any]):
        device = next(x for x in args if isinstance(x, torch.Tensor)).device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.fn, self.args = fn, [pack(x) for x in args]
        self.outputs: tuple[Any, ...] = ()
        self.num_saved = self.num_read = 0

    def read(self, i: int) -> torch.Tensor:
        """Return output i; the first read computes all of them."""
        if not self.outputs:
            with torch.enable_grad(), self.autocast:
                self.outputs = as_tuple(self.fn(*map(unpack, self.args)))
        y = self.outputs[i].detach()
        self.num_read = (self.num_read + 1) % self.num_saved
        if not self.num_read:
            self.outputs = ()
        return y


def unpack(x: Any) -> Any:
    """Return the tensor for which `SavedTensors.pack` returned x."""
    if not isinstance(x, tuple):
        return x
    call, i, view = x
    return call.read(i).as_strided(*view)


class SavedTensors:
    """The tensors that a forward pass has saved for its backward pass."""

    def __init__(self, exclude: Iterable[torch.Tensor] = ()):
        self.calls: dict[int, tuple[RecomputedOutputs, int, StorageWeakRef]] = {}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.excluded = {w.untyped_storage()._cdata for w in exclude}

    def pack(self, x: Any) -> Any:
        """Return x or, if a recorded call made it, (call, output, view) for autograd to save."""
        if not isinstance(x, torch.Tensor):
            return x
        memory = x.untyped_storage()
        if memory._cdata in self.calls:
            call, i, _ = self.calls[memory._cdata]
            call.num_saved += 1
            return call, i, (x.shape, x.stride(), x.storage_offset())
        self.storages[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        return x

    def recompute(self, fn: Callable, args: tuple[Any, ...]) -> Any:
        """Call fn(*args) and record the call, so that `pack` stores it in place of its outputs."""
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
        """The number of bytes still saved, without the excluded tensors."""
        live = {k: n for k, (ref, n) in self.storages.items() if not ref.expired()}
        return sum(n for k, n in live.items() if k not in self.excluded)


@contextmanager
def saved_tensors(recompute: bool, exclude: Iterable[torch.Tensor] = ()) -> Iterator[SavedTensors]:
    """Record the tensors that a block saves for its backward pass, except those in `exclude`.

    recompute: do not save the outputs of `ops.recompute` calls but recompute them (§3.2.3).
    """
    saved = SavedTensors(exclude)
    hook = saved.recompute if recompute else None
    with saved_tensors_hooks(saved.pack, unpack), ops.recomputing_with(hook):
        yield saved
