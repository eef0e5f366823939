"""`dsv3 align`: the study of that name, whose stages are commands run in this process."""

from dsv3_ref.cli import main
from dsv3_ref.studies.align import AlignConfig, align
from dsv3_ref.studies.stages import StageRunner


def run_align(args: AlignConfig) -> None:
    """Run every stage of the study, or those that are missing."""
    align(args, StageRunner(lambda argv: main.main(argv)))
