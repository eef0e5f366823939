"""Runs a schedule of chapter 12 over real ranks: the same list of steps that is drawn there."""

from collections import defaultdict

import torch
import torch.distributed as dist

from dsv3_ref import ops
from dsv3_ref.dualpipe import Action, min_microbatches, rank_of_stage, schedule
from dsv3_ref.parallel.stage import LossStats, LossWeights, Stage
from dsv3_ref.parallel.tape import Tape, interleave, run_to_completion
from dsv3_ref.parallel.watchdog import track_operation

# ── Messages ──


def consumer_of(op: Action, last: int) -> Action | None:
    """What the result of an operation is the input of: F of the next stage, B of the one before."""
    if op.kind == "F":
        return Action("F", op.stage + 1, op.microbatch) if op.stage < last else None
    return Action("B", op.stage - 1, op.microbatch) if op.kind in "BI" and op.stage > 0 else None


def send_order(steps: list[list[tuple[Action, ...]]], last: int, at, rows: list[int]) -> dict:
    """(from rank, to rank) → inputs in the order in which they are sent; `at(op)`: its rank."""
    out = defaultdict(list)
    for src, mine in enumerate(steps):
        for key in (consumer_of(op, last) for step in mine for op in step):
            if key and at(key) != src and rows[key.microbatch]:
                out[src, at(key)].append(key)
    return out


class P2PCommunicator:
    """Messages of this rank. Both ends know the sender's order, so a message needs no address.

    Messages to higher ranks and to lower ones have a group each, and never wait for one another.
    """

    def __init__(self, mesh, orders: dict, at, shape_of, dtype):
        self.mesh, self.rank_of_action, self.shape_of, self.dtype = mesh, at, shape_of, dtype
        self.expected = {
            src: list(keys) for (src, dst), keys in orders.items() if dst == mesh.pp_rank
        }
        self.local, self.pending, self.sent = {}, {}, []

    def send(self, key: Action, x: torch.Tensor) -> None:
        """Send it to its rank, or keep it if that is this one."""
        dst = self.rank_of_action(key)
        if dst == self.mesh.pp_rank:
            self.local[key] = x
        elif x.numel():
            group = self.mesh.up_group if dst > self.mesh.pp_rank else self.mesh.down_group
            work = dist.isend(x.contiguous(), self.mesh.rank_of(dst), group=group)
            self.sent.append((work, x))

    def post_recv(self, key: Action) -> None:
        """Start to receive a message, and those that its sender sends before it."""
        for src, keys in self.expected.items():
            group = self.mesh.up_group if src < self.mesh.pp_rank else self.mesh.down_group
            while key in keys:
                x, first = self.empty_message(keys[0]), keys.pop(0)
                self.pending[first] = dist.irecv(x, self.mesh.rank_of(src), group=group), x

    def empty_message(self, key: Action) -> torch.Tensor:
        return torch.empty(self.shape_of(key.microbatch), dtype=self.dtype, device=self.mesh.device)

    def wait_recv(self, key: Action) -> torch.Tensor:
        """Wait for a message; one of no rows is never sent."""
        if key in self.local:
            return self.local.pop(key)
        self.post_recv(key)
        if key not in self.pending:
            return self.empty_message(key)
        work, x = self.pending.pop(key)
        src = self.rank_of_action(key._replace(stage=key.stage + (1 if key.kind == "B" else -1)))
        with track_operation(
            f"message for {key.kind} of stage {key.stage}", [self.mesh.rank_of(src)]
        ):
            work.wait()
        return x

    def close(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self.sent:
            work.wait()


# ── Steps ──


class Pipeline:
    """The stages of a rank, and how a batch goes through all of them."""

    def __init__(self, model, c, mesh, name: str, stages_by_rank: list[tuple[int, ...]], token_dispatcher=None,
                 special_tokens=None):  # fmt: skip
        self.mesh, self.name, self.config = mesh, name, c
        self.last = max(s for of_rank in stages_by_rank for s in of_rank)
        self.stages = {
            s: Stage(model, c, s, self.last + 1, token_dispatcher, special_tokens)
            for s in stages_by_rank[mesh.pp_rank]
        }
        self.dtype = next(model.parameters()).dtype

    def min_microbatches(self, n: int) -> int:
        """The least number of micro-batches, n or more, that the schedule can do."""
        return min_microbatches(self.name, self.mesh.pp, n)

    def run(
        self, microbatches: list[torch.Tensor], weights: list[LossWeights], training: bool = True
    ) -> LossStats:
        """All steps of this rank over the micro-batches of its pipeline, rows of T + 1 tokens."""
        steps = schedule(self.name, self.mesh.pp, len(microbatches))
        if not training:
            only = lambda step: tuple(op for op in step if op.kind == "F")
            steps = [[kept for step in mine if (kept := only(step))] for mine in steps]
        at = lambda op: rank_of_stage(
            self.name, self.mesh.pp, len(microbatches), op.stage, op.microbatch
        )
        first = min(self.stages)
        orders = send_order(steps, self.last, at, [len(m) for m in microbatches])
        shape = lambda m: (*self.stages[first].model_input(microbatches[m]).shape, self.config.dim)
        pipeline_run = PipelineRun(
            self,
            microbatches,
            weights,
            P2PCommunicator(self.mesh, orders, at, shape, self.dtype),
            training,
        )
        mine = steps[self.mesh.pp_rank]
        for step, following in zip(mine, [*mine[1:], ()]):
            pipeline_run.post_recvs(step + following)
            pipeline_run.run_step(step)
        pipeline_run.p2p.close()
        return pipeline_run.stats


class PipelineRun:
    """One batch on its way: what lies between the steps."""

    def __init__(
        self, pipeline: Pipeline, microbatches, weights, p2p: P2PCommunicator, training: bool
    ):
        self.pipeline, self.microbatches, self.weights, self.p2p = (
            pipeline,
            microbatches,
            weights,
            p2p,
        )
        self.training, self.stats = training, LossStats()
        self.open: dict[tuple[int, int], tuple] = {}  # (stage, micro): tape, two marks
        self.deferred_wgrads: dict[tuple[int, int], list] = {}  # and the Wgrads put off

    def post_recvs(self, ops_: tuple[Action, ...]) -> None:
        """Start to receive what these operations need."""
        for op in ops_:
            enters = op.stage == (0 if op.kind == "F" else self.pipeline.last)
            if op.kind != "W" and not enters:
                self.p2p.post_recv(Action("F" if op.kind == "F" else "B", op.stage, op.microbatch))

    def run_step(self, step: tuple[Action, ...]) -> None:
        """One operation, or two in turns; then what they made goes on its way."""
        kinds = {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward_input,
            "W": self.backward_weight,
        }
        made = interleave(*(kinds[op.kind](op) for op in step))
        for op, x in zip(step, made):
            if key := consumer_of(op, self.pipeline.last):
                self.p2p.send(key, x)

    def forward(self, op: Action):
        """F: a generator; returns the stage's output."""
        stage, tape = self.pipeline.stages[op.stage], Tape(self.training)
        x = None if stage.first else self.p2p.wait_recv(op)
        args = self.microbatches[op.microbatch], self.weights[op.microbatch], self.stats
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
            tape.add_grad(y, self.p2p.wait_recv(Action("B", op.stage, op.microbatch)))
        yield from tape.backward()
        return None if x is None else tape.pop_grad(x)

    def backward_input(self, op: Action):
        """I: a backward pass that puts off the gradients of matrices."""
        with ops.deferring_wgrads() as self.deferred_wgrads[op.stage, op.microbatch]:
            return run_to_completion(self.backward(op))
        yield

    def backward_weight(self, op: Action):
        """W: the gradients put off."""
        with torch.no_grad():
            for weight, wgrad in self.deferred_wgrads.pop((op.stage, op.microbatch)):
                weight.grad += wgrad()
        return
        yield
