"""Run a module as on a machine that has nothing but a few packages: the others cannot be imported.

    python tools/bare.py -m dsv3_ref.kernels.bench --dry-run

The packages of PRESENT and what these require may be imported, and this repository. Child processes
are bound too, through sitecustomize in PYTHONPATH.
"""

import os
import re
import sys
import tempfile
from importlib.metadata import (
    PackageNotFoundError,
    distributions,
    packages_distributions,
    requires,
)
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRESENT = (
    "torch", "triton", "einops", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis",
    "safetensors", "transformers",
)  # fmt: skip
HOOK = """
import sys

class WithoutAbsent:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        for found in getattr(self.finder, "find_distributions", lambda *_: ())(*context):
            if found.metadata["Name"] in PRESENT:
                yield found

    def __getattr__(self, name):
        return getattr(self.finder, name)

ABSENT = frozenset(ABSENT_MODULES)
PRESENT = frozenset(PRESENT_DISTRIBUTIONS)
sys.meta_path[:] = map(WithoutAbsent, sys.meta_path)
"""


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: tuple[str, ...]) -> set[str]:
    """Return these distributions and all that they require."""
    names_and_requirements: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normalized(waiting.pop())
        if name in names_and_requirements:
            continue
        names_and_requirements.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", x)[0] for x in needed if "extra ==" not in x]  # type: ignore[index]
    return names_and_requirements


def installed() -> set[str]:
    """Return the names of all distributions that are installed here, as they spell them."""
    return {owner.metadata["Name"] for owner in distributions()}


def absent_modules(present: set[str]) -> set[str]:
    """Return the top-level modules that are installed here and belong to no present package."""
    return {
        module
        for module, owners in packages_distributions().items()
        if not present & set(map(normalized, owners))
    } - {"dsv3_ref", "pip", "setuptools", "pkg_resources", "_distutils_hack"}


def main(argv: list[str]) -> None:
    """Replace this process by Python with these arguments and the hook."""
    folder = Path(tempfile.mkdtemp(prefix="bare-"))
    present = closure(PRESENT)
    hook = HOOK.replace("ABSENT_MODULES", repr(sorted(absent_modules(present))))
    names = sorted(owner for owner in installed() if normalized(owner) in present)
    hook = hook.replace("PRESENT_DISTRIBUTIONS", repr(names))
    (folder / "sitecustomize.py").write_text(hook, encoding="utf-8")
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, *argv], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
