"""`dsv3 serve` in a thread of this process, over real HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dsv3_ref.serving import api_server
from dsv3_ref.serving.network import bind_socket
from dsv3_ref.serving.service import Service


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
