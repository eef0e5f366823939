"""Runs on several ranks: what they share, and ranks that each hold the whole model.

The latter for reward models and RL, whose losses need whole answers and whose answers are most of
the work: every rank has its share of the questions, gradients are summed.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_ref.checkpoints import atomic, native
from dsv3_ref.config import UserError
from dsv3_ref.training import resume
from dsv3_ref.training.settings import TrainConfig


class Several:
    """What a run on any ranks does together. Rank 0 writes what is not sharded."""

    @property
    def first(self) -> bool:
        return dist.get_rank() == 0

    def leaves(self) -> bool:
        """Whether any rank was asked to: then all leave after the same step."""
        asked = torch.tensor(max(self.asked, default=0), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked and not self.asked:
            self.asked.append(int(asked))
        return bool(asked)

    def restore(self) -> None:
        if self.first:
            atomic.clean_temp(self.folder / "checkpoints")
        dist.barrier()
        if found := native.list_checkpoints(self.folder):
            resume.read(self, found[-1])

    def go_back(self, to: Path) -> None:
        if self.first:
            resume.drop_after(self.folder, to)
        dist.barrier()
        seconds = self.seconds
        resume.read(self, to, data=False)
        self.seconds, self.spike_guard.last_rollback = seconds, self.step


class Replicas(Several):
    """A rank's part of a run with a model each, before a `Trainer` in the order of bases."""

    def __init__(self, args: TrainConfig, folder: Path, device: torch.device):
        self.rank, self.replicas, self.at = dist.get_rank(), dist.get_world_size(), device
        super().__init__(args, folder)

    def open_data(self) -> None:
        super().open_data()
        if any(n % (self.replicas * self.parts) for n in self.plan):
            raise UserError(
                f"{self.replicas} ranks × {self.parts} updates a step must divide "
                "--global-batch-size and --start-batch-size"
            )

    @property
    def where(self) -> str:
        return f"{self.replicas} ranks with a model each, on {self.device.type}"

    def pick_device(self) -> torch.device:
        return self.at

    # ── Shares ──

    def share(self, items: list) -> list:
        """This rank's of a list that all ranks hold."""
        return items[self.rank :: self.replicas]

    def gathered(self, items: list) -> list:
        """All ranks' shares as one list, in its first order."""
        shares = [None] * self.replicas
        dist.all_gather_object(shares, items)
        longest = max(map(len, shares))
        return [mine[i] for i in range(longest) for mine in shares if i < len(mine)]

    def summed(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks, of the same names."""
        names = sorted(values)
        total = torch.tensor([values[k] for k in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist()))

    def trained(self, batch) -> int:
        return int(self.summed({"n": super().trained(batch)})["n"])

    # ── A step ──

    def together(self, model, sums, load_le) -> tuple:
        """Gradients and what is told of a step, as one rank would have them: means over ranks."""
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= self.replicas
        dist.all_reduce(sums)
        dist.all_reduce(load_le)
        return sums / self.replicas, load_le

    def one_step(self) -> dict:
        """Random numbers are a rank's own, and those of the step: also of a run that goes on."""
        torch.manual_seed(hash((self.args.seed, self.step, self.rank)))
        return super().one_step()

    def other_sources(self) -> dict[str, float]:
        """Rank 0's summary needs nobody: all that it tells was gathered before."""
        return {}

    # ── What only one does ──

    def save(self, val_loss: float | None) -> None:
        if self.first:
            super().save(val_loss)
        dist.barrier()
