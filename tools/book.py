"""Execute notebooks/NN_name.py and store the result as NN_name.ipynb.

    python tools/book.py            every chapter
    python tools/book.py 03 06_mtp  these

Builds are reproducible: a cell's id is a hash of its text, and nothing that depends on time,
process or memory address is stored. Widgets need a running kernel, so they are stored as a line of
text.
"""

import hashlib
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
from jupyter_client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets import Type

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
SLIDERS = "(sliders: they move once this cell has been run)"
KERNEL = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # other backends store no figure
    "PYTHONHASHSEED": "0",  # fixes the order of sets
}
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def find(names: list[str]) -> list[Path]:
    """Return chapters by number, name or file (`03`, `mla`, `03_mla`, `notebooks/03_mla.py`)."""
    every = {p.stem: p for p in sorted(NOTEBOOKS.glob("[0-9]*.py"))}
    paths, missing = [], []
    for name in [Path(name).stem for name in names] or list(every):
        stems = [stem for stem in every if name in (stem, *stem.split("_", 1))]
        paths += [every[stem] for stem in stems]
        missing += [] if stems else [name]
    if missing:
        sys.exit(f"no chapter {', '.join(missing)}; there are {', '.join(every)}")
    return paths


def cell_ids(cells: list[NotebookNode]) -> list[str]:
    """Return an id per cell: a hash of its type and text, plus `-2` for the second of equals."""
    repeats: Counter[str] = Counter()
    ids = []
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        repeats[digest] += 1
        ids.append(digest + (f"-{repeats[digest]}" if repeats[digest] > 1 else ""))
    return ids


def strip_addresses(text: str | list) -> str:
    """Return text without memory addresses of objects."""
    return ADDRESS.sub("", text if isinstance(text, str) else "".join(text))


def normalize_output(output: NotebookNode) -> NotebookNode:
    """Remove what differs between runs from an output; a widget becomes a line of text."""
    if output.output_type == "stream":
        output.text = strip_addresses(output.text)
    if "data" in output:
        if WIDGET in output.data:
            return nbformat.v4.new_output("display_data", {"text/plain": SLIDERS})
        output.data.update(
            {k: strip_addresses(v) for k, v in output.data.items() if k.startswith("text/")}
        )
    return output


def normalize_notebook(nb: NotebookNode) -> NotebookNode:
    """Make ids, metadata and outputs of a notebook depend on its cells only."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell, name in zip(nb.cells, cell_ids(nb.cells)):
        cell["id"] = name
        if cell.cell_type == "code":
            cell.outputs = [normalize_output(x) for x in cell.outputs]
    return nb


class Channel(AsyncZMQSocketChannel):
    """A channel that polls every second, because wake-ups of sockets are sometimes lost."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message; raise Empty after `timeout` seconds."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                return await super().get_msg(min(1.0, max(0.0, left)))
            except Empty:
                if left <= 1:
                    raise


class Client(AsyncKernelClient):
    """A kernel client with polling channels."""

    shell_channel_class = Type(Channel)
    iopub_channel_class = Type(Channel)


def execute(path: Path) -> NotebookNode:
    """Run a chapter from top to bottom in its own folder; raise at the first failing cell."""
    nb = jupytext.read(path)
    folder = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        nb, timeout=120, resources=folder, record_timing=False, coalesce_streams=True
    )
    kernel = client.create_kernel_manager()
    kernel.client_class = f"{__name__}.Client"
    with (
        TemporaryDirectory() as sockets
    ):  # sockets in files: two builds could choose the same TCP ports
        kernel.transport, kernel.ip = "ipc", f"{sockets}/kernel"
        client.execute(env={"OMP_NUM_THREADS": "1"} | os.environ | KERNEL)
    return normalize_notebook(nb)


def build(path: Path) -> bool:
    """Write a chapter's .ipynb and print its run time; return False if a cell failed."""
    start = time.perf_counter()
    try:
        nb = execute(path)
    except CellExecutionError as e:
        print(f"{path.stem:16} failed\n{e}")
        return False
    nbformat.write(nb, path.with_suffix(".ipynb"))
    print(f"{path.stem:16}{time.perf_counter() - start:5.0f} s", flush=True)
    return True


def main(names: list[str]) -> int:
    """Build the given chapters, or all of them."""
    failed = [path for path in find(names) if not build(path)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
