"""Write .github/requirements.txt: every dependency's exact version with the hashes of its files.

    pip install uv
    python tools/lock.py

Only .github/workflows/test.yml installs from it. torch, triton and the CUDA libraries that torch
brings are left out: the Makefile installs those that suit the machine.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / ".github/requirements.txt"
HEADER = "# Written by tools/lock.py; used by .github/workflows/test.yml only.\n"
NOT_LOCKED = re.compile(r"(?:torch|triton|nvidia-[\w-]+|cuda-[\w-]+)")


def split_pins(text: str) -> dict[str, str]:
    """Split a requirements file into its entries: name and marker → lines with the hashes."""
    entries = re.split(r"\n(?=\S)", text.strip())
    pins = (entry for entry in entries if not entry.startswith("#"))
    return {pin.partition("\\")[0].strip(): pin for pin in pins}


def resolve(root: Path) -> str:
    """Return the requirements of the package, its extras and its build as uv resolves them."""
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["build-system"][
        "requires"
    ]
    options = ["--all-extras", "--universal", "--python-version", "3.11", "--generate-hashes"]
    options += ["--no-header", "--no-annotate", "--no-config", "--quiet"]
    command = ["uv", "pip", "compile", *options, "pyproject.toml", "-"]
    text = "\n".join(build)
    done = subprocess.run(command, cwd=root, input=text, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    """Resolve the dependencies and write the lock file."""
    if shutil.which("uv") is None:
        sys.exit("uv is needed to resolve the dependencies: pip install uv")
    pins = split_pins(resolve(ROOT))
    locked = [pin for name, pin in pins.items() if not NOT_LOCKED.fullmatch(name.split("==")[0])]
    LOCK.write_text(HEADER + "\n".join(locked) + "\n", encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(locked)} packages")


if __name__ == "__main__":
    main()
