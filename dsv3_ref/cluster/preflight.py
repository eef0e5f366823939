"""`dsv3 preflight`: check the nodes of a job and report the unhealthy ones with a reason.

First every node is checked alone: GPUs, disk, and bandwidth within the node. Then the healthy nodes
are checked together. If that fails or is slow, each node is checked with both its neighbors in a
ring, and a node that fails with both is unhealthy. A healthy node between two unhealthy ones fails
with both, too, and is excluded with them.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from shutil import disk_usage
from typing import Literal
from xml.etree import ElementTree

from dsv3_ref.config import UserError


@dataclass(frozen=True)
class PreflightConfig:
    """Check every node of this Slurm job, or this machine, and print the healthy ones.

    Standard output has the healthy nodes as srun's --nodelist takes them, standard error a line per
    node.
    """

    folder: Path = Path("runs")
    """directory of the run, on the disk that is measured"""
    gpus: int = 0
    """GPUs that each node must have; 0: train on CPU, over gloo"""
    ranks: int = 1
    """processes per node"""
    min_nodes: int = 1
    """number of healthy nodes needed; with fewer the exit code is 2"""
    min_free_gb: float = 1.0
    """free disk space needed, in GB"""
    min_disk_mb_s: float = 10.0
    """disk throughput needed for writing and for reading 64 MB, in MB/s"""
    min_node_gb_s: float = 0.1
    """bandwidth needed within a node, in GB/s: bus bandwidth of all-reduce and all-to-all, as
    nccl-tests define it"""
    min_net_gb_s: float = 0.05
    """bandwidth needed between nodes, in GB/s, measured in the same way"""
    max_skew_s: float = 1.0
    """largest difference of a clock from the median, in seconds"""
    message_mb: int = 64
    """size of the message of a rank in each collective, in MB"""
    timeout_s: int = 120
    """seconds that a stage may take on a node"""
    stage: Literal["all", "node", "net"] = "all"
    """all: run all stages; node: check this node alone; net: take part in the check of the nodes of
    this Slurm step"""
    rendezvous: str = ""
    """address of the first node in stage net, as tcp://host:port"""


class NodeUnhealthy(Exception):
    """The error for a node that must not train; its message is the reason."""


# ── A node alone ──

SMI_COMMAND = ["nvidia-smi", "-q", "-x"]
RECOVERY_ACTION = re.compile(r"gpu_recovery_action (?!None|N/A)")  # Reset, Reboot … after an XID
FAULT_FLAG = re.compile(r"(pending_\w+|\w+_pending|\w+_failure|sram_threshold_exceeded) Yes")
UNCORRECTABLE_ERROR = re.compile(r"\w*uncorr\w* [1-9]")  # memory errors since the driver was loaded


def gpu_faults(xml: str) -> list[str]:
    """Return the faults of GPUs as `GPU 0: remapped_row_failure Yes`.

    xml: the output of `nvidia-smi -q -x`. A pending reset or reboot counts as a fault.
    """
    faults = []
    for i, gpu in enumerate(ElementTree.fromstring(xml).iter("gpu")):
        for text in map(element_text, gpu.iter()):
            if RECOVERY_ACTION.match(text) or FAULT_FLAG.match(text):
                faults.append(f"GPU {i}: {text}")
        for text in map(element_text, gpu.iterfind("ecc_errors/volatile/*")):
            if UNCORRECTABLE_ERROR.match(text):
                faults.append(f"GPU {i}: {text}")
    return faults


def element_text(element: ElementTree.Element) -> str:
    """Return an XML element as `tag text`."""
    return f"{element.tag} {(element.text or '').strip()}"


def check_gpus(args: PreflightConfig) -> str:
    """Check that torch can be imported and, with GPUs, that none is damaged or missing."""
    if args.gpus:
        try:
            smi = subprocess.run(
                SMI_COMMAND, capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError) as e:
            raise NodeUnhealthy(f"nvidia-smi failed: {e}") from None
        if faults := gpu_faults(smi.stdout):
            raise NodeUnhealthy("; ".join(faults))
    import torch

    num_gpus = torch.cuda.device_count() if args.gpus else 0
    if num_gpus != args.gpus:
        raise NodeUnhealthy(f"torch sees {num_gpus} GPUs, not {args.gpus}")
    return f"{args.gpus} GPUs"


def check_disk(args: PreflightConfig) -> str:
    """Check the free space and the speed of the disk that holds the run's folder."""
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        if (free := disk_usage(args.folder).free / 1e9) < args.min_free_gb:
            raise NodeUnhealthy(f"{args.folder} has {free:.1f} GB free, below {args.min_free_gb:g}")
        speed = min(measure_disk(args.folder))
    except OSError as e:
        raise NodeUnhealthy(f"disk: {e}") from None
    if speed < args.min_disk_mb_s:
        raise NodeUnhealthy(
            f"disk of {args.folder}: {speed:.0f} MB/s, below {args.min_disk_mb_s:g}"
        )
    return f"{free:.0f} GB free, {speed:.0f} MB/s"


def measure_disk(folder: Path, mb: int = 64) -> tuple[float, float]:
    """Return the MB/s of writing through to the disk, and of reading past the page cache."""
    data = os.urandom(mb << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write_end = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        if file.read() != data:
            raise NodeUnhealthy(f"the disk of {folder} returned other bytes than were written")
        return mb / (write_end - start), mb / (time.perf_counter() - write_end)


# ── Bandwidth ──


def check_network(
    args: PreflightConfig, nodes: int, node: int, rendezvous: str, floor: float
) -> str:
    """Run an all-reduce and an all-to-all of all ranks, with this node's ranks among them.

    floor: the GB/s that both must reach.
    """
    world, first = nodes * args.ranks, node * args.ranks
    if world == 1:
        return "one rank"
    calls = [
        (first + i, world, rendezvous, i if args.gpus else None, args) for i in range(args.ranks)
    ]
    with get_context("spawn").Pool(args.ranks) as pool:  # leaving the block kills hanging ranks
        try:
            results = pool.starmap_async(measure_collectives, calls, chunksize=1).get(
                args.timeout_s
            )
        except TimeoutError:
            raise NodeUnhealthy(
                f"all-reduce and all-to-all hang: not finished after {args.timeout_s} s"
            ) from None
        except (RuntimeError, ValueError) as e:
            raise NodeUnhealthy(
                f"all-reduce and all-to-all fail: {str(e).splitlines()[0]}"
            ) from None
    reduce, exchange, _ = map(min, zip(*results))
    for name, speed in (("all-reduce", reduce), ("all-to-all", exchange)):
        if speed < floor:
            raise NodeUnhealthy(f"{name} at {speed:.2g} GB/s, below {floor:g}")
    if (skew := results[0][-1]) > args.max_skew_s:
        raise NodeUnhealthy(f"its clock is off by {skew:.1f} s")
    return f"all-reduce {reduce:.2g} GB/s, all-to-all {exchange:.2g} GB/s"


def measure_collectives(
    rank: int, world: int, rendezvous: str, gpu: int | None, args: PreflightConfig
) -> tuple[float, float, float]:
    """Return the GB/s of all-reduce and all-to-all, and by how many seconds this clock is off."""
    import torch
    import torch.distributed as dist

    device, backend = ("cpu", "gloo") if gpu is None else (f"cuda:{gpu}", "nccl")
    wait = timedelta(seconds=args.timeout_s)
    dist.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=world, timeout=wait
    )
    x_n = torch.ones(args.message_mb * 2**18 // world * world, device=device)
    out_n, share = torch.empty_like(x_n), x_n.nbytes * (world - 1) / world / 1e9
    reduce = fastest_call(lambda: dist.all_reduce(x_n, dist.ReduceOp.MAX), device)
    exchange = fastest_call(lambda: dist.all_to_all_single(out_n, x_n), device)
    clocks_r = torch.zeros(world, dtype=torch.float64, device=device)
    clocks_r[rank] = time.time()
    dist.all_reduce(clocks_r)
    dist.destroy_process_group()
    return 2 * share / reduce, share / exchange, abs((clocks_r - clocks_r.median())[rank].item())


def fastest_call(collective: Callable, device: str, times: int = 5) -> float:
    """Return the seconds of the fastest call; the first calls also set up connections."""
    import torch

    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        collective()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def check_this_node(args: PreflightConfig) -> str:
    """Return `healthy: …` with the measurements, or `unhealthy: …` with the reason."""
    try:
        if args.stage == "net":
            nodes, node = (int(os.environ[f"SLURM_{x}"]) for x in ("STEP_NUM_NODES", "PROCID"))
            return (
                f"healthy: {check_network(args, nodes, node, args.rendezvous, args.min_net_gb_s)}"
            )
        with tempfile.TemporaryDirectory() as folder:
            rendezvous, floor = f"file://{folder}/meet", args.min_node_gb_s
            results = [
                check_gpus(args),
                check_disk(args),
                check_network(args, 1, 0, rendezvous, floor),
            ]
        return f"healthy: {', '.join(results)}"
    except NodeUnhealthy as e:
        return f"unhealthy: {e}"


# ── All nodes ──

PreflightStage = Literal["node", "net"]
Reports = dict[str, str]  # node → its report, `healthy: …` or `unhealthy: …`
RunStage = Callable[[PreflightStage, list[str]], Reports]  # runs a stage on nodes


def healthy_nodes(reports: Reports) -> list[str]:
    """Return the nodes that are reported as healthy."""
    return [node for node, report in reports.items() if report.startswith("healthy: ")]


def check_nodes(nodes: list[str], run: RunStage) -> Reports:
    """Check every node alone, then the healthy ones together; if that fails, pair by pair."""
    reports = run("node", nodes)
    healthy = healthy_nodes(reports)
    if len(healthy) < 2:
        return reports
    together = run("net", healthy)
    if healthy_nodes(together) == healthy:
        for node in healthy:
            reports[node] += f"; between nodes {together[node].removeprefix('healthy: ')}"
        return reports
    if unhealthy := find_bad_nodes(healthy, run):
        return reports | unhealthy
    reason = next(report for report in together.values() if not report.startswith("healthy: "))
    raise UserError(
        f"every pair of neighbors passes, but not all {len(healthy)} nodes together ({reason}): "
        "check the network between them"
    )


def find_bad_nodes(nodes: list[str], run: RunStage) -> Reports:
    """Return the nodes that fail with both their neighbors in a ring, with their reports.

    Pairs that run at the same time share no node.
    """
    n, even = len(nodes), len(nodes) // 2 * 2
    ring = [[nodes[k] for k in sorted((i, (i + 1) % n))] for i in range(n)]
    failed = defaultdict(list)
    for pairs in filter(None, (ring[:even:2], ring[1:even:2], ring[even:])):
        with ThreadPoolExecutor(len(pairs)) as pool:
            for pair, reports in zip(pairs, pool.map(partial(run, "net"), pairs)):
                for node in set(pair) - set(healthy_nodes(reports)):
                    neighbor = " and ".join(set(pair) - {node})
                    failed[node].append(f"{reports[node]} (with {neighbor})")
    return {node: reports[0] for node, reports in failed.items() if len(reports) == 2}


def scontrol(*args: str) -> str:
    """Return the output of `scontrol show` with these arguments."""
    return subprocess.run(["scontrol", "show", *args], capture_output=True, text=True).stdout


PORTS = count(int(os.environ.get("SLURM_JOB_ID", 0)))


def run_stage(args: PreflightConfig, stage: PreflightStage, nodes: list[str]) -> Reports:
    """Run a stage on these nodes, one task of a Slurm step on each."""
    n = len(nodes)
    address = re.search(r"NodeAddr=(\S+)", scontrol("node", nodes[0]))
    if address is None:
        raise UserError(
            f"scontrol reports no address of node {nodes[0]}: check `scontrol show node {nodes[0]}`"
        )
    rendezvous = f"tcp://{address[1]}:{10000 + next(PORTS) % 10000}"
    options = asdict(replace(args, stage=stage, rendezvous=rendezvous)).items()
    command = f"timeout {args.timeout_s + 60} srun --label --overlap --cpu-bind=none".split()
    command += f"--kill-on-bad-exit=0 --nodes={n} --ntasks={n} --ntasks-per-node=1".split()
    command += [f"--nodelist={','.join(nodes)}", sys.executable, "-m", "dsv3_ref"]
    command += ["preflight", *(f"--{k.replace('_', '-')}={v}" for k, v in options)]
    step = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return parse_reports(step.stdout.splitlines(), nodes)


def parse_reports(lines: list[str], nodes: list[str]) -> Reports:
    """Return each node's report from the lines of `srun --label`.

    A node without a report gets the last line of its task, which is its error, or of srun.
    """
    last: dict[int, str] = {}
    for match in filter(None, (re.match(r" *(\d+): (.+)", line) for line in lines)):
        task = int(match[1])
        if not last.get(task, "").startswith(("healthy: ", "unhealthy: ")):
            last[task] = match[2]  # lines after a report are warnings of libraries
    missing = f"no report ({lines[-1] if lines else 'timed out'})"
    return {node: last.get(k, missing) for k, node in enumerate(nodes)}  # tasks are in this order


def run_preflight(args: PreflightConfig) -> None:
    """Print a line per node to stderr, and to stdout the healthy nodes as srun's --nodelist."""
    if args.stage != "all":
        print(check_this_node(args))
        return
    if node_list := os.environ.get("SLURM_JOB_NODELIST"):
        nodes = scontrol("hostnames", node_list).split()
        reports = check_nodes(nodes, partial(run_stage, args))
    else:
        reports = {socket.gethostname(): check_this_node(args)}
    for node, report in reports.items():
        print(f"{node}  {report}", file=sys.stderr)
    healthy = healthy_nodes(reports)
    print(",".join(healthy), flush=True)
    if len(healthy) < args.min_nodes:
        raise UserError(
            f"{len(healthy)} of {len(reports)} nodes are healthy, but --min-nodes is "
            f"{args.min_nodes}: allocate more nodes or lower it"
        )
