"""A forward pass in pieces, so that what travels between them can overlap with other work.

A piece is an ordinary autograd graph, cut off at its inputs. Between pieces lie transfers. The tape
plays both backwards. Forward and backward are generators that yield wherever something is under
way: whoever runs them may compute something else before asking for the next piece (§3.2.1).
"""

from collections.abc import Generator

import torch

from dsv3_ref.ops import several


class Tape:
    """The pieces and transfers of one micro-batch in one stage, in order."""

    def __init__(self, training: bool = True):
        self.training, self.records, self.grads = training, [], {}

    def run(self, fn, *xs):
        """fn(*xs) as a piece of its own; results are cut off from it."""
        if not self.training:
            with torch.no_grad():
                return fn(*xs)
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in xs]
        with torch.enable_grad():
            made = fn(*leaves)
        ys = several(made)
        outs = tuple(y.detach() for y in ys)
        self.records.append((Piece(leaves, ys), xs, outs))
        return outs if isinstance(made, tuple) else outs[0]

    def send(self, transfer, *xs) -> Generator:
        """transfer.forward(*xs), which yields while it is under way; returns its results."""
        outs = yield from transfer.forward(*xs)
        if self.training:
            self.records.append((transfer, xs, outs))
        return outs

    def owes(self, out: torch.Tensor, grad) -> None:
        """∂L/∂out, or a part of it."""
        before = self.grads.get(id(out))
        self.grads[id(out)] = grad if before is None else before + grad

    def backward(self) -> Generator:
        """From what the results owe to parameters' gradients, and to what the inputs owe."""
        while self.records:
            record, xs, outs = self.records.pop()
            gs = [self.grads.pop(id(out), None) for out in outs]
            for x, g in zip(xs, (yield from record.backward(*gs))):
                if g is not None:
                    self.owes(x, g)

    def owed(self, x: torch.Tensor):
        """∂L/∂x of an input, once the backward pass is over."""
        return self.grads.pop(id(x), None)


class Piece:
    """Results with their graph, and the leaves where it was cut."""

    def __init__(self, leaves, ys):
        self.leaves, self.ys = leaves, ys

    def backward(self, *gs) -> Generator:
        """Gradients of the leaves; nothing to wait for."""
        known = [(y, g) for y, g in zip(self.ys, gs) if g is not None and y.requires_grad]
        if known:
            torch.autograd.backward(*zip(*known))
        return [leaf.grad for leaf in self.leaves]
        yield  # a generator, as a transfer's backward is


def drain(steps: Generator):
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
