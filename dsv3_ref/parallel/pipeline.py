"""Execution of the schedules of chapter 12 over real ranks, with the same lists of steps."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dsv3_ref import ops
from dsv3_ref.config import Config, ceil_div
from dsv3_ref.dualpipe import (
    Action,
    Step,
    iter_actions,
    min_microbatches,
    rank_of_stage,
    schedule,
)
from dsv3_ref.model import Transformer
from dsv3_ref.parallel.bucket import residual_dtype
from dsv3_ref.parallel.build import count_stages
from dsv3_ref.parallel.context_parallel import SequencePart
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.parallel.rows import LocalRows
from dsv3_ref.parallel.stage import (
    LossStats,
    LossWeights,
    MicroBatch,
    Stage,
    TapeDispatcher,
)
from dsv3_ref.parallel.tape import R, Steps, Tape, interleave, run_to_completion
from dsv3_ref.parallel.token_dispatcher import AllToAllDispatcher
from dsv3_ref.parallel.watchdog import track_operation
from dsv3_ref.training.objective import (
    NEXT_TOKEN_LOSS,
    NextTokenLoss,
    Objective,
    Readout,
    RowBatch,
    tensors_to,
)

MICRO_BATCH_TOKENS = 4096  # of a rank, by default (a row of V3)

# ── Messages ──

SendOrder = dict[
    tuple[int, int], list[Action]
]  # (source, destination): actions that need a message


def consumer_of(action: Action, last: int) -> Action | None:
    """Return the action that needs this one's result: F of the next stage, B of the previous one.

    It is None at the ends of the pipeline, and for W.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return Action("F", stage + 1, microbatch) if stage < last else None
    return Action("B", stage - 1, microbatch) if kind in "BI" and stage > 0 else None


def message_for(action: Action, last: int) -> Action | None:
    """Return the message that an action needs, as `consumer_of` names it; None if it needs none."""
    kind, stage, microbatch = action
    if kind == "F":
        return action if stage > 0 else None
    return Action("B", stage, microbatch) if kind in "BI" and stage < last else None


def send_order(
    steps: list[list[Step]], last: int, rank_of: Callable[[Action], int], num_tokens: list[int]
) -> SendOrder:
    """Return the actions whose inputs a rank sends to another rank, in the order of sending.

    rank_of: the rank of an action; num_tokens: of each micro-batch. Empty ones are not sent.
    """
    order: SendOrder = defaultdict(list)
    for source, rank_steps in enumerate(steps):
        for action in iter_actions([rank_steps]):
            consumer = consumer_of(action, last)
            if consumer and rank_of(consumer) != source and num_tokens[consumer.microbatch]:
                order[source, rank_of(consumer)].append(consumer)
    return order


def find_receipts(
    steps: list[list[Step]], last: int, order: SendOrder, rank: int
) -> dict[Action, list[Action]]:
    """Return, for each message to a rank, which of its own messages have arrived by then.

    A rank sends the results of a step after it has consumed the inputs of that step and of all
    before it. A message from it is therefore a receipt for those inputs.
    """
    receipts: dict[Action, list[Action]] = {}
    for peer, peer_steps in enumerate(steps):
        sent, expected = set(order.get((rank, peer), ())), set(order.get((peer, rank), ()))
        arrived: list[Action] = []
        for step in peer_steps:
            inputs = [message_for(action, last) for action in step]
            arrived += [message for message in inputs if message in sent]
            for consumer in (consumer_of(action, last) for action in step):
                if consumer in expected:
                    receipts[consumer], arrived = arrived, []
    return receipts


class P2PCommunicator:
    """The point-to-point messages of this rank.

    Sender and receiver derive the same message order from the schedule, so messages carry no tags.
    Messages to higher and to lower ranks use different groups, so they never wait for each other.

    A sent message is released at its receipt, or as soon as NCCL reports that it has arrived. gloo
    reports nothing: while no message comes back, as in GPipe's forward passes, all are kept.
    """

    def __init__(
        self, mesh: Mesh, order: SendOrder, receipts: dict[Action, list[Action]],
        rank_of: Callable[[Action], int], shape_of: Callable[[int], tuple[int, ...]],
        dtype: torch.dtype,
    ):  # fmt: skip
        self.mesh, self.dtype = mesh, dtype
        self.receipts = receipts
        self.rank_of, self.shape_of = rank_of, shape_of
        self.expected = {
            source: list(actions)
            for (source, destination), actions in order.items()
            if destination == mesh.pp_rank
        }
        self.local: dict[Action, Tensor] = {}
        self.pending: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.sent: dict[Action, tuple[dist.Work, Tensor]] = {}  # on their way

    def send(self, action: Action, x: Tensor) -> None:
        """Send the input of an action to its rank, or keep it if that is this rank."""
        destination = self.rank_of(action)
        if destination == self.mesh.pp_rank:
            self.local[action] = x
        elif x.numel():
            up = destination > self.mesh.pp_rank
            group = self.mesh.up_group if up else self.mesh.down_group
            self.release([a for a, (work, _) in self.sent.items() if work.is_completed()])
            x = x.contiguous()
            work = dist.isend(x, self.mesh.rank_of(destination), group=group)
            assert work is not None
            self.sent[action] = work, x

    def release(self, arrived: Iterable[Action]) -> None:
        """Drop messages that have arrived.

        `wait` returns at once. It orders the stream that will reuse the memory after the transfer,
        and makes the work drop its own reference to the tensor.
        """
        for action in arrived:
            if action in self.sent:
                work, _ = self.sent.pop(action)
                work.wait()

    def post_recv(self, action: Action) -> None:
        """Start to receive the input of an action and all that its sender sends before it."""
        for source, actions in self.expected.items():
            up = source < self.mesh.pp_rank
            group = self.mesh.up_group if up else self.mesh.down_group
            while action in actions:
                first = actions.pop(0)
                x = self.empty_message(first)
                work = dist.irecv(x, self.mesh.rank_of(source), group=group)
                assert work is not None
                self.pending[first] = work, x

    def empty_message(self, action: Action) -> Tensor:
        """Return an uninitialized tensor for the input of an action."""
        shape = self.shape_of(action.microbatch)
        return torch.empty(shape, dtype=self.dtype, device=self.mesh.device)

    def wait_recv(self, action: Action) -> Tensor:
        """Wait for the input of an action and return it; inputs without rows are never sent."""
        if action in self.local:
            return self.local.pop(action)
        self.post_recv(action)
        if action not in self.pending:
            return self.empty_message(action)
        work, x = self.pending.pop(action)
        kind, stage, microbatch = action
        source = self.rank_of(Action(kind, stage + 1 if kind == "B" else stage - 1, microbatch))
        with track_operation(f"message for {kind} of stage {stage}", [self.mesh.rank_of(source)]):
            work.wait()
        self.release(self.receipts.pop(action, ()))
        return x

    def close(self) -> None:
        """Wait until all messages have arrived."""
        self.release(tuple(self.sent))


# ── Steps ──


class Pipeline:
    """The stages of a rank, and the schedule in which a batch passes through all stages.

    micro_batch: rows of a micro-batch; 0: one with several stages, else `default_micro_batch`.
    """

    def __init__(
        self, model: Transformer, config: Config, mesh: Mesh, schedule_name: str,
        stages_by_rank: list[tuple[int, ...]], token_dispatcher: TapeDispatcher | None = None,
        objective: Objective = NEXT_TOKEN_LOSS, micro_batch: int = 0,
    ):  # fmt: skip
        self.config, self.mesh = config, mesh
        self.cp_group, self.micro_batch = mesh.cp_group, micro_batch
        self.schedule_name, self.objective = schedule_name, objective
        num_stages = count_stages(stages_by_rank)
        self.last = num_stages - 1
        self.stages = {
            s: Stage(model, config, s, num_stages, token_dispatcher, objective)
            for s in stages_by_rank[mesh.pp_rank]
        }
        self.model = model
        self.dtype = residual_dtype(model)
        self.num_left_out = 0  # rows of the last batch that exceeded the sizes of the dispatch
        self.dispatcher: AllToAllDispatcher | None = None
        if isinstance(token_dispatcher, AllToAllDispatcher):
            self.dispatcher = token_dispatcher

    # ── Rows ──

    def split(self, batch: RowBatch | LocalRows) -> list[RowBatch]:
        """Return this pipeline's micro-batches of a global batch, or of its own rows of one.

        All pipelines have equally many; if there are too few rows, some are empty.
        """
        rows_per_pipeline = ceil_div(len(batch), self.mesh.data_size)
        size = self.micro_batch
        if not size:
            rows = batch.rows if isinstance(batch, LocalRows) else batch
            s = rows.rows_bs.shape[1] - 1
            size = default_micro_batch(s, self.mesh.cp) if self.mesh.pp == 1 else 1
        n = ceil_div(rows_per_pipeline, size)
        n = min_microbatches(self.schedule_name, self.mesh.pp, n)
        if isinstance(batch, LocalRows):
            own = batch.rows
        else:
            own = batch.tensor_split(self.mesh.data_size)[self.mesh.data_rank]
        if self.dispatcher and self.dispatcher.fixed:
            tokens_per_row = own.rows_bs.shape[1:].numel()
            tokens = ceil_div(rows_per_pipeline, n) * tokens_per_row
            self.dispatcher.fixed.num_tokens = ceil_div(tokens, self.mesh.cp)
        return own.tensor_split(n)

    def shares(self, batch: RowBatch | LocalRows, microbatches: list[RowBatch]) -> list[float]:
        """Return each micro-batch's fraction of the weight of the global batch."""
        whole = batch.weight if isinstance(batch, LocalRows) else self.objective.loss_weight(batch)
        return [self.objective.loss_weight(part) / max(1, whole) for part in microbatches]

    # ── A batch ──

    def run(
        self, rows: list[RowBatch], weights: list[LossWeights], training: bool = True,
        clear: Callable[[], None] | None = None,
    ) -> LossStats:  # fmt: skip
        """Run all steps of this rank over the rows of its pipeline's micro-batches.

        training=False runs only the forward actions. clear: called before a batch is repeated.
        """

        def attempt() -> LossStats:
            stats = LossStats()
            self.run_microbatches(self.microbatches(rows, weights, stats), training)
            return stats

        return self.repeat_if_cut(attempt, clear)

    def repeat_if_cut(self, attempt: Callable[[], R], clear: Callable[[], None] | None = None) -> R:
        """Return attempt(); if the dispatch has left out rows on any rank, repeat it exactly.

        This is the only place where the host waits for what the dispatch has counted.
        """
        result = attempt()
        if self.dispatcher is None or self.dispatcher.fixed is None:
            return result
        left_out = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
        left_out += self.dispatcher.fixed.take_left_out()
        self.num_left_out = int(self.mesh.all_reduce_sum(left_out))
        if not self.num_left_out:
            return result
        if self.mesh.rank == 0:
            message = (
                f"warning: {self.num_left_out:,} rows exceeded the fixed sizes of the dispatch, so "
                "the batch is repeated with exact sizes; a higher --dispatch-capacity avoids that"
            )
            tqdm.write(message, sys.stderr)
        if clear:
            clear()
        with self.dispatcher.exact_sizes():
            return attempt()

    @torch.no_grad()
    def read_out(self, batch: RowBatch, readout: Readout, width: int) -> Tensor:
        """Return a readout of every row of a global batch after a forward pass, (b, width).

        readout: `width` values for each row of a micro-batch, from the last hidden states. Exactly
        one rank computes the values of a row; a sum over all ranks gives them to the others.
        """
        parts = self.split(batch)
        weights = [LossWeights(0.0)] * len(parts)

        def attempt() -> list[MicroBatch]:
            microbatches = self.microbatches(parts, weights, LossStats(), readout)
            self.run_microbatches(microbatches, training=False)
            return microbatches

        microbatches = self.repeat_if_cut(attempt)
        dtype = torch.promote_types(self.dtype, torch.float32)
        values = torch.zeros(len(batch), width, dtype=dtype, device=self.mesh.device)
        own = values.tensor_split(self.mesh.data_size)[self.mesh.data_rank]
        for own_part, x in zip(own.split([len(part) for part in parts]), microbatches):
            if x.output is not None:
                own_part.copy_(x.output)
        return self.mesh.all_reduce_sum(values)

    def microbatches(
        self, rows: list[RowBatch], weights: list[LossWeights], stats: LossStats,
        readout: Readout | None = None,
    ) -> list[MicroBatch]:  # fmt: skip
        """Return micro-batches of these rows, which add to the same sums.

        What depends on the values of rows is found where the rows are; on the host that makes no
        step wait for its device.
        """
        device, objective = self.mesh.device, self.objective
        microbatches = []
        for part, weight in zip(rows, weights, strict=True):
            model_input = objective.model_input(part)
            on_device = tensors_to(model_input, device)
            length = model_input.tokens_bs.shape[1]
            bounds = [] if model_input.cu_seqlens is None else model_input.cu_seqlens.tolist()
            sequence = SequencePart(self.cp_group, length, on_device.cu_seqlens, bounds)
            batch = MicroBatch(part.to(device), on_device, sequence, weight, stats, readout)
            if not isinstance(objective, NextTokenLoss):  # whose targets are views of the rows
                batch.places = tensors_to(objective.locate(part, sequence), device)
            microbatches.append(batch)
        return microbatches

    def run_microbatches(self, microbatches: list[MicroBatch], training: bool) -> None:
        """Run all steps of this rank, or only the forward actions."""
        steps = schedule(self.schedule_name, self.mesh.pp, len(microbatches))
        if not training:
            steps = [forward_steps(rank_steps) for rank_steps in steps]
        run = PipelineRun(self, microbatches, self.connect(steps, microbatches), training)
        for step, following in pairwise([*steps[self.mesh.pp_rank], ()]):
            run.post_recvs(step + following)
            run.run_step(step)
        run.p2p.close()

    def connect(self, steps: list[list[Step]], microbatches: list[MicroBatch]) -> P2PCommunicator:
        """Return the communicator of this rank for a schedule over these micro-batches."""
        m, pp = len(microbatches), self.mesh.pp

        def rank_of(action: Action) -> int:
            return rank_of_stage(self.schedule_name, pp, m, action.stage, action.microbatch)

        def shape_of(i: int) -> tuple[int, ...]:
            return (*microbatches[i].shape, self.config.dim)

        num_tokens = [prod(batch.shape) for batch in microbatches]
        order = send_order(steps, self.last, rank_of, num_tokens)
        receipts = find_receipts(steps, self.last, order, self.mesh.pp_rank)
        return P2PCommunicator(self.mesh, order, receipts, rank_of, shape_of, self.dtype)


def default_micro_batch(seq_len: int, cp: int) -> int:
    """Return how many rows have as many tokens on a rank as a row of `dsv3 plan`; at least one.

    What the rows of a whole step save for their backward pass would not fit in memory.
    """
    return max(1, MICRO_BATCH_TOKENS * cp // max(1, seq_len))


def forward_steps(rank_steps: list[Step]) -> list[Step]:
    """Return the forward actions of a rank's steps, in order."""
    steps: list[Step] = []
    for step in rank_steps:
        steps += [(action,) for action in step if action.kind == "F"]
    return steps


class PipelineRun:
    """The run of one batch through a pipeline, with the state between its steps."""

    def __init__(
        self, pipeline: Pipeline, microbatches: list[MicroBatch], p2p: P2PCommunicator,
        training: bool,
    ):  # fmt: skip
        self.pipeline, self.p2p = pipeline, p2p
        self.microbatches, self.training = microbatches, training
        # by (stage, micro-batch): the tape with the ids of its input and output; deferred Wgrads
        self.open: dict[tuple[int, int], tuple[Tape, int | None, int]] = {}
        self.deferred_wgrads: dict[tuple[int, int], list[ops.Wgrad]] = {}

    def post_recvs(self, actions: tuple[Action, ...]) -> None:
        """Start to receive the inputs of these actions."""
        for action in actions:
            message = message_for(action, self.pipeline.last)
            if message:
                self.p2p.post_recv(message)

    def run_step(self, step: Step) -> None:
        """Run one action, or two interleaved; then send their results."""
        results = interleave(*map(self.run_action, step))
        for action, x in zip(step, results):
            consumer = consumer_of(action, self.pipeline.last)
            if consumer:
                assert x is not None, f"{action} has no result for {consumer}"
                self.p2p.send(consumer, x)

    def run_action(self, action: Action) -> Steps[Tensor | None]:
        """Run an action, and yield while its messages are in flight; I and W never yield."""
        match action.kind:
            case "F":
                return (yield from self.forward(action))
            case "B":
                return (yield from self.backward(action))
            case "I":
                return self.backward_input(action)
            case _:
                self.backward_weight(action)
                return None

    def forward(self, action: Action) -> Steps[Tensor]:
        """Run the stage and return its output (F)."""
        stage, i = self.pipeline.stages[action.stage], action.microbatch
        tape = Tape(self.training)
        x = None if stage.first else self.p2p.wait_recv(action)
        y = yield from stage.forward(tape, x, self.microbatches[i])
        if self.training:
            x_id = None if x is None else tape.id_of(x)
            self.open[action.stage, i] = tape, x_id, tape.id_of(y)
        return y

    def backward(self, action: Action) -> Steps[Tensor | None]:
        """Backpropagate through the stage; return its input's gradient, None in the first (B)."""
        _, stage, microbatch = action
        tape, x_id, y_id = self.open.pop((stage, microbatch))
        if stage < self.pipeline.last:
            tape.add_grad(y_id, self.p2p.wait_recv(Action("B", stage, microbatch)))
        yield from tape.backward()
        return None if x_id is None else tape.pop_grad(x_id)

    def backward_input(self, action: Action) -> Tensor | None:
        """Run the backward pass, and defer the weight gradients (I)."""
        with ops.deferring_wgrads() as deferred:
            dx = run_to_completion(self.backward(action))
        self.deferred_wgrads[action.stage, action.microbatch] = deferred
        return dx

    def backward_weight(self, action: Action) -> None:
        """Compute the deferred weight gradients (W)."""
        with torch.no_grad():
            for weight, wgrad in self.deferred_wgrads.pop((action.stage, action.microbatch)):
                ops.compute_wgrad(weight, wgrad)  # adds to its `main_grad`
