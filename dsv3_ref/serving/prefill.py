"""Prompts are read in processes of their own; their latents travel once, through a pipe."""

import json
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context

import torch

from dsv3_ref.checkpoints.native import load
from dsv3_ref.config import UserError
from dsv3_ref.serve import KVTransfer, Request
from dsv3_ref.serving.config import build_engine
from dsv3_ref.training.strategy import pick_device

# ── Parcels ──


def transfer_to_bytes(job: int, parcel: KVTransfer) -> bytes:
    """A parcel as a line of JSON and raw numbers."""
    tensors = [parcel.kv_lsx, parcel.h_sd, parcel.logit_w]
    raw = [x.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes() for x in tensors]
    kinds = [[str(x.dtype)[6:], list(x.shape), len(r)] for x, r in zip(tensors, raw)]
    head = {
        "job": job,
        "start": parcel.start,
        "mtp": parcel.num_mtp_computed_tokens,
        "tensors": kinds,
    }
    return json.dumps(head).encode() + b"\n" + b"".join(raw)


def transfer_from_bytes(data: bytes, device) -> tuple[int, KVTransfer]:
    """Decode a message from `transfer_to_bytes` and place its tensors on a device."""
    line, _, raw = data.partition(b"\n")
    head, tensors, at = json.loads(line), [], 0
    for kind, shape, size in head["tensors"]:
        dtype, part = getattr(torch, kind), bytearray(raw[at : at + size])
        flat = torch.frombuffer(part, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors.append(flat.view(shape).to(device))
        at += size
    return head["job"], KVTransfer(head["start"], tensors[0], head["mtp"], *tensors[1:])


# ── The process, from within and from without ──


def prefill_worker_main(pipe, args, threads: int) -> None:
    """The life of a prefill process: prompts in, latents out, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the decode process says when it is over
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    model = load(args.model).to(pick_device(args.device)).eval()
    engine, jobs = build_engine(model, replace(args, max_queue=1 << 30), prefill_only=True), {}
    pipe.send_bytes(b"ready")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while pipe.poll(0 if engine.has_unfinished_requests() else None):
                told = json.loads(pipe.recv_bytes())
                if "tokens" in told:
                    jobs[told["job"]] = row = Request(
                        told["tokens"], 1, num_present_tokens=told["have"]
                    )
                    engine.submit(row)
                elif told["job"] in jobs:
                    jobs[told["job"]].aborted = True
            engine.step()
            names = {row: job for job, row in jobs.items()}
            for row, parcel in engine.outgoing_transfers:
                pipe.send_bytes(transfer_to_bytes(names[row], parcel))
            engine.outgoing_transfers.clear()
            jobs = {job: row for job, row in jobs.items() if not row.finish_reason}


class PrefillWorker:
    """A prefill process, seen from the one that decodes."""

    def __init__(self, args, desk, threads: int):
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.engine_thread, self.rows, self.jobs, self.alive = desk, {}, 0, True
        work = theirs, args, threads
        self.process = spawn.Process(target=prefill_worker_main, args=work, daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until its model is loaded, then listen."""
        try:
            self.pipe.recv_bytes()
        except EOFError:
            raise UserError("a prefill process did not start; what it said is above") from None
        threading.Thread(target=self.listen, daemon=True).start()

    def submit(self, row: Request) -> None:
        self.jobs += 1
        self.rows[self.jobs] = row
        self.send_message({"job": self.jobs, "tokens": row.tokens, "have": row.num_computed_tokens})

    def cancel(self, row: Request) -> None:
        """A row has ended; if it is still being read, no longer."""
        for job in [job for job, r in list(self.rows.items()) if r is row]:
            self.rows.pop(job, None)
            self.send_message({"job": job})

    def send_message(self, message: dict) -> None:
        with suppress(OSError):  # it has died, which `listen` will see
            self.pipe.send_bytes(json.dumps(message).encode())

    def listen(self) -> None:
        """Parcels to the engine; if the process dies, its prompts are read here."""
        with suppress(EOFError, OSError):
            while True:
                job, parcel = transfer_from_bytes(
                    self.pipe.recv_bytes(), self.engine_thread.engine.runner.device
                )
                if row := self.rows.pop(job, None):
                    self.engine_thread.engine.incoming_transfers.append((row, parcel))
                    self.engine_thread.wake.set()
        self.alive = False
        if self.rows and not self.engine_thread.stopped:
            print("a prefill process died; its prompts are read here", file=sys.stderr)
        for row in list(self.rows.values()):
            row.remote_prefill = False
        self.rows.clear()
        self.engine_thread.wake.set()

    def stop(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()


def dispatch_prefill(readers: list[PrefillWorker], row: Request) -> bool:
    """Give a prompt to the process that has the fewest; False if none lives."""
    alive = [r for r in readers if r.alive]
    if alive:
        min(alive, key=lambda r: len(r.rows)).submit(row)
    return bool(alive)
