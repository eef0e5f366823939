"""`dsv3 serve` in a thread of this process or in one of its own, over real HTTP."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from miniruns import Command, run_command

from dsv3_ref.serving import api_server, output_processor
from dsv3_ref.serving.network import bind_socket
from dsv3_ref.serving.service import Service

# A client of httpx reads all certificates, which takes longer than a request of these tests.
httpx._transports.default.create_ssl_context = cache(httpx.create_ssl_context)


@contextmanager
def served(folder, **options: Any) -> Iterator[tuple[str, Service]]:
    """Yield (address, service) of a server in a thread."""
    listener = bind_socket("127.0.0.1", 0)
    options = {"seed": 0, "block_size": 8, "grace": 5} | options
    with Service(api_server.ServeConfig(folder, **options)) as service:
        server = api_server.make_api_server(service, listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def served_saying(
    folder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[[str], openai.OpenAI], str, Service]]:
    """Yield (say, address, service) of a server whose model writes the text given to `say`.

    It writes seven characters at a time; `say` returns a client.
    """
    pieces: list[str] = []
    push_tokens = output_processor.StreamDetokenizer.push

    def push(self, tokens):
        push_tokens(self, tokens)
        return pieces.pop(0) if pieces else ""

    monkeypatch.setattr(output_processor.StreamDetokenizer, "push", push)
    monkeypatch.setattr(output_processor.StreamDetokenizer, "flush", lambda self: "")
    with served(folder) as (base, service):

        def say(text: str) -> openai.OpenAI:
            pieces[:] = [text[i : i + 7] for i in range(0, len(text), 7)]
            return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)

        yield say, base, service


@contextmanager
def command(folder, *more, prepare=None):
    """Yield (address, process) of `dsv3 serve` in a process of its own.

    prepare: called there before.
    """
    argv = ["serve", str(folder), "--port", "0", *more]
    process = Command({}, run_command, folder.parent, argv, prepare)
    end = time.monotonic() + 60
    try:
        while not (
            found := re.search(r"^(http://\S+)/v1 ", Path(process.log.name).read_text(), re.M)
        ):
            assert process.poll() is None and time.monotonic() < end, process.log.read()
            time.sleep(0.05)
        yield found[1], process
    finally:
        process.kill()
        process.wait(10)
