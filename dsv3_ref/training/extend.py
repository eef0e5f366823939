"""`dsv3 extend`: extend the context length of a trained model, in two phases (chapter 13)."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch

from dsv3_ref import long_context
from dsv3_ref.config import Config, UserError
from dsv3_ref.long_context import Needle, build_needle, extend_config, insert_needle
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import Run
from dsv3_ref.training.task import Data, PretrainTask, RowLoader


@dataclass(frozen=True)
class ExtendConfig(TrainConfig):
    """Extend the context length by YaRN and continue training on longer rows (§4.3).

    Phase 32k trains at 8 times the pre-training length, phase 128k at 32 times; the names are those
    of V3, which was pre-trained at 4K. The second phase starts from the result of the first.
    """

    phase: Literal["32k", "128k"] = "32k"
    """sequence length: 8 × (32k) or 32 × (128k) --model.original-seq-len, in tokens"""
    needles: float = 0.0
    """fraction of rows that hide a pass key and ask for it later; not part of the report"""
    val_sequences: int = 8
    """validation sequences of each source"""

    COMMAND: ClassVar[str] = "extend"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = long_context.EXTENSION_RECIPES["32k"]
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    @classmethod
    def defaults(cls, model: Config, config: str, argv: list[str]) -> "ExtendConfig":
        """Return the settings of the phase in `argv`, for a model with a longer context."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--phase", default="32k")
        phase = first.parse_known_args(argv)[0].phase
        if phase not in long_context.EXTENSION_RECIPES:
            raise UserError(f"--phase must be 32k or 128k, not {phase}")
        recipe = long_context.extension_recipe(phase, config, model.original_seq_len)
        return cls(model=extend_config(model), recipe=recipe, config=config, phase=phase)

    def validation_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of `dsv3 extend`: whether each holds, and the error if not."""
        c, length = self.model, self.recipe.seq_len
        reach = int(c.rope_factor * c.original_seq_len)
        return [
            (self.init is not None, "--init is missing: give the run or model to start from"),
            (0 <= self.needles <= 1, "--needles must be a fraction from 0 to 1"),
            (
                length <= reach,
                f"--seq-len {length} is beyond --model.rope-factor {c.rope_factor:g} × "
                f"--model.original-seq-len {c.original_seq_len} = {reach}",
            ),
            *super().validation_rules(),
        ]


class NeedleLoader:
    """Rows of another loader, a fraction of which hide a pass key and ask for it.

    The random numbers of a row are a function of the seed and the row's number.
    """

    def __init__(self, loader: RowLoader, needle: Needle, fraction: float, seed: int):
        self.loader = loader
        self.needle = needle
        self.fraction, self.seed = fraction, seed
        self.num_rows = 0  # drawn so far

    def next_batch(self, n: int) -> torch.Tensor:
        """Return the next n rows, (n, length), int64."""
        return self.next_part(n, 0, n)

    def next_part(self, n: int, begin: int, end: int) -> torch.Tensor:
        """Return rows begin … end − 1 of the next n rows, (end − begin, length), int64."""
        rows_bs = self.loader.next_part(n, begin, end)
        for i in range(len(rows_bs)):
            rng = np.random.default_rng([self.seed, 13, self.num_rows + begin + i])
            if rng.random() < self.fraction:
                rows_bs[i] = torch.tensor(insert_needle(rows_bs[i].tolist(), self.needle, rng))
        self.num_rows += n
        return rows_bs

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the present state."""
        num_rows, inner = self.num_rows, self.loader.snapshot()
        return lambda: inner() | {"num_rows": num_rows}

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state and the number of rows drawn."""
        return self.snapshot()()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.num_rows = state["num_rows"]
        self.loader.load_state_dict(state)

    def merge_states(self, states: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of all rows from those of several readers."""
        states = list(states)
        return self.loader.merge_states(states) | {"num_rows": states[0]["num_rows"]}


class ExtendTask(PretrainTask):
    """Pre-training on longer rows, validated on a few rows, one at a time."""

    config: ExtendConfig

    def build_data(self) -> Data:
        """Build the data of pre-training with fewer validation rows; --needles adds pass keys."""
        data = super().build_data()
        data.val = {name: self.first_rows(batches) for name, batches in data.val.items()}
        if self.config.needles:
            loader = cast(RowLoader, data.loader)  # of PretrainTask.build_data

            def encode(text: str) -> list[int]:
                return data.tokenizer.encode(text, add_special_tokens=False).ids

            data.loader = NeedleLoader(
                loader, build_needle(encode), self.config.needles, self.config.seed
            )
        return data

    def first_rows(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the first `val_sequences` rows as batches of one row."""
        rows: list[torch.Tensor] = []
        for batch in batches:
            rows += batch.split(1)
        return rows[: self.config.val_sequences]

    def describe_data(self, run: Run) -> str:
        """Describe the data, and the sequence length relative to pre-training."""
        ratio = self.config.recipe.seq_len / self.config.model.original_seq_len
        return f"{super().describe_data(run)}, rows {ratio:g} × as long as in pre-training"
