"""Measure how `dsv3 serve` performs under load: `python -m dsv3_ref.studies.load_test runs/tiny`.

Concurrent clients stream completions from three servers: one process, one process with an MTP
draft, and one with a separate prefill worker. The output, `serve.json`, holds throughput, time to
first token and inter-token latency; chapter 18 plots it.
"""

import asyncio
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import tyro

from dsv3_ref.config import UserError

SERVERS: dict[str, list[str]] = {  # name → further options of `dsv3 serve`
    "one process": [],
    "one MTP draft": ["--num-speculative-tokens", "1"],
    "separate prefill": ["--prefill-workers", "1"],
}
WORDS = "the people of our country have asked for peace and work and schools in every state".split()

Address = tuple[str, int]  # host, port


@dataclass(frozen=True)
class LoadTestConfig:
    """Options of the load test."""

    model: tyro.conf.Positional[Path]
    """the run or checkpoint to serve"""
    out: Path = Path("notebooks/results")
    """folder of serve.json"""
    clients: tuple[int, ...] = (1, 4, 16, 64)
    """numbers of concurrent clients"""
    max_tokens: int = 48
    """tokens per completion"""
    prompt_words: int = 40
    """words per prompt"""
    rounds: int = 3
    """rounds per server and number of clients; the round of median throughput is reported"""


class Chunk(NamedTuple):
    """A piece of a streamed completion."""

    seconds: float  # since the request
    tokens: int


# ── Server and clients ──


@contextmanager
def start_server(model: Path, *options: str) -> Iterator[Address]:
    """Run `dsv3 serve` in a process of its own and yield its address."""
    argv = [sys.executable, "-m", "dsv3_ref", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        host, port = process.stdout.readline().split("/")[2].split(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait()


async def run_client(address: Address, prompt: str, max_tokens: int) -> list[Chunk]:
    """Stream a completion and return its chunks; [] if the stream ended before `[DONE]`."""
    request = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "logprobs": 0}
    request["ignore_eos"] = True  # all completions have the same length
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\n"
    head += "Content-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    chunks = []
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head.encode() + body)
    is_complete = False
    async for line in reader:
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            num_tokens = len(choice["logprobs"]["tokens"])
            chunks.append(Chunk(time.perf_counter() - start, num_tokens))
        elif line.startswith(b"data: [DONE]"):
            is_complete = True
            break
    writer.close()
    return chunks if is_complete else []


async def run_clients(address: Address, clients: int, args: LoadTestConfig) -> dict:
    """Run clients concurrently and measure them; latencies are quartiles in seconds or None."""
    rng = random.Random()  # other prompts in every round: the prefix cache has none of them
    prompts = [" ".join(rng.choices(WORDS, k=args.prompt_words)) for _ in range(clients)]
    start = time.perf_counter()
    streams = await asyncio.gather(*(run_client(address, p, args.max_tokens) for p in prompts))
    seconds = time.perf_counter() - start
    complete = [chunks for chunks in streams if chunks]
    if not complete:
        raise UserError(f"the server has answered none of {clients} clients")
    num_tokens = sum(sum(chunk.tokens for chunk in chunks) for chunks in complete)
    return {
        "clients": clients,
        "completion_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 1),
        "failed": clients - len(complete),
        "ttft_s": quartiles([chunks[0].seconds for chunks in complete]),
        "inter_token_latency_s": quartiles(inter_token_latencies(complete)),
    }


def inter_token_latencies(streams: list[list[Chunk]]) -> list[float]:
    """Return the seconds between tokens; the tokens of a chunk share the time since the last."""
    latencies = []
    for chunks in streams:
        for previous, chunk in pairwise(chunks):
            if chunk.tokens:
                latency = (chunk.seconds - previous.seconds) / chunk.tokens
                latencies += [latency] * chunk.tokens
    return latencies


def quartiles(values: list[float]) -> list[float] | None:
    """Return the three quartiles, rounded; a single value is all three of them, no value None."""
    if not values:
        return None  # every stream came in one chunk: no time between tokens was seen
    return [round(quartile, 4) for quartile in statistics.quantiles(values + values, n=4)]


# ── The test ──


def median_round(rounds: list[dict]) -> dict:
    """Return the round of median throughput, with the throughput and the failures of all rounds."""
    ranked = sorted(rounds, key=lambda r: r["tokens_per_s"])
    return ranked[len(ranked) // 2] | {
        "failed": sum(r["failed"] for r in rounds),
        "tokens_per_s_by_round": [r["tokens_per_s"] for r in rounds],
    }


def measure_servers(args: LoadTestConfig) -> dict[str, list[dict]]:
    """Measure every server; return one result per number of clients.

    All servers run throughout and take turns, so that a noisy minute affects all of them.
    """
    rounds: dict[tuple[str, int], list[dict]] = {}
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(start_server(args.model, *options))
            for name, options in SERVERS.items()
        }
        for address in addresses.values():
            asyncio.run(run_clients(address, 2, args))  # to warm up
        for _, clients, name in product(range(args.rounds), args.clients, addresses):
            measures = asyncio.run(run_clients(addresses[name], clients, args))
            rounds.setdefault((name, clients), []).append(measures)
    return {name: [median_round(rounds[name, n]) for n in args.clients] for name in SERVERS}


def main(args: LoadTestConfig, command: str) -> None:
    """Measure the servers, print the results and write serve.json."""
    servers = measure_servers(args)
    for name, results in servers.items():
        print(name, *results, sep="\n  ")
    report = {
        "command": command, "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "max_tokens": args.max_tokens, "servers": servers,
    }  # fmt: skip
    (args.out / "serve.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    words = shlex.join(["python", "-m", "dsv3_ref.studies.load_test", *sys.argv[1:]])
    main(tyro.cli(LoadTestConfig), words)
