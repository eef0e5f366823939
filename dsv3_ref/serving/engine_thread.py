"""The thread that steps the engine of chapter 18 for `dsv3 serve`, and its metrics."""

import asyncio
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from tokenizers import Tokenizer

from dsv3_ref.model import Transformer
from dsv3_ref.serve import Engine, StepOutput
from dsv3_ref.serving.output_processor import OutputProcessor, ServedRequest
from dsv3_ref.serving.prefill import PrefillWorker

HISTOGRAM_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds

# ── Metrics ──


class Histogram:
    """A Prometheus histogram of durations."""

    def __init__(self) -> None:
        self.counts = [0] * (len(HISTOGRAM_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Add a duration."""
        self.counts[sum(seconds > bound for bound in HISTOGRAM_BOUNDS)] += 1
        self.sum += seconds

    def exposition(self, name: str) -> Iterator[str]:
        """Yield the lines of Prometheus' text format, with cumulative counts."""
        total = 0
        for bound, count in zip([*HISTOGRAM_BOUNDS, "+Inf"], self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


# ── The thread ──


class EngineThread(threading.Thread):
    """The thread that steps the engine while there is work.

    Requests may be submitted from any thread; outputs are passed to the output processor.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        super().__init__(daemon=True)
        self.engine = engine
        self.wake = threading.Event()
        self.processor = OutputProcessor(tokenizer, self.wake)
        self.stopped = False
        self.failed = False
        self.finish_reasons: Counter[str] = Counter()
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.prefill_workers: list[PrefillWorker] = []

    def submit(self, requests: list[ServedRequest]) -> None:
        """Queue all requests or none; raises what `Scheduler.submit` raises."""
        self.processor.loop = asyncio.get_running_loop()
        for request in requests:
            request.arrival_time = time.monotonic()
        self.engine.submit(*requests)
        self.wake.set()

    def abort(self, requests: list[ServedRequest]) -> None:
        """Abort requests; the engine frees their blocks before its next step."""
        for request in requests:
            request.aborted = True
        self.wake.set()

    def call_between_steps(
        self, fn: Callable[[Transformer], Any], reset_prefix_cache: bool = False
    ) -> Future:
        """Run fn(model) in the main process between two steps; return a future of its result."""
        future = self.engine.call_between_steps(fn, reset_prefix_cache)
        self.wake.set()
        return future

    def busy(self) -> bool:
        """Return whether a step of the engine would do something."""
        engine, scheduler = self.engine, self.engine.scheduler
        is_active = any(not r.remote_prefill or r.aborted for r in scheduler.running)
        has_events = engine.pending_callbacks or engine.incoming_transfers
        return bool(is_active or scheduler.waiting or has_events)

    def run(self) -> None:
        """Step the engine until `stop` is called or a step raises an exception.

        The engine confines the fault of one request to it; what a step raises concerns all.
        """
        while not self.stopped:
            try:
                if not self.busy():
                    self.wake.wait()
                self.wake.clear()
                self.deliver(self.engine.step())
            except Exception:  # the state of the engine can no longer be trusted
                traceback.print_exc()
                self.failed = self.stopped = True
                self.deliver(self.fail_all())

    def fail_all(self) -> list[StepOutput]:
        """End all requests with the finish reason "failed"; return their ends."""
        scheduler = self.engine.scheduler
        requests = [*scheduler.running, *scheduler.waiting]
        for request in requests:
            request.finish_reason = "failed"
        return [StepOutput(request, [], [], "failed") for request in requests]

    def deliver(self, outputs: list[StepOutput]) -> None:
        """Update the metrics and pass the outputs of a step to the output processor.

        A fault while one output is recorded ends its request only.
        """
        now = time.monotonic()
        deliveries = []
        for output in outputs:
            try:
                self.record(output, now)
            except Exception as e:
                traceback.print_exc()
                output.request.aborted = True
                output = StepOutput(output.request, [], [], "error", repr(e))
            deliveries.append(output)
        if deliveries:
            self.processor.batches.put(deliveries)

    def record(self, output: StepOutput, now: float) -> None:
        """Add the output of one request to the metrics; if it has ended, cancel its prefill."""
        request = output.request
        assert isinstance(request, ServedRequest)
        if output.tokens:
            self.record_latency(request, len(output.tokens), now)
        if output.finish_reason:
            reason = "stop" if request.hit_stop_text else output.finish_reason
            self.finish_reasons[reason] += 1
            for worker in self.prefill_workers:
                worker.cancel(request)

    def record_latency(self, request: ServedRequest, num_tokens: int, now: float) -> None:
        """Add the times of new tokens to the histograms; tokens of one step share its time."""
        if request.last_token_time:
            latency = (now - request.last_token_time) / num_tokens
            num_latencies = num_tokens
        else:
            self.time_to_first_token.observe(now - request.arrival_time)
            latency = 0.0
            num_latencies = num_tokens - 1
        for _ in range(num_latencies):
            self.inter_token_latency.observe(latency)
        request.last_token_time = now

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the current step, or abandon it after `timeout` seconds."""
        self.stopped = True
        self.wake.set()
        self.processor.stop()
        self.join(timeout)

    def start(self) -> None:
        """Start this thread and the output processor's."""
        self.processor.start()
        super().start()
