"""Runs a schedule of chapter 12 over real ranks: the same list of steps that is drawn there."""

from collections import defaultdict

import torch
import torch.distributed as dist

from dsv3_ref import ops
from dsv3_ref.dualpipe import Action, min_microbatches, rank_of_stage, schedule
from dsv3_ref.parallel.stage import Seen, Stage, Weights
from dsv3_ref.parallel.tape import Tape, interleave, run_to_completion
from dsv3_ref.parallel.watchdog import doing

# ── Messages ──


def target(op: Action, last: int) -> Action | None:
    """What the result of an operation is the input of: F of the next stage, B of the one before."""
    if op.kind == "F":
        return Action("F", op.stage + 1, op.microbatch) if op.stage < last else None
    return Action("B", op.stage - 1, op.microbatch) if op.kind in "BI" and op.stage > 0 else None


def messages(steps: list[list[tuple[Action, ...]]], last: int, at, rows: list[int]) -> dict:
    """(from rank, to rank) → inputs in the order in which they are sent; `at(op)`: its rank."""
    out = defaultdict(list)
    for src, mine in enumerate(steps):
        for key in (target(op, last) for step in mine for op in step):
            if key and at(key) != src and rows[key.microbatch]:
                out[src, at(key)].append(key)
    return out


class Post:
    """Messages of this rank. Both ends know the sender's order, so a message needs no address.

    Messages to higher ranks and to lower ones have a group each, and never wait for one another.
    """

    def __init__(self, mesh, orders: dict, at, shape_of, dtype):
        self.mesh, self.at, self.shape_of, self.dtype = mesh, at, shape_of, dtype
        self.coming = {
            src: list(keys) for (src, dst), keys in orders.items() if dst == mesh.pp_rank
        }
        self.here, self.asked, self.sent = {}, {}, []

    def put(self, key: Action, x: torch.Tensor) -> None:
        """Send it to its rank, or keep it if that is this one."""
        dst = self.at(key)
        if dst == self.mesh.pp_rank:
            self.here[key] = x
        elif x.numel():
            group = self.mesh.up_group if dst > self.mesh.pp_rank else self.mesh.down_group
            work = dist.isend(x.contiguous(), self.mesh.rank_of(dst), group=group)
            self.sent.append((work, x))

    def ask(self, key: Action) -> None:
        """Start to receive a message, and those that its sender sends before it."""
        for src, keys in self.coming.items():
            group = self.mesh.up_group if src < self.mesh.pp_rank else self.mesh.down_group
            while key in keys:
                x, first = self.empty(keys[0]), keys.pop(0)
                self.asked[first] = dist.irecv(x, self.mesh.rank_of(src), group=group), x

    def empty(self, key: Action) -> torch.Tensor:
        return torch.empty(self.shape_of(key.microbatch), dtype=self.dtype, device=self.mesh.device)

    def get(self, key: Action) -> torch.Tensor:
        """Wait for a message; one of no rows is never sent."""
        if key in self.here:
            return self.here.pop(key)
        self.ask(key)
        if key not in self.asked:
            return self.empty(key)
        work, x = self.asked.pop(key)
        src = self.at(key._replace(stage=key.stage + (1 if key.kind == "B" else -1)))
        with doing(f"message for {key.kind} of stage {key.stage}", [self.mesh.rank_of(src)]):
            work.wait()
        return x

    def close(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self.sent:
            work.wait()


# ── Steps ──


class Pipeline:
    """The stages of a rank, and how a batch goes through all of them."""

    def __init__(self, model, c, mesh, name: str, held: list[tuple[int, ...]], exchange=None,
                 special_tokens=None):  # fmt: skip
        self.mesh, self.name, self.config = mesh, name, c
        self.last = max(s for of_rank in held for s in of_rank)
        self.stages = {
            s: Stage(model, c, s, self.last + 1, exchange, special_tokens)
            for s in held[mesh.pp_rank]
        }
        self.dtype = next(model.parameters()).dtype

    def micros(self, n: int) -> int:
        """The least number of micro-batches, n or more, that the schedule can do."""
        return min_microbatches(self.name, self.mesh.pp, n)

    def run(
        self, micros: list[torch.Tensor], weights: list[Weights], training: bool = True
    ) -> Seen:
        """All steps of this rank over the micro-batches of its pipeline, rows of T + 1 tokens."""
        steps = schedule(self.name, self.mesh.pp, len(micros))
        if not training:
            only = lambda step: tuple(op for op in step if op.kind == "F")
            steps = [[kept for step in mine if (kept := only(step))] for mine in steps]
        at = lambda op: rank_of_stage(self.name, self.mesh.pp, len(micros), op.stage, op.microbatch)
        first = min(self.stages)
        orders = messages(steps, self.last, at, [len(m) for m in micros])
        shape = lambda m: (*self.stages[first].read(micros[m]).shape, self.config.dim)
        one = Pass(self, micros, weights, Post(self.mesh, orders, at, shape, self.dtype), training)
        mine = steps[self.mesh.pp_rank]
        for step, following in zip(mine, [*mine[1:], ()]):
            one.expect(step + following)
            one.do(step)
        one.post.close()
        return one.seen


class Pass:
    """One batch on its way: what lies between the steps."""

    def __init__(self, pipeline: Pipeline, micros, weights, post: Post, training: bool):
        self.pipeline, self.micros, self.weights, self.post = pipeline, micros, weights, post
        self.training, self.seen = training, Seen()
        self.open: dict[tuple[int, int], tuple] = {}  # (stage, micro): tape, two marks
        self.later: dict[tuple[int, int], list] = {}  # and the Wgrads put off

    def expect(self, ops_: tuple[Action, ...]) -> None:
        """Start to receive what these operations need."""
        for op in ops_:
            enters = op.stage == (0 if op.kind == "F" else self.pipeline.last)
            if op.kind != "W" and not enters:
                self.post.ask(Action("F" if op.kind == "F" else "B", op.stage, op.microbatch))

    def do(self, step: tuple[Action, ...]) -> None:
        """One operation, or two in turns; then what they made goes on its way."""
        kinds = {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.matrices}
        made = interleave(*(kinds[op.kind](op) for op in step))
        for op, x in zip(step, made):
            if key := target(op, self.pipeline.last):
                self.post.put(key, x)

    def forward(self, op: Action):
        """F: a generator; returns the stage's output."""
        stage, tape = self.pipeline.stages[op.stage], Tape(self.training)
        x = None if stage.first else self.post.get(op)
        args = self.micros[op.microbatch], self.weights[op.microbatch], self.seen
        y = yield from stage.forward(tape, x, *args)
        if self.training:
            self.open[op.stage, op.microbatch] = (
                tape,
                x if x is None else tape.id_of(x),
                tape.id_of(y),
            )
        return y

    def backward(self, op: Action):
        """B: a generator; returns ∂L/∂ of the stage's input."""
        tape, x, y = self.open.pop((op.stage, op.microbatch))
        if op.stage < self.pipeline.last:
            tape.add_grad(y, self.post.get(Action("B", op.stage, op.microbatch)))
        yield from tape.backward()
        return None if x is None else tape.pop_grad(x)

    def inputs(self, op: Action):
        """I: a backward pass that puts off the gradients of matrices."""
        with ops.deferring_wgrads() as self.later[op.stage, op.microbatch]:
            return run_to_completion(self.backward(op))
        yield

    def matrices(self, op: Action):
        """W: the gradients put off."""
        with torch.no_grad():
            for weight, wgrad in self.later.pop((op.stage, op.microbatch)):
                weight.grad += wgrad()
        return
        yield
