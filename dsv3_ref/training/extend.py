"""`dsv3 extend`: a trained model learns to read longer texts, in two phases (chapter 13)."""

import argparse
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from dsv3_ref import long_context
from dsv3_ref.config import Config, UserError
from dsv3_ref.data.loader import PackedDataLoader
from dsv3_ref.long_context import Needle, build_needle, extend_config, insert_needle
from dsv3_ref.optim import TrainingRecipe
from dsv3_ref.training.loop import Trainer
from dsv3_ref.training.settings import TrainConfig


@dataclass(frozen=True)
class ExtendConfig(TrainConfig):
    """Stretch a trained model by YaRN and go on training it on longer rows (§4.3).

    Phase 32k reads 8 times the length of pre-training, phase 128k another 4 times that; the names
    are those of V3, which was pre-trained at 4K. The second phase starts from the first.
    """

    phase: Literal["32k", "128k"] = "32k"
    """how far: 8 or 32 times --model.original-seq-len"""
    needles: float = 0.0
    """share of rows that hide a pass key and ask for it later; the report says nothing of these"""
    val_sequences: int = 8
    """validation rows of each source"""

    COMMAND: ClassVar[str] = "extend"
    RECIPES: ClassVar[dict[str, TrainingRecipe]] = long_context.RECIPES["32k"]
    DEFAULT_RECIPE: ClassVar[str] = "v3"

    @classmethod
    def defaults(cls, model: Config, config: str, argv: list[str]):
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--phase")
        phase = first.parse_known_args(argv)[0].phase or "32k"
        if phase not in long_context.RECIPES:
            raise UserError(f"--phase is 32k or 128k, not {phase}")
        recipe = long_context.extension_recipe(phase, config, model.original_seq_len)
        return cls(model=extend_config(model), recipe=recipe, config=config, phase=phase)

    def validation_rules(self) -> list[tuple[bool, str]]:
        c, length = self.model, self.recipe.seq_len
        reach = int(c.rope_factor * c.original_seq_len)
        return [
            (self.init is not None, "--init is missing: the run or model to start from"),
            (0 <= self.needles <= 1, "--needles is a share from 0 to 1"),
            (
                length <= reach,
                f"--seq-len {length} is beyond --model.rope-factor {c.rope_factor:g} × "
                f"--model.original-seq-len {c.original_seq_len} = {reach}",
            ),
            *super().validation_rules(),
        ]


class Planted:
    """Rows, a share of which hide a pass key in their text and ask for it."""

    def __init__(self, rows: PackedDataLoader, n: Needle, share: float, seed: int):
        self.rows, self.needle, self.share = rows, n, share
        self.rng = np.random.default_rng([seed, 13])

    def next_batch(self, n: int) -> torch.Tensor:
        """n rows, (n, length), int64."""
        chosen = self.rng.random(n) < self.share
        rows = self.rows.next_batch(n).tolist()
        return torch.tensor(
            [
                insert_needle(row, self.needle, self.rng) if on else row
                for row, on in zip(rows, chosen)
            ]
        )

    def state_dict(self) -> tuple[dict, dict]:
        """Where the stream stands."""
        small, tensors = self.rows.state_dict()
        return small | {"needles": self.rng.bit_generator.state}, tensors

    def load_state_dict(self, small: dict, tensors: dict) -> None:
        """Go on exactly where `state` was taken."""
        self.rng.bit_generator.state = small["needles"]
        self.rows.load_state_dict(small, tensors)


class ExtendTrainer(Trainer):
    """A run on long rows: validated on few, one at a time."""

    args: ExtendConfig

    def open_data(self) -> None:
        super().open_data()
        cut = lambda batches: [row[None] for rows in batches for row in rows][
            : self.args.val_sequences
        ]
        self.val = {name: cut(batches) for name, batches in self.val.items()}
        if self.args.needles:
            encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids
            found = build_needle(encode)
            self.rows = Planted(self.rows, found, self.args.needles, self.args.seed)

    def goal(self) -> str:
        c, r = self.args.model, self.args.recipe
        return f"{super().goal()}, rows {r.seq_len / c.original_seq_len:g} × as long as before"
