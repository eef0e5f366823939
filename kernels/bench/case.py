"""Cases of the benchmark, their timings, and goals for these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Sizes = Mapping[str, int | str]
Output = Tensor | tuple[Tensor, ...]
Call = Callable[[], Output]
Calls = tuple[Call, dict[str, Call]]  # of a kernel, and of its yardsticks by name
GPULimits = dict[str, float]  # "copy": GB/s, read and written; "bf16" and "fp8": TFLOP/s


class NotTimedError(Exception):
    """An error of a measure that needs a time which was not taken."""


@dataclass
class Timing:
    """The result of a case: its time in ms, or the reason why it has none.

    The value of a yardstick is its time in ms or the reason why it has none. difference: how far
    the results are from those of the first yardstick that runs, relative to these.
    """

    name: str
    bytes: float
    flops: float
    peak: str
    note: str = ""
    ms: float | None = None
    yardsticks: dict[str, float | str] = field(default_factory=dict)
    difference: float | None = None
    configs: dict[str, float] = field(default_factory=dict)  # ms of every config that was tuned
    skipped: str = ""
    error: str = ""
    fatal: bool = False  # the process has lost its GPU

    @property
    def time(self) -> float:
        """The time in ms; raises `NotTimedError` if there is none."""
        if self.ms is None:
            raise NotTimedError(f"{self.name} was not timed")
        return self.ms

    @property
    def tflops(self) -> float:
        """The achieved TFLOP/s."""
        return self.flops / self.time / 1e9

    @property
    def gbps(self) -> float:
        """The achieved GB/s."""
        return self.bytes / self.time / 1e6


Measure = Callable[[Timing, dict[str, Timing], GPULimits], float]  # of a case, all cases by name


@dataclass(frozen=True)
class Goal:
    """A minimum for a measure of a case."""

    text: str
    minimum: float
    measure: Measure


@dataclass(frozen=True)
class Case:
    """An op at one size: how to call it, its yardsticks, and the bytes and FLOPs that it needs.

    make() allocates tensors on torch's default device and returns the call of a kernel and its
    yardsticks by name. Calls take no arguments and can be repeated.
    """

    kind: str  # the name of an op, perhaps followed by "backward" or "wgrad"
    sizes: Sizes
    make: Callable[[], Calls]
    bytes: float  # each input read once, each output written once
    flops: float = 0
    peak: str = "bf16"  # the rate of the tensor cores that bounds it: "bf16" or "fp8"
    goals: tuple[Goal, ...] = ()
    memory: float = 0  # bytes that it needs at least, given where a GPU may have less
    note: str = ""
    tolerance: float = 0.02  # the largest `Timing.difference` of right results

    @property
    def name(self) -> str:
        """The kind and the sizes: `act_quant m=4096 k=7168`."""
        return " ".join([self.kind, *(f"{k}={v}" for k, v in self.sizes.items())])

    def make_timing(
        self,
        ms: float | None = None,
        yardsticks: dict[str, float | str] | None = None,
        difference: float | None = None,
        skipped: str = "",
        error: str = "",
        fatal: bool = False,
    ) -> Timing:
        """Return the result of this case; a difference beyond the tolerance is an error."""
        if difference is not None and not difference <= self.tolerance:  # NaN is one too
            error = f"wrong by {difference:.2g}, more than {self.tolerance:g} of the yardstick"
        return Timing(
            self.name, self.bytes, self.flops, self.peak, self.note, ms, yardsticks or {},
            difference, skipped=skipped, error=error, fatal=fatal,
        )  # fmt: skip


# ── Measures ──


def achieved_tflops(timing: Timing, timings: dict[str, Timing], limits: GPULimits) -> float:
    """Return the TFLOP/s of a case."""
    return timing.tflops


def fraction_of_copy(timing: Timing, timings: dict[str, Timing], limits: GPULimits) -> float:
    """Return the rate of a case's memory traffic as a fraction of that of a large copy."""
    return timing.gbps / limits["copy"]


def speedup_over(yardstick: str) -> Measure:
    """Return the measure of how many times as fast a case is as its yardstick."""

    def measure(timing: Timing, timings: dict[str, Timing], limits: GPULimits) -> float:
        ms = timing.yardsticks[yardstick]
        if isinstance(ms, str):
            raise NotTimedError(f"{yardstick} was not timed: {ms}")
        return ms / timing.time

    return measure


def fraction_of_case(name: str) -> Measure:
    """Return the measure of a case's TFLOP/s as a fraction of those of another case."""

    def measure(timing: Timing, timings: dict[str, Timing], limits: GPULimits) -> float:
        return timing.tflops / timings[name].tflops

    return measure


def roofline(timing: Timing, limits: GPULimits) -> tuple[str, float]:
    """Return the binding limit and its lower bound in ms: max(bytes / copy, FLOPs / peak)."""
    memory_ms = timing.bytes / limits["copy"] / 1e6
    compute_ms = timing.flops / limits[timing.peak] / 1e9
    return ("copy", memory_ms) if memory_ms >= compute_ms else (timing.peak, compute_ms)


COPY = "copy"  # the yardstick that reads and writes as many bytes as the case does
COPY_GOAL = (Goal("of copy", 0.85, speedup_over(COPY)),)
