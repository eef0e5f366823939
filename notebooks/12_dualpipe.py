# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · DualPipe: a pipeline without gaps

# %% [markdown]
# ## Why
# 61 layers do not fit on one GPU, so V3 cuts them into 16 **stages**, each on GPUs of its own, and sends
# *micro-batches*, small parts of a batch, through them like cars along an assembly line. This wastes time in two
# ways. While the first car moves to the last station, the stations that it has not reached are idle: the
# **bubble**. And in every layer tokens are sent to their experts and back, which takes about as long as the
# computation ([chapter 11](11_expert_parallel.ipynb)): for about **half of the time** nothing is computed at all.
# DualPipe addresses both with one idea: feed the line from both ends at once.
#
# ## Play
# Press *Play*, and watch where GPUs wait. Then compare 1F1B, ZB1P and DualPipe, and let the all-to-alls take as long
# as the computation. Under *Build it yourself* you turn a bad schedule into a published one: can you do it before
# you have read how?

# %%
from dsv3_ref.viz.component import embed
from dsv3_ref.viz.schedule import schedule_page

embed(schedule_page(), "a pipeline, step by step", height=1150)

# %% [markdown]
# DualPipe overlaps two micro-batches that go in opposite directions: while one communicates, the other computes.

# %%
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, checker, figure, show

fig, ax = figure(1, 1, 8, 1.9)
ALONE = [
    (0, "compute", BLUE),
    (1, "all-to-all", GRAY),
    (2, "compute", BLUE),
    (3, "all-to-all", GRAY),
]
BOTH = (
    [(0, "compute", BLUE), (1, "all-to-all", GRAY)],
    [(0, "all-to-all", GRAY), (1, "compute", BLUE)],
)
for y, row in ((0, ALONE), (0.9, BOTH[0]), (1.4, BOTH[1])):
    for left, name, color in row:
        ax.barh(y, 1, left=left, height=0.45, color=color, edgecolor="white")
        ax.text(left + 0.5, y, name, ha="center", va="center", color="white")
ax.set_yticks([0, 1.15], ["one after the other", "both at once"])
ax.set(title="Two micro-batches: one communicates while the other computes", xlabel="time")
ax.invert_yaxis()
show(fig)

# %% [markdown]
# ## Paper
# The report's claims for PP stages (§3.2.1, Table 2). Letters are the times of a forward pass (F), a whole backward
# pass (B), its part for weights (W), and of a forward and a backward pass that overlap (F&B). Parameters and
# activations are per GPU, in stages and in micro-batches. *1F1B* alternates one forward and one backward pass;
# *ZB1P* is a "zero-bubble" pipeline that splits the backward pass in two.
#
# | schedule | bubble | parameters | activations |
# |---|---|---|---|
# | 1F1B | (PP − 1)(F + B) | 1× | PP |
# | ZB1P | (PP − 1)(F + B − 2W) | 1× | PP |
# | DualPipe | (PP/2 − 1)(F&B + B − 3W) | 2× | PP + 1 |
#
# - Micro-batches enter at **both ends**; a rank holds two stages, one for each direction.
# - A forward chunk of one direction and a backward chunk of the other run as a pair. Attention, dispatch, MLP and
#   combine of the two alternate, so that communication is fully hidden.
# - The backward pass is split in two, as in zero-bubble pipelines: one part for the inputs, which other ranks wait
#   for, and one for the weights.

# %% [markdown]
# ## A schedule is data
# An **action** has a *kind*, a *stage* and a *micro-batch*. Its kind is $\text{F}$ or $\text{B}$; $\text{B}$ may be
# split in two halves, first $\text{I}$, then $\text{W}$. A **step** is one action, or two that overlap. A schedule is
# a list of steps for each rank, and nothing else: it is drawn and simulated below, and executed by
# `dsv3_ref/parallel/pipeline.py`. Arguments throughout: `pp` ranks, of which this is rank `r` (from 0), and `m`
# micro-batches.
#
# The two oldest schedules: *GPipe* runs all forward passes, then all backward passes, and so holds the activations of
# all micro-batches at once. *1F1B* starts each backward pass as early as it can, and holds the activations of at most
# `pp` micro-batches.


# %%
#| export
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any, NamedTuple, Protocol

from dsv3_ref.config import UserError


class Action(NamedTuple):
    """One operation on a micro-batch in a stage.

    Its kind is F (forward), B (backward), or a half of B: I (inputs) or W (weights).
    """

    kind: str
    stage: int
    microbatch: int


Step = tuple[Action, ...]  # one action, or two that overlap


def gpipe(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in GPipe: all forward passes, then all backward passes."""
    forward: list[Step] = [(Action("F", r, i),) for i in range(m)]
    return forward + [(Action("B", r, i),) for i in range(m)]


def one_f_one_b(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in 1F1B.

    It starts with one forward pass for each later rank; then each backward pass follows one
    forward pass.
    """
    warmup = min(pp - 1 - r, m)
    steps: list[Step] = [(Action("F", r, i),) for i in range(warmup)]
    for i in range(m):
        if warmup + i < m:
            steps.append((Action("F", r, warmup + i),))
        steps.append((Action("B", r, i),))
    return steps


# %%
print("kind, stage, micro-batch; 1F1B, the third of 4 ranks:")
print(*["".join(map(str, op)) for (op,) in one_f_one_b(4, 2, 5)])
assert all(Counter(op for (op,) in one_f_one_b(4, r, 5)) == Counter(op for (op,) in gpipe(4, r, 5))
           for r in range(4))  # fmt: skip

# %% [markdown]
# ## Two halves of a backward pass
# A linear layer $Y = XW^\top$, $(n,i)\times(o,i)\to(n,o)$, has two products in its backward pass:
#
# $$\begin{aligned}
# \text{I:}\quad \tfrac{\partial L}{\partial X} &= \tfrac{\partial L}{\partial Y}\,W & & (n,o)\times(o,i)\to(n,i)\\
# \text{W:}\quad \tfrac{\partial L}{\partial W} &= \big(\tfrac{\partial L}{\partial Y}\big)^{\!\top} X & & (o,n)\times(n,i)\to(o,i)
# \end{aligned}$$
#
# The previous stage waits for the first; **nothing** waits for the second until the optimizer step, so W can fill
# gaps. The backward pass of a linear layer passes its second half to `defer_wgrad` ([chapter 01](01_ops.ipynb)), which
# computes it at once unless a schedule defers it. The backend `zero_bubble` gives this form to the plain linear layers;
# those in FP8 already have it.


# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_ref import moe  # noqa: F401  registers the ops of experts
from dsv3_ref.ops import impl, defer_wgrad, matmul_dtype


class ZeroBubbleLinear(torch.autograd.Function):
    """A linear layer y = x Wᵀ whose weight gradient can be deferred.

    The backward pass computes dX = dY·W at once, and dW = dYᵀ·X when the schedule says W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight_oi, x.dtype
        x = x.to(matmul_dtype(x))
        ctx.save_for_backward(x)
        return F.linear(x, weight_oi.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = ctx.weight
        x = ctx.saved_tensors[0].detach()  # a deferred Wgrad would keep the graph that made x

        def wgrad(out: Tensor | None = None) -> Tensor:
            dw_oi = g.flatten(0, -2).T @ x.flatten(0, -2)
            return dw_oi.to(weight.dtype) if out is None else out.add_(dw_oi)

        dx = (g @ weight.to(g.dtype)).to(ctx.dtype)
        return dx, defer_wgrad(weight, wgrad)


class ZeroBubbleGroupedLinear(torch.autograd.Function):
    """`ZeroBubbleLinear` for rows that are grouped by expert, each group with its own matrix."""

    @staticmethod
    def forward(ctx: Any, x_mi: Tensor, weight_eoi: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight_eoi, x_mi.dtype
        x_mi = x_mi.to(matmul_dtype(x_mi))
        end_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x_mi, end_e)
        return F.grouped_mm(x_mi, weight_eoi.to(x_mi.dtype).mT, offs=end_e)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_mo: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight = ctx.weight
        x_mi, end_e = (x.detach() for x in ctx.saved_tensors)
        g_mo = g_mo.contiguous()

        def wgrad(out: Tensor | None = None) -> Tensor:
            dw_eoi = F.grouped_mm(g_mo.T, x_mi, offs=end_e)
            return dw_eoi.to(weight.dtype) if out is None else out.add_(dw_eoi)

        dx_mi = F.grouped_mm(g_mo, weight.to(g_mo.dtype), offs=end_e)
        return dx_mi.to(ctx.dtype), defer_wgrad(weight, wgrad), None


@impl("linear", "zero_bubble")
def _(x: Tensor, weight_oi: Tensor, saved_input_format: str = "e4m3") -> Tensor:
    return ZeroBubbleLinear.apply(x, weight_oi)


@impl("grouped_linear", "zero_bubble")
def _(x_mi: Tensor, weight_eoi: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
    return ZeroBubbleGroupedLinear.apply(x_mi, weight_eoi, tokens_per_expert_e)


# %%
from dsv3_ref.ops import MLP, deferring_wgrads, use

torch.manual_seed(0)
mlp, x = MLP(16, 32), torch.randn(5, 16, requires_grad=True)
for p in mlp.parameters():
    torch.nn.init.normal_(p, std=0.3)
want = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
with use("zero_bubble", "auto"):
    y = mlp(x).square().sum()
    with deferring_wgrads() as deferred:
        y.backward()
assert torch.allclose(x.grad, want[0], atol=1e-5) and all(p.grad is None for p in mlp.parameters())
print(f"after I: the input has its gradient, those of {len(deferred)} weights are deferred")
with torch.no_grad():
    grads = {weight: wgrad() for weight, wgrad in deferred}
assert all(torch.allclose(grads[p], w, atol=1e-5) for p, w in zip(mlp.parameters(), want[1:]))

# %% [markdown]
# ## ZB1P
# 1F1B with the backward pass in halves. Rank $r$ defers each W by $r$ micro-batches: the more ranks before it wait for
# its I, the longer. The accumulated W fill the gaps in which 1F1B would wait.


# %%
#| export
def zb1p(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in ZB1P: 1F1B with I for B, and each W r micro-batches later."""
    steps: list[Step] = []
    for (action,) in one_f_one_b(pp, r, m):
        if action.kind == "F":
            steps.append((action,))
            continue
        steps.append((Action("I", r, action.microbatch),))
        if action.microbatch >= r:
            steps.append((Action("W", r, action.microbatch - r),))
    return steps + [(Action("W", r, i),) for i in range(max(0, m - r), m)]


# %% [markdown]
# ## Both ways at once
# A rank sees two streams: **direction 0** enters at its own end, **direction 1** at the far end. Let there be $n$ ranks
# from an end to the turning point, of which this is number $i$ (from 0), and $c$ micro-batches per direction. F0 is a
# forward pass of direction 0, and so on. There are eight phases:
#
# 1. $2(n-i-1)$ times F0, until direction 1 arrives;
# 2. $i+1$ times F0, F1;
# 3. $n-i-1$ times I1, its W, F1: here W fills gaps;
# 4. $c-2n+i+1$ times the **pairs** F0&B1, F1&B0: nearly all the work if $c$ is large;
# 5. $n-i-1$ times B1, F1&B0;
# 6. $i+1$ times B1, B0, in the second half only their I;
# 7. $n-i-1$ times a deferred W, I0;
# 8. the last $i+1$ W.
#
# In phase 4 the rank at the turning point runs the two actions of its first pair one after the other, as DeepSeek's
# released code does. Without communication this does not change when the last step ends; with all-to-alls as long as
# a forward pass it costs two units of time, 415 instead of 413 for 16 ranks and 120 micro-batches.


# %%
#| export
def bidirectional_steps(n: int, i: int, c: int) -> list[tuple[str, ...]]:
    """Return the steps of rank i of the n ranks from an end to the turning point (§3.2.1).

    c ≥ 2n micro-batches travel in each direction. A name such as F0 is a kind and a direction. W
    has no direction: it belongs to the oldest I that has no W yet.
    """
    ahead = n - 1 - i  # ranks between this one and the turning point
    pairs: list[tuple[str, ...]] = [("F0", "B1"), ("F1", "B0")] * (c - 2 * n + i + 1)
    if ahead == 0:  # at the turning point the first pair does not overlap
        pairs[:1] = [("F0",), ("B1",)]
    backward = [("B1",), ("B0",)] * (i + 1)
    inputs_only = [("I1",), ("I0",)] * (i + 1)
    return [
        *[("F0",)] * (2 * ahead),  # 1
        *[("F0",), ("F1",)] * (i + 1),  # 2
        *[("I1",), ("W",), ("F1",)] * ahead,  # 3
        *pairs,  # 4
        *[("B1",), ("F1", "B0")] * ahead,  # 5
        *backward[: i + 1],  # 6, first half
        *inputs_only[i + 1 :],  # 6, second half
        *[("W",), ("I0",)] * ahead,  # 7
        *[("W",)] * (i + 1),  # 8
    ]


def assign_microbatches(
    steps: list[tuple[str, ...]], locate: Callable[[int, int], tuple[int, int]]
) -> list[Step]:
    """Turn steps of kinds and directions into actions on stages and micro-batches.

    The k-th F of a direction, and its k-th B or I, act on the (stage, micro-batch)
    locate(direction, k). Each W acts on the stage and micro-batch of the oldest I without a W.
    """
    done: Counter[tuple[bool, int]] = Counter()
    deferred: list[tuple[int, int]] = []

    def to_action(name: str) -> Action:
        kind = name[0]
        if kind == "W":
            return Action(kind, *deferred.pop(0))
        direction = int(name[1])
        stage, microbatch = locate(direction, done[kind == "F", direction])
        done[kind == "F", direction] += 1
        if kind == "I":
            deferred.append((stage, microbatch))
        return Action(kind, stage, microbatch)

    return [tuple(map(to_action, step)) for step in steps]


# %% [markdown]
# **DualPipe** folds PP ranks in the middle: rank $r$ holds stages $r$ and $PP-1-r$, and half of the micro-batches enter
# at each end. **DualPipeV** bends one pipeline into a V instead: on PP/2 ranks, all micro-batches go down in direction 0
# and come back in direction 1. The list of steps is the same, with half the ranks. Both need at least two micro-batches
# per rank.


# %%
#| export
def dualpipe(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in DualPipe.

    Half of the micro-batches enter at rank 0, the other half at the last rank.
    """

    def locate(direction: int, k: int) -> tuple[int, int]:
        entered_at_rank_0 = (direction == 0) == (r < pp // 2)
        return (r, k) if entered_at_rank_0 else (pp - 1 - r, m // 2 + k)

    return assign_microbatches(bidirectional_steps(pp // 2, min(r, pp - 1 - r), m // 2), locate)


def dualpipe_v(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in DualPipeV: 2·pp stages on pp ranks, down and back up.

    Direction 1 is the second half of the model.
    """

    def locate(direction: int, k: int) -> tuple[int, int]:
        return (2 * pp - 1 - r if direction else r), k

    return assign_microbatches(bidirectional_steps(pp, r, m), locate)


SCHEDULES = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}  # fmt: skip


def min_microbatches(name: str, pp: int, n: int = 1) -> int:
    """Return the least number of micro-batches ≥ n that a schedule supports."""
    if name not in ("dualpipe", "dualpipev"):
        return n
    n = max(n, 2 * pp)
    return n + n % 2 if name == "dualpipe" else n


def schedule(name: str, pp: int, m: int) -> list[list[Step]]:
    """Return the steps of every rank for m micro-batches in all."""
    if name not in SCHEDULES:
        raise UserError(f"no schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    if name == "dualpipe" and pp % 2:
        raise UserError(f"dualpipe needs an even number of ranks, not {pp}")
    if m < 1 or min_microbatches(name, pp, m) != m:
        even = "an even number of " if name == "dualpipe" else ""
        least = min_microbatches(name, pp)
        raise UserError(f"{name} needs {even}micro-batches, at least {least}, not {m}")
    return [SCHEDULES[name](pp, r, m) for r in range(pp)]


def stages_by_rank(name: str, pp: int) -> list[tuple[int, ...]]:
    """Return the stages that every rank holds."""
    num_stages = {"dualpipe": pp, "dualpipev": 2 * pp}.get(name)
    if num_stages is None:
        return [(r,) for r in range(pp)]
    return [(r, num_stages - 1 - r) for r in range(pp)]


def rank_of_stage(name: str, pp: int, m: int, stage: int, microbatch: int) -> int:
    """Return the rank that runs a stage for one of m micro-batches."""
    if name == "dualpipe" and microbatch >= m // 2:
        return pp - 1 - stage
    if name == "dualpipev":
        return min(stage, 2 * pp - 1 - stage)
    return stage


# %%
steps = schedule("dualpipe", 4, 8)
print("rank 0 of 4:", *["&".join("".join(map(str, op)) for op in step) for step in steps[0]])
for r, rank_steps in enumerate(steps):
    for op in chain.from_iterable(rank_steps):
        assert rank_of_stage("dualpipe", 4, 8, op.stage, op.microbatch) == r

# %% [markdown]
# ## When does each step run?
# An action depends on others: F on the F of the previous stage, B (or I) on its own F and the B (or I) of the next
# stage, W on its I. A step starts when its rank is free and all its dependencies have ended:
#
# $$\text{start} = \max\big(\text{free}_r,\ \max_{q\,\in\,\text{dependencies}} \text{end}_q\big).$$
#
# If no rank can start its next step, the lists **deadlock**, and `simulate` reports where. The all-to-alls of an F take
# the time $x$, and so do those of a B (or I). A single action adds $x$ to its time. A pair hides both, as long as they
# fit behind the computation, and takes $\max(\text{F}\&\text{B}, 2x)$. Messages between stages are small and counted as
# free.


# %%
#| export
class ActionCosts(NamedTuple):
    """Durations of actions, in any unit; I takes B − W."""

    f: float = 1.0
    b: float = 2.0  # the whole backward pass
    w: float = 1.0
    pair: float = 3.0  # F&B, computation only
    comm: float = 0.0  # all-to-alls of one F, or of one B

    def duration(self, step: Step) -> float:
        """Return the duration of a step; a pair hides its communication, W has none."""
        if len(step) == 2:
            return max(self.pair, 2 * self.comm)
        kind = step[0].kind
        if kind == "W":
            return self.w
        return {"F": self.f, "B": self.b, "I": self.b - self.w}[kind] + self.comm


DEFAULT_COSTS = ActionCosts()


class StepCosts(Protocol):
    """The durations of steps: `ActionCosts`, or costs by stage (chapter 17)."""

    def duration(self, step: Step) -> float:
        """Return the duration of a step."""
        ...


class Span(NamedTuple):
    """A step of a rank, with its start and end time."""

    rank: int
    start: float
    end: float
    step: Step


def output_of(action: Action) -> Action:
    """Return the action that others depend on: B for I, which yields the same input gradient."""
    return action._replace(kind="B") if action.kind == "I" else action


def dependencies(action: Action, last: int) -> list[Action]:
    """Return the actions that must end before this one starts; `last` is the last stage."""
    kind, stage, microbatch = action
    if kind == "W":
        return [Action("B", stage, microbatch)]
    if kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    after = [Action("B", stage + 1, microbatch)] if stage < last else []
    return [Action("F", stage, microbatch), *after]


def iter_actions(steps: list[list[Step]]) -> Iterator[Action]:
    """Yield the actions of all ranks, rank by rank."""
    for rank_steps in steps:
        for step in rank_steps:
            yield from step


def ready_time(step: Step, last: int, end: dict[Action, float]) -> float | None:
    """Return when all that a step depends on has ended, or None if something has not run yet."""
    ready = 0.0
    for action in step:
        for needed in dependencies(action, last):
            if needed not in end:
                return None
            ready = max(ready, end[needed])
    return ready


def simulate(steps: list[list[Step]], costs: StepCosts = DEFAULT_COSTS) -> list[Span]:
    """Return the span of every step; raise ValueError if the ranks deadlock."""
    last = max(action.stage for action in iter_actions(steps))
    end: dict[Action, float] = {}
    spans: list[Span] = []
    free = [0.0] * len(steps)  # when each rank is free again
    position = [0] * len(steps)  # each rank's next step
    progress = True
    while progress:
        progress = False
        for r, rank_steps in enumerate(steps):
            while position[r] < len(rank_steps):
                step = rank_steps[position[r]]
                ready = ready_time(step, last, end)
                if ready is None:
                    break
                start = max(free[r], ready)
                free[r] = start + costs.duration(step)
                end.update({output_of(action): free[r] for action in step})
                spans.append(Span(r, start, free[r], step))
                position[r] += 1
                progress = True
    for r, rank_steps in enumerate(steps):
        if position[r] < len(rank_steps):
            raise ValueError(f"deadlock: rank {r} waits forever before {rank_steps[position[r]]}")
    return spans


def validate_schedule(steps: list[list[Step]], where: list[tuple[int, ...]], m: int) -> None:
    """Raise ValueError unless a schedule is complete and free of deadlocks.

    Every stage must run F, then either B or both I and W, exactly once for each of m
    micro-batches, on a rank that holds the stage; where: the stages of every rank.
    """
    for r, rank_steps in enumerate(steps):
        for action in iter_actions([rank_steps]):
            if action.stage not in where[r]:
                raise ValueError(f"rank {r} runs {action}, but holds stages {where[r]}")
    count = Counter(iter_actions(steps))
    for action, n in count.items():
        if n > 1:
            raise ValueError(f"{action} runs {n} times")
    for stage in range(1 + max(map(max, where))):
        for microbatch in range(m):
            kinds = {kind for kind in "FBIW" if Action(kind, stage, microbatch) in count}
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                raise ValueError(f"stage {stage} runs {sorted(kinds)} for micro-batch {microbatch}")
    simulate(steps)


# %%
from dsv3_ref.viz.schedule import draw

for name, pp, m in (("1f1b", 4, 8), ("zb1p", 4, 8), ("dualpipe", 4, 8)):
    steps = schedule(name, pp, m)
    validate_schedule(steps, stages_by_rank(name, pp), m)
    show(
        draw(
            simulate(steps),
            f"{name}, {m} micro-batches",
            range(m // 2, m) if "dual" in name else (),
        )
    )

# %% [markdown]
# Numbers are micro-batches. In the last figure the two directions meet in the middle (pale: those that entered at
# rank 3); a forward pass drawn above a backward pass is a pair. Now plant faults: a missing W, a step that runs twice,
# a reversed list.

# %%
steps = schedule("zb1p", 2, 4)
for what, fault in {
    "missing": lambda rank_steps: rank_steps[:-1],
    "twice": lambda rank_steps: [*rank_steps, rank_steps[0]],
    "reversed": lambda rank_steps: rank_steps[::-1],
}.items():
    try:
        validate_schedule([fault(steps[0]), steps[1]], stages_by_rank("zb1p", 2), 4)
        raise AssertionError("not noticed")
    except ValueError as e:
        print(f"{what:10}", e)

# %% [markdown]
# ## The report's table
# The bubble of a schedule is the time until the last rank has finished, minus the time that a rank computes.
# Activations live from F until the end of the backward pass, W included. The table compares the simulation with the
# report's formula, at F = W = 1, B = 2, F&B = 3:


# %%
#| export
def bubble(
    spans: list[Span], m: int, stages_per_rank: int, costs: ActionCosts = DEFAULT_COSTS
) -> float:
    """Return the idle time of a rank: the last end, less F + B of m micro-batches per stage."""
    busy = m * stages_per_rank * (costs.f + costs.b + 2 * costs.comm)
    return max(span.end for span in spans) - busy


def max_in_flight(steps: list[list[Step]]) -> list[int]:
    """Return the most micro-batches that each rank has in flight: from F to the end of B or W."""
    peaks = []
    for rank_steps in steps:
        live, peak = 0, 0
        for step in rank_steps:
            live += sum(action.kind == "F" for action in step)
            peak = max(peak, live)
            live -= sum(action.kind in "BW" for action in step)
        peaks.append(peak)
    return peaks


BUBBLE_FORMULAS: dict[str, Callable[[int, ActionCosts], float]] = {
    "1f1b": lambda pp, t: (pp - 1) * (t.f + t.b),
    "zb1p": lambda pp, t: (pp - 1) * (t.f + t.b - 2 * t.w),
    "dualpipe": lambda pp, t: (pp / 2 - 1) * (t.pair + t.b - 3 * t.w),
}


# %%
def measured(name: str, stages: int, m: int, t: ActionCosts = DEFAULT_COSTS):
    """Return (bubble, stages per rank, activations) of a pipeline with `stages` stages."""
    pp = stages // 2 if name == "dualpipev" else stages
    steps, each = schedule(name, pp, m), len(stages_by_rank(name, pp)[0])
    busy = 2 if name == "dualpipev" else 1  # dualpipe runs each of its two stages for half of them
    return bubble(simulate(steps, t), m, busy, t), each, max(max_in_flight(steps))


print("PP   schedule   bubble = formula   parameters   activations")
for pp, name in product((2, 4, 8, 16), ("1f1b", "zb1p", "dualpipe", "dualpipev")):
    row, formula = (
        measured(name, pp, 2 * pp + 4),
        BUBBLE_FORMULAS[name.removesuffix("v")](pp, ActionCosts()),
    )
    print(f"{pp:2}   {name:10} {row[0]:6g} = {formula:<6g}    {row[1]:8}× {row[2]:12}")
    assert row == (formula, 1 + ("dual" in name), pp + ("dual" in name))

# %% [markdown]
# They agree exactly if F = W = B/2 and F&B = F + B. Otherwise the formulas are approximations: they count the gaps of
# the ideal schedule, and with other ratios the steps no longer fit together. Make W slower or faster, let a pair save
# time, or make I (which is B − W) slower, and the formulas differ from the simulation:

# %%
print(f"{'PP = 8':35} formula  simulated")
for t in (
    ActionCosts(),
    ActionCosts(1, 2.2, 1.1, 3.2),
    ActionCosts(1, 2, 0.8, 3),
    ActionCosts(1, 2, 1, 2.6),
    ActionCosts(1, 2.5, 1, 3.5),
):
    for name in ("zb1p", "dualpipe"):
        print(
            f"{name:9} F={t.f:g} B={t.b:<3g} W={t.w:<3g} F&B={t.pair:<3g}:"
            f"{BUBBLE_FORMULAS[name](8, t):13.2f} {measured(name, 8, 20, t)[0]:10.2f}"
        )
assert any(abs(measured("dualpipe", 8, 20, t)[0] - BUBBLE_FORMULAS["dualpipe"](8, t)) > 0.1
           for t in (ActionCosts(1, 2.2, 1.1, 3.2), ActionCosts(1, 2, 1, 2.6)))  # fmt: skip

# %% [markdown]
# (If F&B is *less* than F + B, the simulation is far below the formula, and with more micro-batches even below zero:
# the bubble is the time beyond F + B per micro-batch, and every pair takes less than that.)
#
# ## Experiment: what if communication takes x of computation?
# The all-to-alls of a forward pass take $x$ times as long as its computation. In a backward pass they take the same
# time, while the computation takes twice as long. V3's forward pass is near $x = 1$. How long is a training step,
# relative to its computation alone?

# %%
share = [i / 8 for i in range(17)]
fig, ax = figure(1, 1, 8, 3.2)
for name, color in zip(("1f1b", "zb1p", "dualpipe"), (GRAY, GREEN, ORANGE)):
    over = []
    for x in share:
        spans = simulate(schedule(name, 16, 120), ActionCosts(comm=x))
        over.append(max(s.end for s in spans) / (120 * 3))
    ax.plot(share, over, color=color, label=name)
    print(f"{name:9} x = 0: {over[0]:.2f}, x = 1: {over[8]:.2f} times the computation")
ax.set(xlabel="x: communication of a forward pass / its computation", ylabel="time / computation",
       title="16 stages, 120 micro-batches: pairs hide communication")  # fmt: skip
ax.set_ylim(0.9)
ax.legend()
show(fig)

# %% [markdown]
# Until $2x$ exceeds the computation of a pair (at $x = 1.5$), DualPipe pays for communication only at the beginning and
# at the end of a training step, where actions are not paired. The other schedules pay in full.

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** With PP stages and m micro-batches, for what fraction of the total time is a rank of 1F1B idle?
# (Take B = 2F, as everywhere in this chapter. Does it matter?)


# %%
@checker
def check_idle(fn):
    """How long does one rank compute, and how long does the whole pipeline take?"""
    for pp, m in ((4, 8), (16, 120)):
        spans = simulate(schedule("1f1b", pp, m))
        assert abs(fn(pp, m) - bubble(spans, m, 1) / max(s.end for s in spans)) < 1e-9


@checker
def check_least(fn):
    """Which quantity in Table 2 does not depend on m, and which grows with m?"""

    def idle(pp, m):
        return measured("dualpipe", pp, int(m))[0] / (3 * m)

    for pp, limit in ((8, 0.06), (16, 0.04), (4, 0.07), (16, 0.5)):
        m = fn(pp, limit)
        assert m % 2 == 0 and m >= 2 * pp and idle(pp, m) <= limit
        assert m == 2 * pp or idle(pp, m - 2) > limit


@checker
def check_first_back(fn):
    """When has the last rank finished its forward passes? How many backward passes precede rank r's?"""
    for f, b in ((1.0, 2.0), (0.5, 3.0)):
        spans = simulate(schedule("gpipe", 6, 9), ActionCosts(f=f, b=b))
        for r in range(6):
            starts = [s.start for s in spans if s.rank == r and s.step[0].kind == "B"]
            assert abs(fn(6, r, 9, f, b) - min(starts)) < 1e-9


# %%
def my_idle(pp: int, m: int) -> float:
    return ...


check_idle(my_idle)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_idle(pp, m):
#     return (pp - 1) / (m + pp - 1)
# ```
#
# The bubble is (PP − 1)(F + B) and the computation m(F + B): the ratio of F and B does not matter.
# </details>
#
# **2 · Predict.** What is the smallest even number of micro-batches (at least 2 PP) for which the bubble of DualPipe is
# at most the fraction `share` of the computation, with `DEFAULT_COSTS` (F = W = 1, B = 2, F&B = 3)?


# %%
def my_least(pp: int, share: float) -> int:
    return ...


check_least(my_least)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The bubble is PP − 2, the computation 3m.
#
# ```python
# def my_least(pp, share):
#     m = 2 * pp
#     while (pp - 2) / (3 * m) > share:
#         m += 2
#     return m
# ```
# </details>
#
# **3 · Predict.** Rank r of GPipe starts its first forward pass at r · f. When does it start its first *backward*
# pass, if a forward pass takes f and a backward pass b?


# %%
def my_first_back(pp: int, r: int, m: int, f: float, b: float) -> float:
    return ...


check_first_back(my_first_back)

# %% [markdown]
# <details><summary>Answer</summary>
#
# ```python
# def my_first_back(pp, r, m, f, b):
#     return (pp - 1 + m) * f + (pp - 1 - r) * b
# ```
#
# The last rank starts its m forward passes at (PP − 1) f; then the gradient comes back, rank by rank.
# </details>

# %% [markdown]
# ## Scale-up
# V3 runs 2 × 64 pipelines of 16 stages in parallel on 2048 GPUs: every stage is on 64 GPUs, which share its experts,
# and there are two copies of it. The size of a micro-batch was not published; with one sequence each, a batch of 15,360
# sequences gives every pipeline 120 micro-batches.

# %%
m = 15_360 // (2 * 64)
for name in ("1f1b", "zb1p", "dualpipe"):
    idle = measured(name, 16, m)[0] / (3 * m)
    print(f"{name:9} {m} micro-batches: bubble {idle:6.1%} of the computation")
assert measured("dualpipe", 16, m)[0] / (3 * m) < 0.04

# %% [markdown]
# The bubble is 4 % with DualPipe and 12.5 % with 1F1B. The gain is worth having, but ZB1P achieves almost all of it.
# Hiding the all-to-alls is worth far more. DualPipe is not the only schedule that does so: 1F1B can pair the forward pass
# of one micro-batch with the backward pass of another, too, if every rank starts early enough to have both at hand
# (Megatron-Core's *combined 1F1B*).


# %%
def paired_1f1b(pp: int, m: int) -> list[list[Step]]:
    """Return 1F1B with 2(pp − 1 − r) + 1 warm-up passes on rank r, then pairs F&B."""
    lists = []
    for r in range(pp):
        warm_up = min(m, 2 * (pp - 1 - r) + 1)
        steps: list[Step] = [(Action("F", r, i),) for i in range(warm_up)]
        steps += [(Action("F", r, i), Action("B", r, i - warm_up)) for i in range(warm_up, m)]
        steps += [(Action("B", r, i),) for i in range(m - warm_up, m)]
        lists.append(steps)
    return lists


lists = {name: schedule(name, 16, m) for name in ("1f1b", "zb1p", "dualpipe")}
lists["paired 1f1b"] = paired_1f1b(16, m)
print("step time ÷ computation    x = 0    x = 1    activations    parameters")
ratios = {}
for name, steps in lists.items():
    ratio = [
        max(span.end for span in simulate(steps, ActionCosts(comm=x))) / (3 * m) for x in (0, 1)
    ]
    ratios[name] = ratio[1]
    copies = len(stages_by_rank(name, 16)[0]) if name in SCHEDULES else 1
    print(f"{name:22}{ratio[0]:10.2f}{ratio[1]:9.2f}{max(max_in_flight(steps)):15}{copies:13}×")
assert ratios["dualpipe"] < ratios["paired 1f1b"] < 1.25 < 1.75 < ratios["zb1p"]

# %% [markdown]
# With all-to-alls as long as a forward pass ($x = 1$) a step of DualPipe takes 1.15 times its computation, of paired 1F1B
# 1.21 times, of ZB1P 1.79 times. Paired 1F1B needs one copy of the parameters but keeps 32 micro-batches of activations
# instead of 17. DualPipe's price is one more micro-batch of activations than 1F1B and a second copy of every
# parameter along the pipeline. The copy costs little, since with 64-way expert parallelism a GPU holds only one in 64
# of the routed experts. `dsv3_ref/parallel/` executes these lists over real ranks.
