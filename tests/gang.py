"""A pool of processes that run functions as the ranks of a fresh gloo group, call after call."""

import os
import pickle
import traceback
from tempfile import TemporaryDirectory

from miniruns import FORK

WORLD = 8


def member(pipe) -> None:
    """Answer every (function, arguments, rank, world, address) with the function's result."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        fn, args, rank, world, address = pickle.loads(pipe.recv_bytes())
        try:
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
            pipe.send_bytes(pickle.dumps((True, fn(*args))))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Gang:
    """Up to WORLD processes, started when first needed. Tensors are copied, not shared."""

    def __init__(self):
        self.folder = TemporaryDirectory()
        self.n = 0
        self.members = []

    def grow(self, world: int) -> None:
        while len(self.members) < world:
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=member, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def run(self, world: int, fn, *args, seconds: float = 120.0) -> list:
        """fn(*args) on every rank of a world; the results by rank. One that fails fails all."""
        self.grow(world)
        self.n += 1
        address = f"file://{self.folder.name}/{self.n}"
        for rank, (_, pipe) in enumerate(self.members[:world]):
            pipe.send_bytes(pickle.dumps((fn, args, rank, world, address)))
        answers = [self.answer(pipe, seconds) for _, pipe in self.members[:world]]
        wrong = [f"rank {rank} of {world}:\n{v}" for rank, (ok, v) in enumerate(answers) if not ok]
        if wrong:
            self.stop()
            raise AssertionError("\n".join(wrong))
        return [value for _, value in answers]

    def answer(self, pipe, seconds: float):
        """(whether it went well, result or traceback)."""
        try:
            if not pipe.poll(seconds):
                return False, f"no answer for {seconds} s"
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return False, "the process died"

    def stop(self) -> None:
        for process, _ in self.members:
            process.kill()
        self.members = []


def gather_bucket(bucket, shard):
    """Return the whole flat tensor of a bucket from each rank's shard of it."""
    import torch.distributed as dist

    if not bucket.sharded:
        return shard
    flat = shard.new_empty(bucket.flat.shape)
    dist.all_gather_into_tensor(flat, shard.contiguous(), group=bucket.group)
    return flat
