"""A worker process that owns the GPU: a crash or a hang costs one case, not the run."""

from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

from dsv3_ref.kernels.bench.case import Case, Timing
from dsv3_ref.kernels.bench.suite import all_cases
from dsv3_ref.kernels.bench.timing import GPUInfo, describe_gpu, format_error, try_case


def worker_main(pipe: Connection) -> None:
    """Reply to (name, rounds) with the timing of a case or, for an empty name, a `GPUInfo`."""
    by_name = {case.name: case for case in all_cases()}
    while True:
        name, rounds = pipe.recv()
        pipe.send(try_case(by_name[name], rounds) if name else describe_gpu(rounds))


class Worker:
    """A process that times cases, and the pipe to it."""

    def __init__(self, target: Callable[[Connection], None] = worker_main):
        context = get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(target=target, args=(worker_end,), daemon=True)
        self.process.start()
        worker_end.close()

    def request(self, name: str, rounds: int, seconds: float) -> object:
        """Return the reply to (name, rounds).

        Raises `TimeoutError` after this many seconds, and `RuntimeError` if the process has ended.
        """
        try:
            self.pipe.send((name, rounds))
            if not self.pipe.poll(seconds):
                raise TimeoutError(f"no reply within {seconds:g} s")
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"the process ended with exit code {code}") from None

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self.process.kill()
        self.process.join()


def run_cases(
    cases: list[Case],
    rounds: int,
    seconds: float,
    start_worker: Callable[[], Worker] = Worker,
) -> Iterator[tuple[GPUInfo, Timing]]:
    """Time cases in a worker, one after the other, and replace a worker that was lost."""
    worker = start_worker()
    gpu = worker.request("", rounds, seconds)
    assert isinstance(gpu, GPUInfo)
    for case in cases:
        try:
            timing = worker.request(case.name, rounds, seconds)
        except (TimeoutError, RuntimeError) as e:
            timing = case.make_timing(error=format_error(e), fatal=True)
        assert isinstance(timing, Timing)
        if timing.fatal:
            worker.kill()
            worker = start_worker()
        yield gpu, timing
    worker.kill()
