"""Execute notebooks/NN_name.py and store the result beside it, as NN_name.ipynb.

    python tools/book.py            every chapter
    python tools/book.py 03 06_mtp  these

A second build of the same sources changes no byte: a cell's id follows from its text, and nothing
that names a time, a process or an address is kept. Sliders need a running kernel, so a widget
leaves one line of text.
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

import jupytext
import nbformat
from jupyter_client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets import Type

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
SLIDERS = "(sliders: they move once this cell has been run)"
KERNEL = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # others leave no picture
    "PYTHONHASHSEED": "0",  # the order of a set
}
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


def find(names: list[str]) -> list[Path]:
    """Chapters by number, name or file (`03`, `mla`, `03_mla`, `notebooks/03_mla.py`)."""
    every = {p.stem: p for p in sorted(NOTEBOOKS.glob("[0-9]*.py"))}
    wanted = [Path(name).stem for name in names] or list(every)
    found = [[s for s in every if name in (s, *s.split("_", 1))] for name in wanted]
    if missing := [name for name, stems in zip(wanted, found) if not stems]:
        sys.exit(f"no chapter {', '.join(missing)}; there are {', '.join(every)}")
    return [every[stem] for stems in found for stem in stems]


def cell_ids(cells) -> list[str]:
    """An id a cell, from its kind and text; the second of two equal cells ends in `-2`."""
    seen, ids = Counter(), []
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] += 1
        ids.append(digest + (f"-{seen[digest]}" if seen[digest] > 1 else ""))
    return ids


def strip_addresses(text: str | list) -> str:
    """Text without addresses of objects."""
    return ADDRESS.sub("", text if isinstance(text, str) else "".join(text))


def normalize_output(output):
    """An output without what differs from run to run; a widget becomes a line of text."""
    if output.output_type == "stream":
        output.text = strip_addresses(output.text)
    if "data" in output:
        if WIDGET in output.data:
            return nbformat.v4.new_output("display_data", {"text/plain": SLIDERS})
        output.data.update(
            {k: strip_addresses(v) for k, v in output.data.items() if k.startswith("text/")}
        )
    return output


def normalize_notebook(nb):
    """The notebook with ids, metadata and outputs that depend on its cells alone."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell, name in zip(nb.cells, cell_ids(nb.cells)):
        cell["id"] = name
        if cell.cell_type == "code":
            cell.outputs = [normalize_output(x) for x in cell.outputs]
    return nb


class Channel(AsyncZMQSocketChannel):
    """A channel that looks again every second: now and then a socket's wake-up is lost."""

    async def get_msg(self, timeout: float | None = None):
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                return await super().get_msg(min(1.0, max(0.0, left)))
            except Empty:
                if left <= 1:
                    raise


class Client(AsyncKernelClient):
    """A kernel client with these channels."""

    shell_channel_class = Type(Channel)
    iopub_channel_class = Type(Channel)


def execute(path: Path):
    """A chapter run from top to bottom in its own folder; raises at the first failing cell."""
    nb = jupytext.read(path)
    folder = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        nb, timeout=120, resources=folder, record_timing=False, coalesce_streams=True
    )
    kernel = client.create_kernel_manager()
    kernel.client_class = f"{__name__}.Client"
    with TemporaryDirectory() as sockets:  # files: two books at once may draw the same TCP ports
        kernel.transport, kernel.ip = "ipc", f"{sockets}/kernel"
        client.execute(env={"OMP_NUM_THREADS": "1"} | os.environ | KERNEL)
    return normalize_notebook(nb)


def build(path: Path) -> bool:
    """Write a chapter's .ipynb and say how long it took; False if a cell failed."""
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
    failed = [path for path in find(names) if not build(path)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
