"""Check that the tests can fail: change one operator, comparison or number, and run them.

    python tools/mutation.py                          every module of MODULES, a sample of each
    python tools/mutation.py dsv3_ref/optim.py        these files; --sample 0 takes every mutant
    python tools/mutation.py --survivors build/mutants.json   run the survivors of a report again

cosmic-ray makes the mutants. Each is written into a copy of the checkout and its tests run in a
forked process that has already imported torch, so a mutant costs its tests and no more. A mutant
that no test can tell from the original is listed in tests/equivalent_mutants.json with the reason.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.json"
COPIED = (
    "dsv3_ref", "kernels", "tests", "tools", "notebooks", "slurm", "docs", "README.md",
    "pyproject.toml",
)  # fmt: skip
FOLDERS = ("parallel", "posttraining", "serving", "data")  # besides the generated modules
SLOWEST = 300.0  # seconds that the tests of one mutant may take
FORK = get_context("forkserver")
EXTRA_TESTS = {  # of modules whose tests have another name
    "dsv3_ref/block.py": ["test_model", "test_mtp"],
    "dsv3_ref/grpo.py": ["test_rl"],
    "dsv3_ref/mla.py": ["test_ops"],
    "dsv3_ref/rope.py": ["test_ops", "test_mla"],
    "dsv3_ref/data/files.py": ["test_data"],
    "dsv3_ref/parallel/launch.py": ["test_cluster"],
    "dsv3_ref/parallel/mesh_parallel.py": ["test_cluster"],
    "dsv3_ref/parallel/pipeline.py": ["test_parallel"],
    "dsv3_ref/posttraining/grpo.py": ["test_rl", "test_tasks"],
    "dsv3_ref/parallel/stage.py": ["test_parallel"],
    "dsv3_ref/parallel/zero.py": ["test_parallel"],
    "dsv3_ref/serving/protocol.py": ["test_serve"],
    "dsv3_ref/serving/conversation.py": ["test_clients"],
    "dsv3_ref/serving/service.py": ["test_clients", "test_serve"],
    "dsv3_ref/data/discovery.py": ["test_data_files"],
    "dsv3_ref/data/formats.py": ["test_data_files"],
    "dsv3_ref/data/hub.py": ["test_hub_data"],
    "dsv3_ref/data/jinja_template.py": ["test_chat_templates"],
    "dsv3_ref/data/messages.py": ["test_conversation_rows"],
    "dsv3_ref/data/text_cache.py": ["test_data_files"],
    "dsv3_ref/data/permutation.py": ["test_data", "test_prepare"],
    "dsv3_ref/data/tokenize_workers.py": ["test_prepare"],
    "dsv3_ref/optim.py": ["test_pretrain"],
    "dsv3_ref/inference_scale.py": ["test_scale"],
    "dsv3_ref/scale.py": ["test_plan"],
    "dsv3_ref/serve.py": ["test_serve"],
    "dsv3_ref/sft.py": ["test_sft_task", "test_conversations"],
    "dsv3_ref/posttraining/sft.py": ["test_sft_task"],
}

OPERATORS = [
    f"core/{name}"
    for name in (
        "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add",
        "ReplaceBinaryOperator_Mul_Add", "ReplaceBinaryOperator_Mul_FloorDiv",
        "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul",
        "ReplaceBinaryOperator_Mod_Add", "ReplaceBinaryOperator_Pow_Mul",
        "ReplaceBinaryOperator_LShift_RShift", "ReplaceBinaryOperator_RShift_LShift",
        "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq",
        "ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_Gt",
        "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_Gt_GtE",
        "ReplaceComparisonOperator_Gt_Lt", "ReplaceComparisonOperator_GtE_Gt",
        "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is",
        "NumberReplacer", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
        "ReplaceAndWithOr", "ReplaceOrWithAnd",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str


# ── Mutants ──


def mutate(code: str, operator: str, occurrence: int) -> str | None:
    """Return the code with one change, or None if the operator has no such place."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return mutate_code(code, plugins.get_operator(operator)(), occurrence)


def places_of(code: str) -> list[tuple[str, int]]:
    """Return (operator, occurrence) of every change that the operators can make."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import get_ast

    tree, places = get_ast(code), []
    for name in OPERATORS:
        operator = plugins.get_operator(name)()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes(tree))
        places += [(name, i) for i in range(count)]
    return places


def nodes(node: Any) -> Iterator[Any]:
    """Yield a syntax tree's nodes in the order in which cosmic-ray visits them."""
    yield node
    for child in getattr(node, "children", ()):
        yield from nodes(child)


def describe(path: str, operator: str, occurrence: int, code: str, changed: str) -> Mutant:
    """Return the mutant with the first line that differs."""
    before, after = code.splitlines(), changed.splitlines()
    line = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
    return Mutant(path, operator, occurrence, line + 1, before[line].strip(), after[line].strip())


def draw(path: str, size: int, seed: int) -> list[Mutant]:
    """Return a random sample of a file's mutants in the order of their lines; size 0: all."""
    code = (ROOT / path).read_text(encoding="utf-8")
    places = places_of(code)
    if size and len(places) > size:
        places = random.Random(f"{seed} {path}").sample(places, size)
    mutants = [describe(path, *place, code, mutate(code, *place)) for place in places]
    return sorted(mutants, key=lambda m: (m.line, m.operator, m.occurrence))


# ── Tests ──


def tests_of(path: str) -> list[str]:
    """Return a module's test files: those named after it, else those beside it that import it."""
    stem, folder = Path(path).stem, Path(path).parent.name
    places = sorted((ROOT / "tests").rglob("test_*.py"))
    home = "tests" if folder == "dsv3_ref" else folder
    tests = [p for p in places if p.stem == f"test_{stem}" and p.parent.name == home]
    tests += [p for p in places if p.stem in EXTRA_TESTS.get(path, ())]
    words = (f"{folder}.{stem} import", f"{folder} import {stem}")
    for files in ([p for p in places if p.parent.name == folder], places):
        tests = tests or [
            p for p in files if any(word in p.read_text(encoding="utf-8") for word in words)
        ]
    return [str(p.relative_to(ROOT)) for p in tests]


def test_in_copy(folder: str, tests: list[str]) -> None:
    """Run tests on the copy in `folder` in this forked process; exit with pytest's code."""
    import pytest

    os.setsid()  # what the tests start ends with them
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(folder)
    sys.path[:0] = [folder, f"{folder}/tests"]
    os.environ["PYTHONPATH"] = f"{folder}:{folder}/tests"
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]))


class Copy:
    """A copy of the checkout in which one mutant at a time is tested."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("*.ipynb", "__pycache__")
                shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
            else:
                shutil.copy(source, folder / name)
        kernels = folder / "dsv3_ref" / "kernels"
        if not kernels.is_symlink():
            kernels.symlink_to("../kernels")

    def run(self, path: str, code: str, tests: list[str], limit: float) -> tuple[str, float]:
        """Return ("killed", "survived" or "timeout", seconds) for a file with this text."""
        file, start = self.folder / path, time.perf_counter()
        original = file.read_text(encoding="utf-8")
        file.write_text(code, encoding="utf-8")
        try:
            outcome = self.outcome(tests, limit)
        finally:
            file.write_text(original, encoding="utf-8")
        return outcome, time.perf_counter() - start

    def outcome(self, tests: list[str], limit: float) -> str:
        """Return how the tests end on the copy as it is now."""
        process = FORK.Process(target=test_in_copy, args=(str(self.folder), tests))
        process.start()
        process.join(limit)
        timed_out = process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if timed_out:
            return "timeout"
        return "survived" if process.exitcode == 0 else "killed"


# ── The report ──


def known_equivalents() -> dict[tuple[str, str, str], str]:
    """Return (path, before, after) → why no test can see the change."""
    if not EQUIVALENT.exists():
        return {}
    rows = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {(r["path"], r["before"], r["after"]): r["reason"] for r in rows}


def check(copies: Queue, mutants: list[Mutant]) -> list[dict]:
    """Test the mutants of one file; raise SystemExit if its tests fail without a mutant."""
    path = mutants[0].path
    tests, code = tests_of(path), (ROOT / path).read_text(encoding="utf-8")
    copy = copies.get()
    try:
        outcome, seconds = copy.run(path, code, tests, SLOWEST)
        if not tests or outcome != "survived":
            sys.exit(f"{path}: its tests ({' '.join(tests) or 'none'}) fail without a mutant")
        rows, limit = [], min(SLOWEST, 60 + 6 * seconds)
        for mutant in mutants:
            changed = mutate(code, mutant.operator, mutant.occurrence)
            outcome, seconds = copy.run(path, changed, tests, limit)
            rows.append(asdict(mutant) | {"outcome": outcome, "seconds": round(seconds, 1)})
    finally:
        copies.put(copy)
    survivors = sum(r["outcome"] == "survived" for r in rows)
    print(f"{path:44}{len(rows):4} mutants {survivors:4} survived", flush=True)
    return rows


def summarize(rows: list[dict]) -> tuple[str, float]:
    """Return the survivors with the totals, and the share killed; equivalents do not count."""
    reasons, lines = known_equivalents(), []
    for row in rows:
        row["equivalent"] = reasons.get((row["path"], row["before"], row["after"]))
        if row["outcome"] == "survived" and not row["equivalent"]:
            lines += [f"{row['path']}:{row['line']}", f"  - {row['before']}", f"  + {row['after']}"]
    counted = [r for r in rows if not r["equivalent"]]
    killed = sum(r["outcome"] != "survived" for r in counted)
    share = killed / max(1, len(counted))
    same = len(rows) - len(counted)
    lines.append(
        f"{len(rows)} mutants, {same} equivalent, {killed} of {len(counted)} killed: {share:.1%}"
    )
    return "\n".join(lines), share


def default_modules() -> list[str]:
    """Return the generated modules and the packages that the report's results rest on."""
    paths = sorted(p for p in (ROOT / "dsv3_ref").glob("*.py") if p.name[0] != "_")
    for name in FOLDERS:
        paths += sorted((ROOT / "dsv3_ref" / name).glob("[a-z]*.py"))
    return [str(p.relative_to(ROOT)) for p in paths]


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="files to mutate; default: all of the core")
    parser.add_argument(
        "--sample", type=int, default=12, help="mutants per file, 0: all (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sample (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="tests at a time (%(default)s)")
    parser.add_argument("--survivors", type=Path, help="a report whose survivors are tested again")
    parser.add_argument("--out", type=Path, default=Path("build/mutants.json"), help="report")
    return parser.parse_args(argv)


def sampled(args: argparse.Namespace) -> list[list[Mutant]]:
    """Return a sample of the mutants of each file that was asked for."""
    return [draw(path, args.sample, args.seed) for path in args.paths or default_modules()]


def surviving(report: Path) -> list[list[Mutant]]:
    """Return the survivors of an earlier report, by file."""
    fields, groups = Mutant.__dataclass_fields__, {}
    for row in json.loads(report.read_text(encoding="utf-8")):
        if row["outcome"] == "survived":
            groups.setdefault(row["path"], []).append(Mutant(**{k: row[k] for k in fields}))
    return list(groups.values())


def main(argv: list[str]) -> int:
    """Write the report; the exit code is 1 below 90 % killed."""
    args = parse(argv)
    groups = surviving(args.survivors) if args.survivors else sampled(args)
    rows: list[dict] = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        copies: Queue = Queue()
        for i in range(args.workers):
            copies.put(Copy(Path(folder) / str(i)))
        for part in pool.map(lambda group: check(copies, group), filter(None, groups)):
            rows += part
    text, share = summarize(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(text)
    return int(share < 0.9)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    FORK.set_forkserver_preload(["pytest", "hypothesis", "torch", "numpy", "datasets"])
    sys.exit(main(sys.argv[1:]))
