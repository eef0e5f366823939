"""Entry point of `python -m dsv3_ref COMMAND`, which is `dsv3 COMMAND` for torchrun and srun."""

from dsv3_ref.cli.main import main

if __name__ == "__main__":
    main()
