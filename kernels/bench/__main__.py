"""Run the benchmark of the kernels: `python -m dsv3_ref.kernels.bench --help`."""

import sys

from dsv3_ref.kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
