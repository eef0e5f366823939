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
# 61 layers do not fit one GPU, so V3 cuts them into 16 **stages**, each on a GPU of its own, and sends
# *micro-batches*, small parts of a batch, through them like cars along a belt. Two things are lost. While the
# first car travels to the last station, the stations that it has not reached stand idle: the **bubble**. And in
# every layer the tokens travel to their experts and back, which takes about as long as computing does
# ([chapter 11](11_expert_parallel.ipynb)): for about **half of the time** nothing is computed at all. DualPipe
# answers both with one idea: run the belt from both ends at once.

# %%
from dsv3_ref.viz import BLUE, GREEN, GRAY, ORANGE, checker, figure, play, show

fig, ax = figure(1, 1, 8, 1.9)
ALONE = [(0, "compute", BLUE), (1, "travel", GRAY), (2, "compute", BLUE), (3, "travel", GRAY)]
BOTH = [(0, "compute", BLUE), (1, "travel", GRAY)], [(0, "travel", GRAY), (1, "compute", BLUE)]
for y, row in ((0, ALONE), (0.9, BOTH[0]), (1.4, BOTH[1])):
    for left, name, color in row:
        ax.barh(y, 1, left=left, height=0.45, color=color, edgecolor="white")
        ax.text(left + 0.5, y, name, ha="center", va="center", color="white")
ax.set_yticks([0, 1.15], ["one after the other", "both at once"])
ax.set(title="Two micro-batches: what travels can hide behind what computes", xlabel="time")
ax.invert_yaxis()
show(fig)

# %% [markdown]
# ## Paper
# What the report claims (§3.2.1, Table 2) for PP stages. Letters are times: of a forward pass (F), a whole
# backward pass (B), its part for weights (W), and of a forward and a backward that overlap (F&B). Parameters
# and activations are counted for one GPU, in stages and in micro-batches. *1F1B* does one forward, one backward
# in turns; *ZB1P* is a "zero-bubble" pipeline that cuts the backward pass in two.
#
# | schedule | bubble | parameters | activations |
# |---|---|---|---|
# | 1F1B | (PP − 1)(F + B) | 1× | PP |
# | ZB1P | (PP − 1)(F + B − 2W) | 1× | PP |
# | DualPipe | (PP/2 − 1)(F&B + B − 3W) | 2× | PP + 1 |
#
# - Micro-batches enter at **both ends**; a rank holds two stages, one for each direction.
# - A forward chunk of one direction and a backward chunk of the other run as a pair: attention, dispatch, MLP, combine of
#   both take turns, so that communication is fully hidden.
# - The backward pass is cut in two, as in zero-bubble pipelines: for inputs, which others wait for, and for weights.

# %% [markdown]
# ## A schedule is data
# An operation is a *kind* at a *stage* for a *micro-batch*: $\text{F}$, or $\text{B}$, or $\text{B}$ in two halves,
# first $\text{I}$ then $\text{W}$. A **step** is one operation, or two that overlap. A schedule is a list of steps for
# each rank, and nothing else: it is drawn and simulated below, and executed by `dsv3_ref/parallel/pipeline.py`.
# Arguments throughout: `pp` ranks, this one the `r`-th (from 0), `m` micro-batches.
#
# The two oldest: *GPipe* does all forwards, then all backwards, and so holds the activations of all micro-batches at
# once. *1F1B* begins a backward as early as it can, and holds no more than `pp` of them.


# %%
#| export
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

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
# The previous stage waits for the first; **nothing** waits for the second, until the optimizer step. So W can fill
# gaps. A linear layer's backward pass hands its second half to `defer_wgrad` ([chapter 01](01_ops.ipynb)), which computes it
# at once unless a schedule puts it off. The backend `zero_bubble` gives the plain products this form; the FP8 ones have it.


# %%
#| export
import torch
import torch.nn.functional as F

from dsv3_ref import moe  # noqa: F401  registers the ops of experts
from dsv3_ref.ops import impl, defer_wgrad, matmul_dtype


class ZeroBubbleLinear(torch.autograd.Function):
    """A linear layer y = x Wᵀ whose weight gradient can be deferred.

    The backward pass computes dX = dY·W at once, and dW = dYᵀ·X when the schedule says W.
    """

    @staticmethod
    def forward(ctx, x, weight_oi):
        ctx.weight, ctx.dtype = weight_oi, x.dtype
        x = x.to(matmul_dtype(x))
        ctx.save_for_backward(x)
        return F.linear(x, weight_oi.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight = ctx.weight
        (x,) = ctx.saved_tensors

        def wgrad():
            return (g.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)

        dx = (g @ weight.to(g.dtype)).to(ctx.dtype)
        return dx, defer_wgrad(weight, wgrad)


class ZeroBubbleGroupedLinear(torch.autograd.Function):
    """`ZeroBubbleLinear` for rows that are grouped by expert, each group with its own matrix."""

    @staticmethod
    def forward(ctx, x_mi, weight_eoi, tokens_per_expert_e):
        ctx.weight, ctx.dtype = weight_eoi, x_mi.dtype
        x_mi = x_mi.to(matmul_dtype(x_mi))
        end_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x_mi, end_e)
        return F.grouped_mm(x_mi, weight_eoi.to(x_mi.dtype).mT, offs=end_e)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_mo):
        weight = ctx.weight
        x_mi, end_e = ctx.saved_tensors
        g_mo = g_mo.contiguous()

        def wgrad():
            return F.grouped_mm(g_mo.T, x_mi, offs=end_e).to(weight.dtype)

        dx_mi = F.grouped_mm(g_mo, weight.to(g_mo.dtype), offs=end_e)
        return dx_mi.to(ctx.dtype), defer_wgrad(weight, wgrad), None


@impl("linear", "zero_bubble")
def _(x, weight_oi, saved_input_format="e4m3"):
    return ZeroBubbleLinear.apply(x, weight_oi)


@impl("grouped_linear", "zero_bubble")
def _(x_mi, weight_eoi, tokens_per_expert_e):
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
    with deferring_wgrads() as todo:
        y.backward()
assert torch.allclose(x.grad, want[0], atol=1e-5) and all(p.grad is None for p in mlp.parameters())
print(f"after I: the input has its gradient, {len(todo)} weights wait")
with torch.no_grad():
    made = {weight: wgrad() for weight, wgrad in todo}
assert all(torch.allclose(made[p], w, atol=1e-5) for p, w in zip(mlp.parameters(), want[1:]))

# %% [markdown]
# ## ZB1P
# 1F1B with the backward pass in halves. Rank $r$ puts each W off by $r$ micro-batches: the more ranks stand before
# it and wait for its I, the longer. The W that have piled up fill the gaps in which 1F1B would wait.


# %%
#| export
def zb1p(pp: int, r: int, m: int) -> list[Step]:
    """Return the steps of rank r in ZB1P: 1F1B with I instead of B, each W r micro-batches later."""
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
# A rank sees two streams: **direction 0** enters at its own end, **direction 1** at the far end. Let $n$ ranks stand between an
# end and the turning point, this one the $i$-th of them (from 0), with $c$ micro-batches per direction. F0 is a forward of
# direction 0, and so on. Eight phases:
#
# 1. $2(n-i-1)$ times F0, until direction 1 arrives;
# 2. $i+1$ times F0, F1;
# 3. $n-i-1$ times I1, its W, F1: here W fills gaps;
# 4. $c-2n+i+1$ times the **pairs** F0&B1, F1&B0: here nearly all the work is done if $c$ is large;
# 5. $n-i-1$ times B1, F1&B0;
# 6. $i+1$ times B1, B0, in the second half only their I;
# 7. $n-i-1$ times a W put off, I0;
# 8. the last $i+1$ W.
#
# In phase 4 the rank at the turning point does its first pair one after the other, as DeepSeek's released code
# does; at the times below the last step ends no sooner and no later for it.


# %%
#| export
def bidirectional_steps(n: int, i: int, c: int) -> list[tuple[str, ...]]:
    """Return the steps of the i-th of n ranks between an end and the turning point (§3.2.1).

    c ≥ 2n micro-batches travel in each direction. A name such as F0 is a kind and a direction; W
    has no direction, it belongs to the oldest I without one.
    """
    ahead = n - 1 - i  # ranks between this one and the turning point
    pairs = [("F0", "B1"), ("F1", "B0")] * (c - 2 * n + i + 1)
    if ahead == 0:  # at the turning point the first pair does not overlap
        pairs = [("F0",), ("B1",), *pairs[1:]]
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
    locate(direction, k). The W take those of the I in order.
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
# **DualPipe** folds PP ranks at the middle: rank $r$ holds stages $r$ and $PP-1-r$, and half of the micro-batches enter
# at each end. **DualPipeV** bends one belt into a V instead: PP/2 ranks, all micro-batches go down in direction 0 and come back in
# direction 1. Same list, half the ranks. Both need at least two micro-batches a rank.


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
    """Return the steps of rank r in DualPipeV: 2·PP stages on PP ranks, there and back.

    Direction 1 is the second half of the model.
    """

    def locate(direction: int, k: int) -> tuple[int, int]:
        return (2 * pp - 1 - r if direction else r), k

    return assign_microbatches(bidirectional_steps(pp, r, m), locate)


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe,
             "dualpipev": dualpipe_v}  # fmt: skip


def min_microbatches(name: str, pp: int, n: int = 1) -> int:
    """Return the least number of micro-batches ≥ n that a schedule supports."""
    if name not in ("dualpipe", "dualpipev"):
        return n
    n = max(n, 2 * pp)
    return n + n % 2 if name == "dualpipe" else n


def schedule(name: str, pp: int, m: int) -> list[list[Step]]:
    """Return the steps of every rank for m micro-batches in all."""
    if name not in SCHEDULES:
        raise UserError(f"no schedule {name!r}: there are {', '.join(SCHEDULES)}")
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
assert all(rank_of_stage("dualpipe", 4, 8, op.stage, op.microbatch) == r
           for r, mine in enumerate(steps) for step in mine for op in step)  # fmt: skip

# %% [markdown]
# ## When does each step run?
# An action depends on others: F on the F of the previous stage, B (or I) on its own F and the B (or I) of the next
# stage, W on its I. A step begins when its rank is free and everything it needs has ended:
#
# $$\text{start} = \max\big(\text{free}_r,\ \max_{q\,\in\,\text{needs}} \text{end}_q\big).$$
#
# If no rank can begin, the lists **deadlock**; `simulate` says where. Communication: the all-to-alls of an F take the
# time $x$, and those of a B (or I) as much again. A step on its own adds $x$ to its time; a pair hides both, as long
# as they fit behind the computation, and takes $\max(\text{F}\&\text{B}, 2x)$. Messages between stages are small and
# counted as free.


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
    """Whatever knows the duration of a step: `ActionCosts`, or costs by stage (chapter 17)."""

    def duration(self, step: Step) -> float: ...


class Span(NamedTuple):
    """A step of a rank, with the times of its start and end."""

    rank: int
    start: float
    end: float
    step: Step


def output_of(action: Action) -> Action:
    """Return the action whose result others wait for: I yields the input gradient that B would."""
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
    """Yield the actions of all ranks."""
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
            raise ValueError(f"deadlock: rank {r} waits before {rank_steps[position[r]]} for ever")
    return spans


def validate_schedule(steps: list[list[Step]], where: list[tuple[int, ...]], m: int) -> None:
    """Raise ValueError unless a schedule is complete and free of deadlocks.

    Every stage must run F, then B or I and W, exactly once for each of m micro-batches, on a rank
    that holds it; where: the stages of every rank.
    """
    for r, rank_steps in enumerate(steps):
        for action in iter_actions([rank_steps]):
            if action.stage not in where[r]:
                raise ValueError(f"rank {r} does {action}, but holds stages {where[r]}")
    count = Counter(iter_actions(steps))
    for action, n in count.items():
        if n > 1:
            raise ValueError(f"{action} is done {n} times")
    for stage in range(1 + max(map(max, where))):
        for microbatch in range(m):
            kinds = {kind for kind in "FBIW" if Action(kind, stage, microbatch) in count}
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                raise ValueError(f"stage {stage} does {sorted(kinds)} for micro-batch {microbatch}")
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
# Numbers are micro-batches. In the last picture both ways meet in the middle (pale: those that entered at rank 3);
# a forward drawn above a backward is a pair. Now faults: a W that is lost, a step that is done twice, a list that
# runs backwards.

# %%
steps = schedule("zb1p", 2, 4)
for what, fault in {
    "lost": lambda mine: mine[:-1],
    "twice": lambda mine: [*mine, mine[0]],
    "backwards": lambda mine: mine[::-1],
}.items():
    try:
        validate_schedule([fault(steps[0]), steps[1]], stages_by_rank("zb1p", 2), 4)
        raise AssertionError("not noticed")
    except ValueError as e:
        print(f"{what:10}", e)

# %% [markdown]
# ## The report's table
# The bubble of a schedule is the time until the last rank is done, less what a rank has to do. Activations live from F
# until the end of the backward pass, W included. Below, simulated and by the report's formula, at F = W = 1, B = 2,
# F&B = 3:


# %%
#| export
def bubble(
    spans: list[Span], m: int, stages_per_rank: int, costs: ActionCosts = DEFAULT_COSTS
) -> float:
    """Return the idle time of a rank: the last end, less F + B of m micro-batches per stage."""
    busy = m * stages_per_rank * (costs.f + costs.b + 2 * costs.comm)
    return max(span.end for span in spans) - busy


def max_in_flight(steps: list[list[Step]]) -> list[int]:
    """Return the most micro-batches that each rank has in flight: after F, before the end of B or W."""
    peaks = []
    for rank_steps in steps:
        live, peak = 0, 0
        for step in rank_steps:
            live += sum(action.kind == "F" for action in step)
            peak = max(peak, live)
            live -= sum(action.kind in "BW" for action in step)
        peaks.append(peak)
    return peaks


BUBBLE_FORMULAS = {
    "1f1b": lambda pp, t: (pp - 1) * (t.f + t.b),
    "zb1p": lambda pp, t: (pp - 1) * (t.f + t.b - 2 * t.w),
    "dualpipe": lambda pp, t: (pp / 2 - 1) * (t.pair + t.b - 3 * t.w),
}


# %%
def measured(name: str, stages: int, m: int, t: ActionCosts = DEFAULT_COSTS):
    """(bubble, stages a rank, activations) of PP stages."""
    pp = stages // 2 if name == "dualpipev" else stages
    steps, each = schedule(name, pp, m), len(stages_by_rank(name, pp)[0])
    busy = 2 if name == "dualpipev" else 1  # dualpipe does each of its two stages for half of them
    return bubble(simulate(steps, t), m, busy, t), each, max(max_in_flight(steps))


print("PP   schedule   bubble = formula   parameters   activations")
for pp in (2, 4, 8, 16):
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        found, formula = (
            measured(name, pp, 2 * pp + 4),
            BUBBLE_FORMULAS[name.removesuffix("v")](pp, ActionCosts()),
        )
        print(f"{pp:2}   {name:10} {found[0]:6g} = {formula:<6g}    {found[1]:8}× {found[2]:12}")
        assert found == (formula, 1 + ("dual" in name), pp + ("dual" in name))

# %% [markdown]
# Exact, where F = W = B/2 and F&B = F + B. Elsewhere the formulas are approximations: they count the gaps of the ideal
# picture, and with other ratios steps no longer fit into each other. Let W be slower or faster, a pair gain time, or
# I (which is B − W) be slower, and the table and the simulation part:

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
        found = measured(name, 8, 20, t)[0]
        print(
            f"{name:9} F={t.f:g} B={t.b:<3g} W={t.w:<3g} F&B={t.pair:<3g}:"
            f"{BUBBLE_FORMULAS[name](8, t):13.2f} {found:10.2f}"
        )
assert any(abs(measured("dualpipe", 8, 20, t)[0] - BUBBLE_FORMULAS["dualpipe"](8, t)) > 0.1
           for t in (ActionCosts(1, 2.2, 1.1, 3.2), ActionCosts(1, 2, 1, 2.6)))  # fmt: skip

# %% [markdown]
# (When F&B is *less* than F + B, the simulation goes far below the formula, with more micro-batches even below zero:
# the bubble is what a step takes beyond F + B for each micro-batch, and every pair takes less.)
#
# ## Experiment: what if communication takes x of computation?
# The all-to-alls of a forward pass take $x$ times its computation; in a backward pass they take the same, while
# the computation is twice as long. V3's forward pass sits near $x = 1$. How many times as long as its computation
# alone does a training step take?

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
       title="16 stages, 120 micro-batches: pairs hide what travels")  # fmt: skip
ax.set_ylim(0.9)
ax.legend()
show(fig)

# %% [markdown]
# Until $2x$ exceeds what a pair computes (at $x = 1.5$), DualPipe pays only at the beginning and at the end of a
# training step, where operations are not paired. The others pay in full.

# %% [markdown]
# ## Play
# Choose a schedule; watch where it idles and how communication stretches what is not paired. Drag `until` (percent of
# the whole time) to go through it: what has not begun is pale.


# %%
def look(name="dualpipe", pp=8, m=20, x=0.0, until=100):
    """A timeline, and its cost in the title."""
    m = min_microbatches(name, pp, m)
    spans = simulate(schedule(name, pp, m), ActionCosts(comm=x))
    end, work = max(s.end for s in spans), m * 3 * (2 if name == "dualpipev" else 1)
    late = range(m // 2, m) if name == "dualpipe" else ()
    show(
        draw(
            spans,
            f"{name}: {end:g} units, of which {work} are computation ({work / end:.0%})",
            late,
            until=end * until / 100,
        )
    )


look()
play(look, name=list(SCHEDULES)[::-1], pp=(2, 16, 2), m=(4, 40, 2), x=(0.0, 2.0, 0.25),
     until=(0, 100, 1))  # fmt: skip

# %% [markdown]
# ## Exercises
# Fill in a function and run its cell; the checkers come first.
#
# **1 · Compute.** With PP stages and m micro-batches, for what share of the whole time is a rank of 1F1B idle?
# (Take B = 2F, as everywhere in this chapter; does it matter?)


# %%
@checker
def check_idle(fn):
    """How long does a rank work, and how long do all of them take together?"""
    for pp, m in ((4, 8), (16, 120)):
        spans = simulate(schedule("1f1b", pp, m))
        assert abs(fn(pp, m) - bubble(spans, m, 1) / max(s.end for s in spans)) < 1e-9


@checker
def check_least(fn):
    """Which number in Table 2 stays the same when m grows, and what grows with m?"""
    idle = lambda pp, m: measured("dualpipe", pp, int(m))[0] / (3 * m)
    for pp, limit in ((8, 0.06), (16, 0.04), (4, 0.07), (16, 0.5)):
        m = fn(pp, limit)
        assert m % 2 == 0 and m >= 2 * pp and idle(pp, m) <= limit
        assert m == 2 * pp or idle(pp, m - 2) > limit


@checker
def check_first_back(fn):
    """When has the last rank done all its forwards? And how many backwards come before rank r's?"""
    for f, b in ((1.0, 2.0), (0.5, 3.0)):
        spans = simulate(schedule("gpipe", 6, 9), ActionCosts(f=f, b=b))
        for r in range(6):
            mine = [s.start for s in spans if s.rank == r and s.step[0].kind == "B"]
            assert abs(fn(6, r, 9, f, b) - min(mine)) < 1e-9


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
# The bubble is (PP − 1)(F + B), the work m(F + B): the ratio of F and B does not matter.
# </details>
#
# **2 · Predict.** What is the least even number of micro-batches (at least 2 PP) with which the bubble of DualPipe is
# at most `share` of the computation, at the times of `DEFAULT_COSTS` (F = W = 1, B = 2, F&B = 3)?


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
# **3 · Predict.** Rank r of GPipe begins its first forward pass at r · f. When does it begin its first *backward*
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
# The last rank begins its forwards at (PP − 1) f and has m of them; then the gradient comes back, rank by rank.
# </details>

# %% [markdown]
# ## Scale-up
# V3: PP 16, and 2 × 64 pipelines beside each other on 2048 GPUs. A batch of 15,360 sequences gives each pipeline 120
# micro-batches of one sequence.

# %%
m = 15_360 // (2 * 64)
for name in ("1f1b", "zb1p", "dualpipe"):
    lost = measured(name, 16, m)[0] / (3 * m)
    print(f"{name:9} {m} micro-batches: bubble {lost:6.1%} of the computation")
assert measured("dualpipe", 16, m)[0] / (3 * m) < 0.04

# %% [markdown]
# The bubble is 4 % with DualPipe and 12.5 % with 1F1B, a gain worth having, but ZB1P has almost all of it. What only
# DualPipe does is hide the exchange of tokens, and that is worth far more: at $x = 1$ a training step takes 1.15 times
# its computation instead of 1.79. The price is one more micro-batch of activations, and that every parameter is held
# twice along the pipeline. This matters little, since 64-way expert parallelism leaves a GPU only one in 64 of the
# routed experts. `dsv3_ref/parallel/` executes these lists over real ranks.
