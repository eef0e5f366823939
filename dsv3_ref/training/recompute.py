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
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3_ref import ops


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return a tuple as it is, and anything else as a tuple of one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class SavedTensor:
    """A tensor that autograd has saved, or the call that computes it again."""

    def __init__(self, x: torch.Tensor):
        self.x: torch.Tensor | None = x
        self.view = x.shape, x.stride(), x.storage_offset()
        self.call: RecomputedOutputs | None = None
        self.i = 0

    def compute_by(self, call: "RecomputedOutputs", i: int) -> None:
        """Release the tensor; it is a view of output i of the call."""
        self.x = None
        self.call, self.i = call, i
        call.num_saved += 1

    def read(self) -> torch.Tensor:
        """Return the tensor."""
        if self.x is not None:
            return self.x
        assert self.call is not None, "a saved tensor has a value or a call"
        y = self.call.read(self.i)
        is_whole = (y.shape, y.stride(), y.storage_offset()) == self.view
        return y if is_whole else y.as_strided(*self.view)


class RecomputedOutputs:
    """The outputs of a call fn(*args), computed again when the backward pass reads them.

    `pack` saves the arguments, which may be outputs of other such calls. The outputs are freed
    once each saved reference has been read.
    """

    def __init__(self, fn: Callable, args: tuple[Any, ...], pack: Callable[[Any], Any]):
        device = next(x for x in args if isinstance(x, torch.Tensor)).device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.fn, self.args = fn, [pack(x) for x in args]
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.num_saved = self.num_read = 0

    def read(self, i: int) -> torch.Tensor:
        """Return output i; the first read computes all of them."""
        if not self.outputs:
            with torch.enable_grad(), self.autocast:
                outputs = self.fn(*map(unpack, self.args))
            self.outputs = tuple(y.detach() for y in as_tuple(outputs))
        y = self.outputs[i]
        self.num_read = (self.num_read + 1) % self.num_saved
        if not self.num_read:
            self.outputs = ()
        return y


def unpack(x: Any) -> Any:
    """Return the value for which `SavedTensors.pack` returned x."""
    return x.read() if isinstance(x, SavedTensor) else x


class SavedTensors:
    """The tensors that a forward pass has saved for its backward pass."""

    def __init__(self, exclude: Iterable[torch.Tensor] = ()):
        # by the address of a storage: the call and output; all that was saved, and its bytes
        self.calls: dict[int, tuple[RecomputedOutputs, int, StorageWeakRef]] = {}
        self.storages: dict[int, tuple[StorageWeakRef, int, WeakSet[SavedTensor]]] = {}
        self.excluded = {w.untyped_storage()._cdata for w in exclude}

    def pack(self, x: Any) -> Any:
        """Return what autograd saves for x: a `SavedTensor` for a tensor, else x."""
        if not isinstance(x, torch.Tensor):
            return x
        saved, memory = SavedTensor(x), x.untyped_storage()
        if memory._cdata in self.calls:
            call, i, _ = self.calls[memory._cdata]
            saved.compute_by(call, i)
            return saved
        if memory._cdata not in self.storages or self.storages[memory._cdata][0].expired():
            self.storages[memory._cdata] = StorageWeakRef(memory), memory.nbytes(), WeakSet()
        self.storages[memory._cdata][2].add(saved)
        return saved

    def unpack(self, x: Any) -> Any:
        """Return the value for which `pack` returned x."""
        self.forget_freed_outputs()
        return unpack(x)

    def forget_freed_outputs(self) -> None:
        """Drop the calls none of whose outputs can be saved any more."""
        freed = [address for address, (*_, memory) in self.calls.items() if memory.expired()]
        for address in freed:
            del self.calls[address]

    def recompute(self, fn: Callable, args: tuple[Any, ...]) -> Any:
        """Call fn(*args) and record the call, so that `pack` saves it in place of its outputs.

        An output that a call inside of fn has recorded stays with that call.
        """
        if not torch.is_grad_enabled():
            return fn(*args)
        self.forget_freed_outputs()
        call, y = RecomputedOutputs(fn, args, self.pack), fn(*args)
        for i, output in enumerate(as_tuple(y)):
            memory = output.untyped_storage()
            if not self.is_recomputed(output):
                self.calls[memory._cdata] = call, i, StorageWeakRef(memory)
        return y

    def is_recomputed(self, x: torch.Tensor) -> bool:
        """Return whether x is, or is a view of, an output of a recorded call."""
        address = x.untyped_storage()._cdata
        return address in self.calls and not self.calls[address][2].expired()

    def replace(self, x: torch.Tensor, fn: Callable, args: tuple[Any, ...]) -> None:
        """Save the call fn(*args) in place of x, also where x has already been saved.

        Nothing is replaced unless x is contiguous and alone in its storage.
        """
        memory = x.untyped_storage()
        is_whole = x.is_contiguous() and x.nbytes == memory.nbytes()
        if not torch.is_grad_enabled() or not is_whole:
            return
        call = RecomputedOutputs(fn, args, self.pack)
        self.calls[memory._cdata] = call, 0, StorageWeakRef(memory)
        if memory._cdata in self.storages:
            *_, handles = self.storages.pop(memory._cdata)
            for saved in handles:
                saved.compute_by(call, 0)

    @property
    def bytes(self) -> int:
        """The number of bytes still saved, without the excluded tensors."""
        self.forget_freed_outputs()
        total = 0
        for address, (memory, size, handles) in self.storages.items():
            if handles and not memory.expired() and address not in self.excluded:
                total += size
        return total


@contextmanager
def saved_tensors(recompute: bool, exclude: Iterable[torch.Tensor] = ()) -> Iterator[SavedTensors]:
    """Record the tensors that a block saves for its backward pass, except those in `exclude`.

    recompute: do not save the outputs of `ops.recompute` calls but recompute them (§3.2.3).
    """
    saved = SavedTensors(exclude)
    hook = saved if recompute else None
    with saved_tensors_hooks(saved.pack, saved.unpack), ops.recomputing_with(hook):
        yield saved
