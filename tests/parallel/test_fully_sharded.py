"""Fully sharded data parallelism: the steps of one process, and slices in checkpoints."""

import json
import shutil
from dataclasses import replace
from math import inf

import miniruns
import pytest
import torch
import torch.distributed as dist
from miniruns import metrics, options
from test_cluster import near, wait_for_exit
from support import randomize
from test_parallel import (
    CPU,
    MICRO,
    computing_in,
    draw_conversations,
    draw_tokens,
    relative,
    save_grads,
    step_numbers,
)
from test_sharded import WIDE, contents, counted_reads, write

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import fill_tensors, fill_weights, list_checkpoints, load
from dsv3_ref.checkpoints.sharded import held_ranges, stage, weight_ranges
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer, moe_layers
from dsv3_ref.optim import RECIPES, build_adamw
from dsv3_ref.parallel.engine import EngineSettings
from dsv3_ref.parallel.fully_sharded import FullyShardedEngine
from dsv3_ref.parallel.mesh import Mesh
from dsv3_ref.posttraining.sft import flagged_loss, num_loss_tokens
from dsv3_ref.pretrain import train_step
from dsv3_ref.training.ema import EMA
from dsv3_ref.training.objective import NEXT_TOKEN_LOSS, CompletionLoss, RowBatch
from dsv3_ref.training.recompute import saved_tensors
from dsv3_ref.training.settings import parse_args, validate_args

RECIPE = replace(RECIPES["tiny"], balance_loss_coeff=0.01, max_grad_norm=0.5)


# ── Runs ──


def start(home, out, world: int, *more):
    """Train on ranks and return the output of the first one."""
    fixed = "--start-batch-size 3 --skip-grad-norm-factor 0 --ema-decay 0.9".split()
    processes = miniruns.launch(home, world, options(home, out, *miniruns.override(fixed, more)))
    return wait_for_exit(processes)[0]


@pytest.fixture(scope="module")
def one(home):
    start(home, home / "one", 1)
    return home / "one"


def test_a_run_moves_between_ranks_and_one_process(one, home):
    """Weights, moments and averages move with it; a batch of 3 rows leaves a rank with fewer."""
    run = home / "sharded"
    text = start(home, run, 2, "--fully-shard")
    assert "2 ranks, fully sharded, on cpu" in text
    near(metrics(run), metrics(one))
    want = metrics(run)
    for folder in list_checkpoints(run)[1:]:
        shutil.rmtree(folder)
    start(home, run, 1, "--resume")
    near(metrics(run), want)
    shutil.rmtree(list_checkpoints(run)[-1])
    start(home, run, 2, "--resume", "--fully-shard")
    near(metrics(run), want)
    assert sum(p.stat().st_size for p in list_checkpoints(run)[-1].glob("rank_*")) > 0


REFUSED = [
    (["--ep", "2"], "divides every layer among all ranks"), (["--cp", "2"], "set --pp 1 --ep 1"),
    (["--no-zero"], "leave one of them"),
    (["--precision", "fp8"], "gathers weights in bf16 or fp32"),
]  # fmt: skip


@pytest.mark.parametrize("more, message", REFUSED, ids=str)
def test_options_that_exclude_each_other_are_refused(more, message, home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = parse_args(options(home, home / "no", "--fully-shard", *more)[1:])
    with pytest.raises(UserError, match=message):
        validate_args(config)


# ── A step over all ranks, compared with one process ──


def draw_alike(n: int) -> torch.Tensor:
    """Draw rows of which the first half repeats one token: some experts get none of them."""
    rows_bs = draw_tokens(n)
    rows_bs[: n // 2] = 7
    return rows_bs


TASKS = {
    "pretrain": (NEXT_TOKEN_LOSS, draw_tokens, 0.3, ()),
    "idle experts": (NEXT_TOKEN_LOSS, draw_alike, 0.3, ()),
    "sft": (
        CompletionLoss(), draw_conversations, 0.0,
        (lambda model, rows_bs, _: flagged_loss(model, rows_bs), num_loss_tokens),
    ),
}  # fmt: skip


def compare_steps(task: str, micro_batch: int, num_rows: int):
    """Take three steps on all ranks, with recomputation, and on one process, in fp64.

    Return the largest relative error of losses and gradient norm, those of gradients and weights by
    name, whether loads and biases are equal, and how many experts got tokens of other ranks only.
    """
    objective, draw, mtp_weight, reference = TASKS[task]
    recipe = RECIPE if mtp_weight else replace(RECIPE, balance_loss_coeff=0.0)
    with computing_in(torch.float64):
        mesh = Mesh(1, dist.get_world_size(), 1, CPU)
        settings = EngineSettings(moments=torch.float64, micro_batch=micro_batch)
        engine = FullyShardedEngine(MICRO, recipe, mesh, settings, 1, objective)
        torch.manual_seed(1)
        whole = Transformer(MICRO)
        optimizer = build_adamw(whole, recipe, torch.float64)
        grads, _ = save_grads(whole, optimizer)
        numbers, errors = [], {}
        same = True
        own_loads, add_loads = [], engine.tokens_per_expert
        engine.tokens_per_expert = lambda own: own_loads.append(dict(own)) or add_loads(own)
        for _ in range(3):
            rows, args = draw(num_rows), (recipe, 1e-3, 1e-2, mtp_weight)
            want = train_step(whole, optimizer, [rows], *args, inf, *reference)
            with saved_tensors(recompute=True):
                got = engine.train_step(rows, *args)
            pair = [step_numbers(x, len(want.mtp), torch.float64) for x in (got, want)]
            numbers.append(relative(*pair))
            same &= torch.equal(got.load_le, want.load_le.long())
            for name, p in engine.model.named_parameters():
                if p.grad is not None:
                    errors[name] = relative(p.grad.full_tensor(), grads[name])
        weights = dict(whole.named_parameters())
        for name, p in engine.model.named_parameters():
            errors[f"weight {name}"] = relative(p.full_tensor(), weights[name])
        gates = zip(moe_layers(engine.model).values(), moe_layers(whole).values())
        same &= all(torch.equal(a.gate.bias, b.gate.bias) for a, b in gates)
    idle = sum(
        int(((own_e == 0) & (load_e > 0)).sum())
        for own_e, load_e in zip(own_loads[-1].values(), got.load_le)
    )
    return max(numbers), errors, same, idle


SHORT = [(2, "pretrain", 0, 4), (2, "idle experts", 1, 4), (2, "sft", 0, 5)]
LONG = [
    (4, "pretrain", 0, 8), (4, "pretrain", 1, 3), (4, "idle experts", 1, 8), (3, "sft", 1, 5),
    (3, "pretrain", 2, 7),
]  # fmt: skip
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)]


@pytest.mark.parametrize("world, task, micro_batch, num_rows", CASES)
def test_a_step_is_the_step_of_one_process(world, task, micro_batch, num_rows, gang):
    """Also with experts without tokens, uneven slices, and ranks and micro-batches without rows."""
    names = {name for name, _ in Transformer(MICRO).named_parameters()}
    if task == "sft":
        names = {name for name in names if not name.startswith("mtp.")}
    ranks = gang.run(world, compare_steps, task, micro_batch, num_rows)
    assert task != "idle experts" or max(idle for *_, idle in ranks) > 0
    for numbers, errors, same, _ in ranks:
        assert same and numbers < 1e-12
        assert max(errors.values()) < 1e-12, max(errors.items(), key=lambda e: e[1])
        assert names <= errors.keys()


# ── Checkpoints ──


def build(config=MICRO, seed: int = 1) -> tuple[FullyShardedEngine, EMA]:
    mesh = Mesh(1, dist.get_world_size(), 1, CPU)
    engine = FullyShardedEngine(config, RECIPE, mesh, seed=seed)
    optimizer = engine.optimizer
    return engine, EMA(optimizer.masters(), optimizer.adamw, 0.9, optimizer.gather_weights)


def train_and_save(folder) -> tuple[int, int]:
    """Take two steps and save; return the bytes that this rank stages, and its elements."""
    engine, ema = build()
    torch.manual_seed(2)
    for _ in range(2):
        engine.train_step(draw_tokens(4), RECIPE, 1e-2, 1e-2, 0.3)
        ema.update()
    ema.wait()
    write(engine, ema, folder)
    staged = stage(held_ranges(engine, ema, once=True))
    num_bytes = sum(part.values.nbytes for part in staged.values())
    return num_bytes, sum(x.numel() for x in engine.optimizer.shards.values())


def load_and_save(old, new) -> bool:
    """Load a checkpoint on other ranks, check the gathered weights, and save it again."""
    engine, ema = build(seed=5)
    fill_tensors(old, held_ranges(engine, ema))
    engine.optimizer.gather_weights()
    write(engine, ema, new)
    want = load(old)
    rows_bs = RowBatch(draw_tokens(2))
    targets_n = rows_bs.rows_bs[:, 1:].flatten()
    h_bsd, _ = want.hidden_states(rows_bs.rows_bs[:, :-1])
    nll = torch.nn.functional.cross_entropy(want.head(h_bsd).flatten(0, 1), targets_n)
    return abs(engine.mean_loss(rows_bs) - nll.item()) < 1e-5


@pytest.mark.parametrize("worlds", [(2, 3), pytest.param((4, 1), marks=pytest.mark.full)], ids=str)
def test_ranks_write_their_slices_once_and_others_load_them(worlds, gang, tmp_path):
    """Master 4, moments 2 + 2, average 4 bytes per element; gate biases on the first rank."""
    ranks = gang.run(worlds[0], train_and_save, tmp_path / "old")
    biases = 4 * MICRO.n_routed_experts * (MICRO.n_layers + MICRO.n_mtp_layers - 1)
    for rank, (staged, own) in enumerate(ranks):
        assert staged == 12 * own + (0 if rank else biases)
    assert sum(own for _, own in ranks) == sum(p.numel() for p in Transformer(MICRO).parameters())
    assert all(gang.run(worlds[1], load_and_save, tmp_path / "old", tmp_path / "new"))
    want, got = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


def refusal_of_missing_moments(folder) -> str:
    engine, _ = build()
    table = json.loads((folder / "tensors.json").read_text())
    dist.barrier()
    del table["tensors"]["exp_avg.head.weight"]
    (folder / "tensors.json").write_text(json.dumps(table))
    dist.barrier()
    with pytest.raises(UserError) as refused:
        fill_tensors(folder, held_ranges(engine))
    return str(refused.value)


def test_missing_moments_are_refused(gang, tmp_path):
    gang.run(2, train_and_save, tmp_path / "old")
    for text in gang.run(2, refusal_of_missing_moments, tmp_path / "old"):
        assert "lacks exp_avg.head.weight" in text


# ── Starting weights ──


def start_from(folder) -> tuple[int, bool]:
    """Load a directory; return the bytes that are read, and whether all weights are right."""
    engine, _ = build(WIDE)
    with counted_reads() as counted:
        fill_weights(weight_ranges(engine), folder)
    whole = load(folder, dtype=torch.float32).state_dict()
    exact = all(torch.equal(p.full_tensor(), whole[n]) for n, p in engine.model.named_parameters())
    return sum(counted), exact


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_a_start_reads_the_slices_of_the_rank(world, gang, tmp_path):
    torch.manual_seed(3)
    save_hf(randomize(Transformer(WIDE)).bfloat16(), tmp_path / "hf", 200_000)
    stored = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    ranks = gang.run(world, start_from, tmp_path / "hf")
    assert all(exact and read < 1.1 * stored / world + 50_000 for read, exact in ranks)
    assert sum(read for read, _ in ranks) < 1.1 * stored
