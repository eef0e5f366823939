"""A forward pass in segments, so that communication between them can overlap with other work.

A segment is an ordinary autograd graph, detached at its inputs. Between segments there are
transfers. The backward pass runs both in reverse order. Forward and backward pass are generators
that yield while a transfer is in flight, so that the caller can compute something else before it
resumes them (§3.2.1). A segment's inputs and outputs are freed unless its autograd graph saved
them.
"""

from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3_ref.training.recompute import as_tuple

R = TypeVar("R")
Steps = Generator[None, None, R]  # yields while communication is in flight, returns an R
Grads = Sequence[Tensor | None]


class Differentiable(Protocol):
    """A part of the forward pass that a `Tape` records for the backward pass."""

    @property
    def backward(self) -> Callable[..., Steps[Grads]]:
        """The function from the gradients of the outputs to those of the inputs."""
        ...


class Transfer(Differentiable, Protocol):
    """Communication that a `Tape` records: tensors forward, and their gradients backward."""

    @property
    def forward(self) -> Callable[..., Steps[tuple[Tensor, ...]]]:
        """The function that sends tensors and returns those that arrive."""
        ...


class Tape:
    """The segments and transfers of one micro-batch in one stage, in order."""

    def __init__(self, training: bool = True):
        self.training = training
        self.records: list[tuple[Differentiable, list[int], list[int]]] = []
        self.grads: dict[int, Tensor] = {}
        self.ids, self.next_id = WeakTensorKeyDictionary(), count()

    def id_of(self, x: Tensor) -> int:
        """Return a number that identifies a tensor of this tape without keeping it in memory."""
        if x not in self.ids:
            self.ids[x] = next(self.next_id)
        return self.ids[x]

    def run(self, fn: Callable[..., R], *xs: Tensor) -> R:
        """Run fn(*xs) as a segment; return its tensor or tuple of tensors, detached."""
        if not self.training:
            with torch.no_grad():
                return fn(*xs)
        segment = GraphSegment(len(xs))
        with torch.enable_grad():
            results = fn(*(segment.enter(i, x) for i, x in enumerate(xs)))
        tensors = as_tuple(results)
        segment.ends = [get_gradient_edge(y) if y.requires_grad else None for y in tensors]
        outs = tuple(y.detach() for y in tensors)
        self.record(segment, xs, outs)
        return cast(R, outs if isinstance(results, tuple) else outs[0])

    def run_comm(self, transfer: Transfer, *xs: Tensor) -> Steps[tuple[Tensor, ...]]:
        """Run transfer.forward(*xs), yielding while it is in flight, and return its results."""
        outs = yield from transfer.forward(*xs)
        if self.training:
            self.record(transfer, xs, outs)
        return outs

    def record(self, part: Differentiable, xs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Append a segment or transfer, with its inputs and outputs by their ids."""
        self.records.append((part, [*map(self.id_of, xs)], [*map(self.id_of, outs)]))

    def add_grad(self, out: Tensor | int, grad: Tensor) -> None:
        """Add to the gradient of an output, which is given as a tensor or by its id."""
        key = out if isinstance(out, int) else self.id_of(out)
        self.grads[key] = self.grads[key] + grad if key in self.grads else grad

    def backward(self) -> Steps[None]:
        """Backpropagate the gradients of the outputs to the parameters and to the inputs."""
        while self.records:
            part, xs, outs = self.records.pop()
            grads = [self.grads.pop(out, None) for out in outs]
            input_grads = yield from part.backward(*grads)
            for x, g in zip(xs, input_grads):
                if g is not None:
                    self.add_grad(x, g)

    def pop_grad(self, x: Tensor | int) -> Tensor | None:
        """Return the gradient of an input, given as a tensor or by its id, after `backward`."""
        return self.grads.pop(x if isinstance(x, int) else self.id_of(x), None)


class GradCapture(torch.autograd.Function):
    """The identity y = x, which stores ∂L/∂y in `captured[index]`.

    A leaf tensor would capture its gradient too, but it would keep x in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, captured: list[Tensor | None], index: int
    ) -> Tensor:
        """Return x, with its own autograd node."""
        ctx.captured, ctx.index = captured, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        """Store ∂L/∂y."""
        ctx.captured[ctx.index] = grad
        return None, None, None, None


class GraphSegment:
    """An autograd graph: the gradient edges of its outputs, the captured gradients of n inputs."""

    def __init__(self, n: int):
        self.captured: list[Tensor | None] = [None] * n
        self.ends: list[GradientEdge | None] = []

    def enter(self, i: int, x: Tensor) -> Tensor:
        """Return x as the i-th input; only floating-point inputs have a gradient."""
        if not x.is_floating_point():
            return x
        anchor = torch.empty(0, requires_grad=True)
        return GradCapture.apply(anchor, x, self.captured, i)

    def backward(self, *grads: Tensor | None) -> Steps[Grads]:
        """Return the gradients of the inputs; a generator for the tape, which never yields."""
        known = [(end, g) for end, g in zip(self.ends, grads) if end and g is not None]
        if known:
            ends, known_grads = zip(*known)
            torch.autograd.backward(ends, known_grads)
        yield from ()
        return self.captured


def run_to_completion(steps: Steps[R]) -> R:
    """Run a generator, resuming it immediately where it yields; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def interleave(*generators: Steps[R]) -> list[R]:
    """Run generators in turns and return their results.

    While the messages of one are in flight, the others compute.
    """
    results: dict[int, R] = {}
    alive = list(enumerate(generators))
    while alive:
        for i, steps in tuple(alive):
            try:
                next(steps)
            except StopIteration as end:
                results[i] = end.value
                alive.remove((i, steps))
    return [results[i] for i in range(len(generators))]
