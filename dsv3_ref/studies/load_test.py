"""Clients by the dozen against `dsv3 serve`: `python -m dsv3_ref.studies.load_test runs/tiny`.

Writes `serve.json`, from which chapter 18 draws: tokens a second, times to the first token and
between tokens, for servers of one process, with drafts, and with prefill in a process of its own.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

SERVERS = {
    "one process": [], "one MTP draft": ["--num-speculative-tokens", "1"],
    "prefill apart": ["--prefill-workers", "1"],
}  # fmt: skip
WORDS = "the people of our country have asked for peace and work and schools in every state".split()


@dataclass(frozen=True)
class LoadTestConfig:
    """How many clients a server bears."""

    model: tyro.conf.Positional[Path]
    out: Path = Path("notebooks/results")
    clients: tuple[int, ...] = (1, 4, 16, 64)
    max_tokens: int = 48
    """tokens of an answer"""
    prompt_words: int = 40
    """of a prompt"""
    rounds: int = 3
    """how often each server is asked; the round of median speed counts"""


@contextmanager
def start_server(model: Path, *more: str):
    """(host, port) of a server in processes of its own."""
    argv = [sys.executable, "-m", "dsv3_ref", "serve", str(model), "--port", "0", *more]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        host, port = process.stdout.readline().split("/")[2].split(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait()


async def run_client(address, prompt: str, new: int) -> list[tuple[float, int]]:
    """Stream an answer; for each piece, seconds since the question and its tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": new, "stream": True, "logprobs": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    start, times = time.perf_counter(), []
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head.encode() + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            times.append((time.perf_counter() - start, len(choice["logprobs"]["tokens"])))
        elif line.startswith(b"data: [DONE]"):
            break
    else:
        times = []  # it ended without its end: lost
    writer.close()
    return times


async def run_clients(address, n: int, args: LoadTestConfig) -> dict:
    """n clients at once: what they got, and when; quartiles of times in seconds."""
    dice = random.Random()  # new prompts each time: none is found in the cache
    prompts = [" ".join(dice.choices(WORDS, k=args.prompt_words)) for _ in range(n)]
    start = time.perf_counter()
    found = await asyncio.gather(*(run_client(address, p, args.max_tokens) for p in prompts))
    seconds = time.perf_counter() - start
    whole = [x for x in found if x]
    tokens = sum(n for x in whole for _, n in x)
    each = [(b - a) / n for x in whole for (a, _), (b, n) in zip(x, x[1:]) for _ in range(n)]
    quartiles = lambda x: [round(q, 4) for q in statistics.quantiles(x + x, n=4)]
    return {
        "clients": n, "tokens": tokens, "tokens_s": round(tokens / seconds, 1),
        "lost": n - len(whole), "first": quartiles([x[0][0] for x in whole]),
        "each": quartiles(each),
    }  # fmt: skip


def median_round(rounds: list[dict]) -> dict:
    """The round of median speed, beside the speeds of all."""
    ranked = sorted(rounds, key=lambda r: r["tokens_s"])
    lost = sum(r["lost"] for r in rounds)
    speeds = [r["tokens_s"] for r in rounds]
    return ranked[len(ranked) // 2] | {"lost": lost, "rounds_tokens_s": speeds}


def main(args: LoadTestConfig, command: str) -> None:
    """All servers wait side by side and are asked in turn, so that a noisy minute hits them all."""
    found = {name: {n: [] for n in args.clients} for name in SERVERS}
    with ExitStack() as stack:
        where = {
            name: stack.enter_context(start_server(args.model, *x)) for name, x in SERVERS.items()
        }
        for address in where.values():
            asyncio.run(run_clients(address, 2, args))  # warm
        for _ in range(args.rounds):
            for n in args.clients:
                for name, address in where.items():
                    found[name][n].append(asyncio.run(run_clients(address, n, args)))
    servers = {name: [median_round(r) for r in of.values()] for name, of in found.items()}
    for name, rows in servers.items():
        print(name, *rows, sep="\n  ")
    result = {
        "command": command, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "new": args.max_tokens, "servers": servers,
    }  # fmt: skip
    (args.out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    words = shlex.join(["python", "-m", "dsv3_ref.studies.load_test", *sys.argv[1:]])
    main(tyro.cli(LoadTestConfig), words)
