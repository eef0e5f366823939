"""Runs of several epochs that are interrupted: every row is seen as often as without."""

import json

import miniruns
import pytest
from miniruns import metrics, options, results

from dsv3_ref.cli.main import main
from dsv3_ref.training import loop


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model to fine-tune, and eight conversations, of which each fills a row."""
    with miniruns.home(tmp_path_factory.mktemp("home")) as folder:
        patch = pytest.MonkeyPatch()
        patch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
        assert main(options(folder, folder / "base", "--steps", "2")) == 0
        talks = [
            {"messages": [
                {"role": "user", "content": f"number {i}?"},
                {"role": "assistant", "content": " ".join(["three two one"] * 4)},
            ]}
            for i in range(9)
        ]  # fmt: skip
        (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
        yield folder
        patch.undo()


def sft(home, out) -> int:
    argv = ["sft", "--init", home / "base", "--data", home / "talks.jsonl", "--out", out]
    argv += "--seq-len 63 --global-batch-size 2 --start-batch-size 2 --warmup-steps 1".split()
    argv += "--epochs 3 --save-every 1 --lr 1e-3".split()
    return main([str(x) for x in argv])


@pytest.mark.parametrize(
    "stops", [(2, 8), pytest.param((4, 5, 7, 11), marks=pytest.mark.full)], ids=str
)  # inside epochs and at their ends
def test_an_interruption_anywhere_repeats_and_skips_nothing(stops, home, tmp_path, monkeypatch):
    """verl-project/verl #7401: the epoch after a boundary was skipped; huggingface/accelerate
    #2016: in the second epoch, the order was that of the first; karpathy/nanoGPT #467 and
    paiml/entrenar #294: the same batches came again."""
    assert sft(home, tmp_path / "whole") == 0
    steps = len(metrics(tmp_path / "whole"))
    assert steps > max(stops)
    real = loop.take_step

    for stop in stops:

        def stopping(run, stop=stop):
            if run.state.step == stop:
                raise KeyboardInterrupt
            return real(run)

        out = tmp_path / f"run{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", stopping)
            assert sft(home, out) == 130
        assert main(["sft", "--resume", "--out", str(out)]) == 0
        losses = [row["loss"] for row in metrics(out)]
        assert losses == [row["loss"] for row in metrics(tmp_path / "whole")]
        assert results(out) == results(tmp_path / "whole")
