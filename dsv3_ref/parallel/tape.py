"""A forward pass in pieces, so that what travels between them can overlap with other work.

A piece is an ordinary autograd graph, cut off at its inputs. Between pieces lie transfers. The tape
plays both backwards. Forward and backward are generators that yield wherever something is under
way: whoever runs them may compute something else before asking for the next piece (§3.2.1).
Of inputs and results of a piece only that stays in memory which its graph saves.
"""

from collections.abc import Generator
from itertools import count

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from dsv3_ref.training.recompute import as_tuple


class Tape:
    """The pieces and transfers of one micro-batch in one stage, in order."""

    def __init__(self, training: bool = True):
        self.training, self.records, self.grads = training, [], {}
        self.ids, self.next_id = WeakTensorKeyDictionary(), count()

    def id_of(self, x: torch.Tensor) -> int:
        """What stands for a tensor of this tape, so that it need not be kept."""
        if x not in self.ids:
            self.ids[x] = next(self.next_id)
        return self.ids[x]

    def run(self, fn, *xs):
        """fn(*xs) as a piece of its own; results are cut off from it."""
        if not self.training:
            with torch.no_grad():
                return fn(*xs)
        piece = GraphSegment(len(xs))
        with torch.enable_grad():
            made = fn(*(piece.enter(i, x) for i, x in enumerate(xs)))
        piece.ends = [get_gradient_edge(y) if y.requires_grad else None for y in as_tuple(made)]
        outs = tuple(y.detach() for y in as_tuple(made))
        self.record(piece, xs, outs)
        return outs if isinstance(made, tuple) else outs[0]

    def run_comm(self, transfer, *xs) -> Generator:
        """transfer.forward(*xs), which yields while it is under way; returns its results."""
        outs = yield from transfer.forward(*xs)
        if self.training:
            self.record(transfer, xs, outs)
        return outs

    def record(self, part, xs, outs) -> None:
        self.records.append((part, [*map(self.id_of, xs)], [*map(self.id_of, outs)]))

    def add_grad(self, out: torch.Tensor | int, grad) -> None:
        """∂L/∂out, or a part of it; out: a tensor or its mark."""
        out = out if isinstance(out, int) else self.id_of(out)
        self.grads[out] = self.grads[out] + grad if out in self.grads else grad

    def backward(self) -> Generator:
        """From what the results owe to parameters' gradients, and to what the inputs owe."""
        while self.records:
            part, xs, outs = self.records.pop()
            gs = [self.grads.pop(out, None) for out in outs]
            for x, g in zip(xs, (yield from part.backward(*gs))):
                if g is not None:
                    self.add_grad(x, g)

    def pop_grad(self, x: torch.Tensor | int):
        """∂L/∂x of an input, once the backward pass is over; x: a tensor or its mark."""
        return self.grads.pop(x if isinstance(x, int) else self.id_of(x), None)


class GradCapture(torch.autograd.Function):
    """y = x, and ∂L/∂y goes to `caught[i]`; a leaf would do the same and hold x in memory."""

    @staticmethod
    def forward(ctx, door, x, caught, i):
        ctx.caught, ctx.i = caught, i
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.caught[ctx.i] = g
        return None, None, None, None


class GraphSegment:
    """A graph by its ends, and the gradients caught where it was cut."""

    def __init__(self, n: int):
        self.caught, self.ends = [None] * n, []

    def enter(self, i: int, x: torch.Tensor):
        """x as the i-th input; only floating-point numbers have a gradient."""
        if not x.is_floating_point():
            return x
        return GradCapture.apply(torch.empty(0, requires_grad=True), x, self.caught, i)

    def backward(self, *gs) -> Generator:
        """Gradients of the inputs; nothing to wait for."""
        known = [(end, g) for end, g in zip(self.ends, gs) if end and g is not None]
        if known:
            torch.autograd.backward(*zip(*known))
        return self.caught
        yield  # a generator, as a transfer's backward is


def run_to_completion(steps: Generator):
    """Run a generator to its end, waiting wherever it would."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


def interleave(*many: Generator) -> list:
    """Run generators in turns: while one's messages travel, the others compute; their results."""
    results, alive = [None] * len(many), list(enumerate(many))
    while alive:
        for i, steps in tuple(alive):
            try:
                next(steps)
            except StopIteration as end:
                results[i] = end.value
                alive.remove((i, steps))
    return results
