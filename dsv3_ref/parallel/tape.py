"""A forward pass in segments, so that communication between them can overlap with other work.

A segment is an ordinary autograd graph, detached at its inputs. Between segments lie transfers. The
tape runs both backwards. Forward and backward are generators that yield while a transfer is in
flight: the caller may compute something else before it asks for the next segment (§3.2.1). A
segment's inputs and outputs are freed unless its autograd graph saved them.
"""

from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3_ref.training.recompute import as_tuple

Grads = list[Tensor | None]
Steps = Generator[None, None, Any]  # yields while communication is in flight, returns a result


class Transfer(Protocol):
    """Communication that a `Tape` records: tensors forward, and their gradients backward."""

    @property
    def forward(self) -> Callable[..., Steps]: ...

    @property
    def backward(self) -> Callable[..., Steps]: ...


class Tape:
    """The segments and transfers of one micro-batch in one stage, in order."""

    def __init__(self, training: bool = True):
        self.training = training
        self.records: list[tuple[Any, list[int], list[int]]] = []
        self.grads: dict[int, Tensor] = {}
        self.ids, self.next_id = WeakTensorKeyDictionary(), count()

    def id_of(self, x: Tensor) -> int:
        """Return a number that stands for a tensor of this tape without keeping it alive."""
        if x not in self.ids:
            self.ids[x] = next(self.next_id)
        return self.ids[x]

    def run(self, fn: Callable, *xs: Tensor) -> Any:
        """Run fn(*xs) as a segment and return its results, detached from the graph."""
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
        return outs if isinstance(results, tuple) else outs[0]

    def run_comm(self, transfer: Transfer, *xs: Tensor) -> Steps:
        """Run transfer.forward(*xs), yielding while it is in flight, and return its results."""
        outs = yield from transfer.forward(*xs)
        if self.training:
            self.record(transfer, xs, outs)
        return outs

    def record(self, part: Any, xs: tuple[Tensor, ...], outs: tuple[Tensor, ...]) -> None:
        """Append a segment or transfer, with its inputs and outputs by their ids."""
        self.records.append((part, [*map(self.id_of, xs)], [*map(self.id_of, outs)]))

    def add_grad(self, out: Tensor | int, grad: Tensor) -> None:
        """Add to ∂L/∂out; out: a tensor or its id."""
        key = out if isinstance(out, int) else self.id_of(out)
        self.grads[key] = self.grads[key] + grad if key in self.grads else grad

    def backward(self) -> Steps:
        """Backpropagate the gradients of the results to the parameters and to the inputs."""
        while self.records:
            part, xs, outs = self.records.pop()
            grads = [self.grads.pop(out, None) for out in outs]
            input_grads = yield from part.backward(*grads)
            for x, g in zip(xs, input_grads):
                if g is not None:
                    self.add_grad(x, g)

    def pop_grad(self, x: Tensor | int) -> Tensor | None:
        """Return ∂L/∂x of an input after the backward pass; x: a tensor or its id."""
        return self.grads.pop(x if isinstance(x, int) else self.id_of(x), None)


class GradCapture(torch.autograd.Function):
    """y = x, with ∂L/∂y stored in `captured[index]`; a leaf would do the same but keep x in memory."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, captured: Grads, index: int) -> Tensor:
        """Return x, with an autograd node of its own."""
        ctx.captured, ctx.index = captured, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        """Store ∂L/∂y."""
        ctx.captured[ctx.index] = grad
        return None, None, None, None


class GraphSegment:
    """An autograd graph by its gradient edges, and the gradients captured at its n inputs."""

    def __init__(self, n: int):
        self.captured: Grads = [None] * n
        self.ends: list = []

    def enter(self, i: int, x: Tensor) -> Tensor:
        """Return x as the i-th input; only floating-point inputs have a gradient."""
        if not x.is_floating_point():
            return x
        anchor = torch.empty(0, requires_grad=True)
        return GradCapture.apply(anchor, x, self.captured, i)

    def backward(self, *grads: Tensor | None) -> Steps:
        """Return the gradients of the inputs; a generator like a transfer's, but it never yields."""
        known = [(end, g) for end, g in zip(self.ends, grads) if end and g is not None]
        if known:
            ends, known_grads = zip(*known)
            torch.autograd.backward(ends, known_grads)
        yield from ()
        return self.captured


def run_to_completion(steps: Steps) -> Any:
    """Run a generator without doing anything else where it yields; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def interleave(*generators: Steps) -> list:
    """Run generators in turns and return their results.

    While the messages of one are in flight, the others compute.
    """
    results: list[Any] = [None] * len(generators)
    alive = list(enumerate(generators))
    while alive:
        for i, steps in tuple(alive):
            try:
                next(steps)
            except StopIteration as end:
                results[i] = end.value
                alive.remove((i, steps))
    return results
