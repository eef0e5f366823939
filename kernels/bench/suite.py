"""All cases of the benchmark, at the sizes of the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from dsv3_ref.kernels.bench.attention_cases import (
    case_attention,
    case_attention_backward,
    case_latent_attention,
    case_paged_attention,
    case_varlen_attention,
)
from dsv3_ref.kernels.bench.case import (
    Case,
    Goal,
    achieved_tflops,
    fraction_of_case,
    fraction_of_copy,
    speedup_over,
)
from dsv3_ref.kernels.bench.dispatch_cases import case_combine, case_dispatch
from dsv3_ref.kernels.bench.layer_cases import (
    case_cross_entropy_and_grads,
    case_linear_cross_entropy,
    case_moe_step,
)
from dsv3_ref.kernels.bench.matmul_cases import (
    case_fp8_gemm,
    case_fp8_grouped_gemm,
    case_fp8_grouped_wgrad,
    case_fp8_wgrad,
    case_grouped_linear,
    case_grouped_linear_backward,
)
from dsv3_ref.kernels.bench.memory_bound_cases import (
    case_act_quant,
    case_act_quant_transposed,
    case_apply_rotary_emb,
    case_e5m6_quant,
    case_e5m6_restore,
    case_group_limited_topk,
    case_permute,
    case_permute_backward,
    case_requant_transposed,
    case_rms_norm,
    case_rms_norm_backward,
    case_rms_norm_quant,
    case_swiglu,
    case_swiglu_backward,
    case_swiglu_quant,
    case_swiglu_quant_backward,
    case_unpermute,
    case_unpermute_backward,
    case_weight_quant,
)
from dsv3_ref.kernels.launch import BF16, FP32

from dsv3_ref.config import V3

TOKENS = 4096
LINEARS = (  # (n, k): wkv_a with wq_a, wq_b, wkv_b, wo, an expert's w1 with w3, w2, a dense layer's
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
    (36864, 7168), (7168, 18432),
)  # fmt: skip
EXPERTS = ((4096, 7168), (7168, 2048))
GEMM_GOALS = (
    Goal("TFLOP/s", 1000, achieved_tflops),
    Goal("× cuBLAS bf16", 1.4, speedup_over("cuBLAS bf16")),
)
PREFILL_GOALS = (Goal("TFLOP/s", 550, achieved_tflops),)
PREFILL_BACKWARD_GOALS = (Goal("TFLOP/s", 400, achieved_tflops),)
NODE_RANKS = 8
DISPATCH_SMS = (4, 8, 12, 16, 20, 24, 32)  # the report uses 20
TENSOR_PARALLEL_HEADS = V3.n_heads // 4
DECODE_GOALS = {  # with few heads bound by reading the cache; 242 FLOPs per byte with all of them
    V3.n_heads: (Goal("TFLOP/s", 450, achieved_tflops),),
    TENSOR_PARALLEL_HEADS: (Goal("of copy", 0.8, fraction_of_copy),),
}
STEP_GOALS = tuple(Goal(f"× {x}", 1.0, speedup_over(x)) for x in ("bf16 triton", "bf16 torch"))


@dataclass(frozen=True)
class Shrink:
    """A divisor of tokens, widths and heads, so that cases fit on a CPU."""

    divisor: int

    def __call__(self, size: int, least: int = 1) -> int:
        """Divide a size, but not below `least`."""
        return max(size // self.divisor, min(size, least))


def matmul_cases(shrink: Shrink) -> list[Case]:
    """Return the matrix products.

    256 experts with 128 rows each are bound by reading their weights; 8 with 4096 rows are not.
    """
    m = shrink(TOKENS)
    cases = []
    for n, k in LINEARS:
        goals = GEMM_GOALS if (n, k) == (7168, 16384) else ()
        cases += [case_fp8_gemm(m, shrink(n), shrink(k), goals)]
        cases += [case_fp8_wgrad(m, shrink(n), shrink(k))]
    for n, k in EXPERTS:
        dense = case_fp8_gemm(m, shrink(n), shrink(k))
        goal = Goal("of dense", 0.9, fraction_of_case(dense.name))
        for e, skewed in ((8, False), (256, False), (256, True)):
            args = shrink(e, 4), 8 * m, shrink(n), shrink(k), skewed
            cases += [
                case_fp8_grouped_gemm(*args, goals=(goal,) if e == 8 else ()),
                case_fp8_grouped_wgrad(*args),
                case_grouped_linear(*args),
                case_grouped_linear_backward(*args),
            ]
    return cases


def for_sizes(sizes: Sequence[tuple[int, ...]], *makers: Callable[..., Case]) -> list[Case]:
    """Return the cases of all makers at the first sizes, then at the next ones, and so on."""
    return [make(*size) for size, make in product(sizes, makers)]


def memory_bound_cases(shrink: Shrink) -> list[Case]:
    """Return the quantizers, norms, activations and routing ops."""
    n, m = shrink(TOKENS), 8 * shrink(TOKENS)
    d, wide_d = shrink(V3.dim), shrink(16384)
    f, wide_f = shrink(V3.moe_inter_dim), shrink(V3.inter_dim)
    e, k = V3.n_routed_experts, V3.n_activated_experts
    norms = case_rms_norm, case_rms_norm_backward, case_rms_norm_quant
    activations = case_swiglu, case_swiglu_backward, case_swiglu_quant
    permutations = case_permute, case_permute_backward, case_unpermute, case_unpermute_backward
    return [
        *for_sizes([(n, d), (n, wide_d), (m, d), (m, f)], case_act_quant),
        *for_sizes([(n, wide_d)], case_e5m6_quant, case_e5m6_restore),
        case_weight_quant(d, wide_d, FP32),
        case_weight_quant(d, wide_d, BF16),
        *for_sizes([(1, n, d), (e, m, d), (e, m, f)], case_act_quant_transposed),
        *for_sizes([(1, n, d), (e, m, d), (e, m, f)], case_requant_transposed),
        *for_sizes([(n, d), (n, shrink(V3.q_lora_rank)), (m, d)], *norms),
        *for_sizes([(n, wide_f), (m, f)], *activations),
        *for_sizes([(1, n, wide_f), (e, m, f)], case_swiglu_quant_backward),
        case_apply_rotary_emb(n, shrink(V3.n_heads)),
        *for_sizes([(n, e, k), (m, e, k)], case_group_limited_topk),
        *for_sizes([(n, d, e, k)], *permutations),
    ]


def dispatch_cases(shrink: Shrink) -> list[Case]:
    """Return dispatch and combine among the ranks of a node, by their number of multiprocessors."""
    members = shrink(NODE_RANKS, 2)
    n, d = shrink(TOKENS // 4), shrink(V3.dim)
    budgets = sorted({shrink(sms) for sms in DISPATCH_SMS}, reverse=True)
    sizes = [(sms, members, n, d) for sms in budgets]
    return [*for_sizes(sizes, case_dispatch), *for_sizes(sizes, case_combine)]


def attention_cases(shrink: Shrink) -> list[Case]:
    """Return attention of 1K to 16K tokens, and decoding of up to 128 requests of 128K tokens."""
    h, thousand = shrink(V3.n_heads), shrink(1024)
    cases = []
    for s in (1, 2, 4, 8, 16):
        has_goals = s in (4, 16)
        goals = PREFILL_GOALS if has_goals else ()
        backward_goals = PREFILL_BACKWARD_GOALS if has_goals else ()
        cases += [
            case_attention(s * thousand, h, goals),
            case_attention_backward(s * thousand, h, backward_goals),
        ]
    cases += [case_varlen_attention(4, 4 * thousand, h)]
    cases += [case_latent_attention(shrink(32), 4 * thousand, h)]
    for heads, b, t in product(DECODE_GOALS, (1, 32, 128), (1, 4, 16, 128)):
        goals = DECODE_GOALS[heads] if (b, t) == (128, 4) else ()
        cases += [case_paged_attention(shrink(b), t * thousand, shrink(heads), goals)]
    return cases


def all_cases(divisor: int = 1) -> list[Case]:
    """Return every case; `divisor` divides tokens, widths and heads, so that a CPU can run them."""
    shrink = Shrink(divisor)
    d, f = shrink(V3.dim), shrink(V3.moe_inter_dim)
    return [
        *matmul_cases(shrink),
        *memory_bound_cases(shrink),
        *dispatch_cases(shrink),
        *attention_cases(shrink),
        *for_sizes(
            [(shrink(TOKENS), d, shrink(V3.vocab_size))],
            case_linear_cross_entropy,
            case_cross_entropy_and_grads,
        ),
        case_moe_step(4, shrink(TOKENS), shrink(32, 16), d, f, STEP_GOALS),
    ]
