"""Prefill in separate processes, which send the KV cache of each prompt back through a pipe."""

import json
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from dsv3_ref.checkpoints.native import load
from dsv3_ref.config import UserError
from dsv3_ref.serve import Engine, KVTransfer, Request
from dsv3_ref.serving.config import ServeConfig, build_engine
from dsv3_ref.training.strategy import pick_device

# ── Serialization ──


def transfer_to_bytes(job: int, transfer: KVTransfer) -> bytes:
    """Serialize a transfer as a line of JSON followed by the raw bytes of its tensors."""
    layout = []
    raw = []
    for x in (transfer.kv_lsx, transfer.h_sd, transfer.logit_w):
        data = x.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        layout.append([str(x.dtype).removeprefix("torch."), list(x.shape), len(data)])
        raw.append(data)
    head = {
        "job": job,
        "start": transfer.start,
        "mtp": transfer.num_mtp_computed_tokens,
        "tensors": layout,
    }
    return json.dumps(head).encode() + b"\n" + b"".join(raw)


def transfer_from_bytes(data: bytes, device: torch.device | str) -> tuple[int, KVTransfer]:
    """Return (job, transfer) from `transfer_to_bytes`, with the tensors on `device`."""
    line, _, raw = data.partition(b"\n")
    head = json.loads(line)
    tensors = []
    start = 0
    for dtype_name, shape, size in head["tensors"]:
        dtype = getattr(torch, dtype_name)
        part = bytearray(raw[start : start + size])
        flat = torch.frombuffer(part, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors.append(flat.view(shape).to(device))
        start += size
    kv_lsx, h_sd, logit_w = tensors
    return head["job"], KVTransfer(head["start"], kv_lsx, head["mtp"], h_sd, logit_w)


# ── Inside the process ──


def prefill_worker_main(pipe: Connection, args: ServeConfig, threads: int) -> None:
    """Run a prefill process: receive prompts and send transfers until the pipe is closed.

    A job that ends with an error is sent back, as a message without a transfer.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process ends this one
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    model = load(args.model, verify=args.verify).to(pick_device(args.device)).eval()
    engine = build_engine(model, replace(args, max_queue=1 << 30), prefill_only=True)
    requests: dict[int, Request] = {}  # by job
    pipe.send_bytes(b"ready")
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while pipe.poll(0 if engine.has_unfinished_requests() else None):
                receive_message(json.loads(pipe.recv_bytes()), engine, requests)
            outputs = engine.step()
            jobs = {request: job for job, request in requests.items()}
            for request, transfer in engine.outgoing_transfers:
                pipe.send_bytes(transfer_to_bytes(jobs[request], transfer))
            engine.outgoing_transfers.clear()
            for output in outputs:
                if output.finish_reason == "error":
                    pipe.send_bytes(json.dumps({"failed": jobs[output.request]}).encode())
            requests = {job: r for job, r in requests.items() if not r.finish_reason}


def receive_message(message: dict, engine: Engine, requests: dict[int, Request]) -> None:
    """Submit a new prompt to the engine, or abort the job of a message without tokens."""
    job = message["job"]
    if "tokens" in message:
        request = Request(
            message["tokens"], 1, num_present_tokens=message["have"],
            cache_salt=bytes.fromhex(message["salt"]),
        )  # fmt: skip
        requests[job] = request
        engine.submit(request)
    elif job in requests:
        requests[job].aborted = True


# ── Its counterpart in the main process ──


class PrefillWorker:
    """Handle of a prefill process in the process that decodes.

    engine: receives the transfers. wake: set when there is work for the engine.
    """

    def __init__(self, args: ServeConfig, engine: Engine, wake: threading.Event, threads: int):
        spawn = get_context("spawn")
        self.pipe, remote_end = spawn.Pipe()
        self.engine = engine
        self.wake = wake
        self.requests: dict[int, Request] = {}  # by job
        self.num_jobs = 0
        self.alive = True
        self.process = spawn.Process(
            target=prefill_worker_main, args=(remote_end, args, threads), daemon=True
        )
        self.process.start()
        remote_end.close()

    def wait_until_ready(self) -> None:
        """Wait until the process has loaded its model, then start the thread that listens to it."""
        try:
            self.pipe.recv_bytes()
        except EOFError:
            raise UserError(
                "a prefill process failed to start; its error message is printed above"
            ) from None
        threading.Thread(target=self.listen, daemon=True).start()

    def submit(self, request: Request) -> None:
        """Send the prompt of a request to the process."""
        self.num_jobs += 1
        self.requests[self.num_jobs] = request
        self.send_message(
            {
                "job": self.num_jobs,
                "tokens": request.tokens[: request.num_prefill_tokens],
                "have": request.num_computed_tokens,
                "salt": request.cache_salt.hex(),
            }
        )

    def cancel(self, request: Request) -> None:
        """Abort the prefill of a request that has ended; do nothing if it is complete."""
        jobs = [job for job, r in list(self.requests.items()) if r is request]
        for job in jobs:
            self.requests.pop(job, None)
            self.send_message({"job": job})

    def send_message(self, message: dict) -> None:
        """Send a message; `listen` handles the case that the process has died."""
        with suppress(OSError):
            self.pipe.send_bytes(json.dumps(message).encode())

    def listen(self) -> None:
        """Pass transfers to the engine; when the process dies, return its prompts to the engine.

        Runs in a thread of its own.
        """
        device = self.engine.runner.device
        with suppress(EOFError, OSError):
            while True:
                self.receive(self.pipe.recv_bytes(), device)
                self.wake.set()
        was_stopped, self.alive = not self.alive, False
        if self.requests and not was_stopped:
            sentence = "a prefill process died; the main process takes over its prompts"
            print(sentence, file=sys.stderr)
        for request in list(self.requests.values()):
            request.remote_prefill = False
        self.requests.clear()
        self.wake.set()

    def receive(self, data: bytes, device: torch.device | str) -> None:
        """Pass a transfer to the engine, or return a prompt that could not be computed."""
        if data.startswith(b'{"failed"'):
            if request := self.requests.pop(json.loads(data)["failed"], None):
                request.local_prefill = True
                request.remote_prefill = False
            return
        job, transfer = transfer_from_bytes(data, device)
        if request := self.requests.pop(job, None):
            self.engine.incoming_transfers.append((request, transfer))

    def stop(self) -> None:
        """Kill the process."""
        self.alive = False
        self.process.kill()
        self.process.join()


def dispatch_prefill(workers: list[PrefillWorker], request: Request) -> bool:
    """Send a prompt to the least loaded worker; return False if no worker is alive."""
    alive = [worker for worker in workers if worker.alive]
    if alive:
        min(alive, key=lambda worker: len(worker.requests)).submit(request)
    return bool(alive)
