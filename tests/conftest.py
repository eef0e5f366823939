"""Settings of all tests: a single thread, fixed seeds, no display, short unless `--full`."""

import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import register_random, settings

ROOT = Path(__file__).resolve().parent.parent
# With several workers (pytest -n 2) these files start first, so that no long one comes last.
LONGEST = [
    "viz/test_browser.py", "tools/test_notebooks.py", "parallel/test_resident_weights.py",
    "parallel/test_cluster.py", "studies/test_align.py", "serving/test_serve.py",
    "parallel/test_parallel.py", "kernels/test_aot.py", "training/test_train.py",
    "serving/test_limits.py", "viz/test_live.py", "parallel/test_sharded.py",
    "parallel/test_fully_sharded.py", "parallel/test_fixed_sizes.py", "parallel/test_deepep.py",
    "parallel/test_replicas.py", "kernels/test_kernels_model.py", "verifiers/test_sandbox.py",
    "evaluation/test_evaluate.py", "tools/test_contracts.py", "tools/test_house.py",
]  # fmt: skip
# Cases of these files may go to different workers; the tests of any other file share fixtures.
DIVISIBLE = re.compile(
    r"tests/(?:kernels/test_aot\.py::test_every_kernel|tools/test_notebooks\.py::)"
)
sys.path.insert(0, str(ROOT / "tools"))  # tools/ is not a package: tests import it by file name
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # 3 s of jsonschema, for URIs only

import torch  # noqa: E402  after the threads are set

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: kernels run on the CPU


class TorchRandom:
    """Adapter by which hypothesis seeds torch before each example, so that failures repeat."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it weakly
register_random(TORCH_RANDOM)

settings.register_profile("short", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny config and texts, which keeps the caches of a module's tests."""
    import miniruns  # only now: environment variables are set first

    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        yield folder


@pytest.fixture(scope="module")
def gang():
    """Processes that run functions as ranks, call after call, for the tests of a module."""
    from gang import Gang  # only now: environment variables are set first

    processes = Gang()
    yield processes
    processes.stop()


@pytest.fixture
def without_reports(monkeypatch):
    """Write a stub in the place of a run's report, whose figures take longer than the run."""
    import miniruns

    monkeypatch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run tests marked `full`")


def pytest_configure(config):
    settings.load_profile("full" if is_full(config) else "short")


def is_full(config) -> bool:
    return config.getoption("--full") or os.environ.get("DSV3_FULL") == "1"


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a worker of xdist
        items.sort(key=lambda item: start_order(item.nodeid))
    if is_full(config):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


# ── Several workers ──


def work_unit(nodeid: str) -> str:
    """Return the unit that one worker gets: a file, or the tests of one chapter or kernel file."""
    case = re.search(r"\[(\w+)", nodeid) if DIVISIBLE.match(nodeid) else None
    return f"{nodeid.split('::')[0]}::{case[1]}" if case else nodeid.split("::")[0]


def start_order(nodeid: str) -> int:
    """Return the place of a test's file in LONGEST, or its length."""
    file = nodeid.split("::")[0].removeprefix("tests/")
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return work_unit(nodeid)

    config.option.loadscopereorder = False
    return ByUnit(config, log)


# ── Fixtures ──


@pytest.fixture(autouse=True)
def seeded():
    """Seed random and torch, so that a test does not depend on those before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def micro():
    """Return a config of 15 thousand parameters with every mechanism on, no two sizes alike."""
    from dsv3_ref.config import V3

    return replace(
        V3, vocab_size=61, dim=24, inter_dim=40, moe_inter_dim=8, n_layers=3, n_dense_layers=1,
        n_heads=3, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=6, n_routed_experts=16, n_activated_experts=3, n_expert_groups=4,
        n_limited_groups=2, n_mtp_layers=2, max_seq_len=64, original_seq_len=16, rope_factor=4.0,
        init_std=0.2, embed_std=0.3,
    )  # fmt: skip


@pytest.fixture
def exact(monkeypatch):
    """Run the equations in fp64: `.float()` leaves doubles alone, and ops take their plain form.

    The code converts to fp32 where bf16 would be too coarse; here fp32 is the coarser type. The
    tuned grouped product has no fp64.
    """
    from dsv3_ref import ops

    to_float = torch.Tensor.float

    def to_at_least_float(x):
        return x if x.dtype == torch.float64 else to_float(x)

    monkeypatch.setattr(torch.Tensor, "float", to_at_least_float)
    with ops.use("torch"):
        yield
