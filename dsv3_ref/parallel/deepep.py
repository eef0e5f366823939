"""Tokens to their experts and back by DeepEP's kernels, over NVLink and RDMA (§3.2.2).

For `deep_ep.Buffer`, of DeepEP 1 or kept by DeepEP 2. Never run against the library itself, which
wants several GPUs: tests/parallel/test_deepep.py holds this side of the protocol against a module
made after DeepEP's documentation and its own checks. Rows travel in bf16, or to
experts in FP8; sums in bf16.
"""

from dsv3_ref.config import Config, UserError
from dsv3_ref.expert_parallel import apply_local_experts
from dsv3_ref.fp8 import act_dequant, act_quant
from dsv3_ref.parallel.token_dispatcher import empty_rows, zero_rows
from dsv3_ref.parallel.watchdog import track_operation

RANKS_PER_NODE = 8  # ranks that DeepEP takes for one node; more of them need RDMA
LAYOUT_ARGUMENTS = (  # what `get_dispatch_layout` returns before its event, as `dispatch` names it
    "num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank",
)  # fmt: skip


def import_buffer_class():
    """`deep_ep.Buffer`, if there is one."""
    try:
        from deep_ep import Buffer
    except ImportError as e:
        raise UserError(
            f"--token-dispatcher deepep cannot import deep_ep ({e}): build it for these GPUs with "
            "`python setup.py install` in a clone of https://github.com/deepseek-ai/DeepEP"
        ) from e
    return Buffer


def create_buffer(group, dim: int):
    """Memory for rows of `dim` numbers in bf16, as much as the library's own settings ask for."""
    buffer, n = import_buffer_class(), group.size()
    try:
        configs = buffer.get_dispatch_config(n), buffer.get_combine_config(n)
    except AssertionError as e:
        raise UserError(f"--token-dispatcher deepep has no settings for --ep {n}: {e}") from e
    inside = max(c.get_nvl_buffer_size_hint(2 * dim, n) for c in configs)
    across = (
        max(c.get_rdma_buffer_size_hint(2 * dim, n) for c in configs) if n > RANKS_PER_NODE else 0
    )
    return buffer(group, inside, across)


class DeepEPDispatch:
    """Transfer: tokens, their weights and experts to the experts' ranks; gradients are combined."""

    def __init__(self, deepep, expert_nk):
        self.deepep, self.expert_nk = deepep, expert_nk

    def forward(self, x_nd, weight_nk):
        expert_nk, self.expert_nk = self.expert_nk.long().contiguous(), None
        weight_nk, buffer = weight_nk.float().contiguous(), self.deepep.buffer
        layout = zip(LAYOUT_ARGUMENTS, buffer.get_dispatch_layout(expert_nk, self.deepep.n_experts))
        how = {"topk_idx": expert_nk, "topk_weights": weight_nk, **dict(layout)}
        x_md, codes, expert_mk, weight_mk, _, self.handle = yield from self.deepep.dispatch(
            x_nd, **how
        )
        self.arrived, self.m = (expert_mk, codes), len(x_md)
        self.like = empty_rows(x_md), empty_rows(weight_mk)
        return x_md, weight_mk

    def unpack(self):
        """Experts of the rows that arrived, −1 elsewhere, and the rows' codes; kept by nobody."""
        arrived, self.arrived = self.arrived, None
        return arrived

    def backward(self, *gs):
        g_md, dw_mk = (zero_rows(a, self.m) if g is None else g for g, a in zip(gs, self.like))
        return (yield from self.deepep.combine(g_md, self.handle, dw_mk.contiguous()))


class DeepEPCombine:
    """Transfer: results to where the tokens came from, added up; gradients travel as tokens do."""

    def __init__(self, deepep, handle):
        self.deepep, self.handle = deepep, handle

    def forward(self, y_md):
        y_nd, _ = yield from self.deepep.combine(y_md, self.handle)
        self.like, self.n = empty_rows(y_nd), len(y_nd)
        return (y_nd,)

    def backward(self, g_nd):
        g_nd = zero_rows(self.like, self.n) if g_nd is None else g_nd
        g_md, *_ = yield from self.deepep.dispatch(g_nd, handle=self.handle)
        return (g_md,)


class DeepEPDispatcher:
    """Takes `AllToAllDispatcher`'s place: the way of a micro-batch's tokens through DeepEP, on a tape."""

    def __init__(self, c: Config, group, fp8: bool = False):
        self.n_experts, self.group, self.fp8 = c.n_routed_experts, group, fp8
        self.buffer = create_buffer(group, c.dim)

    def apply_experts(self, tape, experts, x_nd, weight_nk, expert_nk):
        """Σ_k w_nk·expert_nk(x_n) over experts on many ranks; a generator."""
        dispatch = DeepEPDispatch(self, expert_nk)
        sent = yield from tape.run_comm(dispatch, x_nd, weight_nk)
        arrived = dispatch.unpack()
        here = lambda x_md, weight_mk: apply_local_experts(experts, x_md, weight_mk, *arrived)
        y_md = tape.run(here, *sent)
        return (yield from tape.run_comm(DeepEPCombine(self, dispatch.handle), y_md))[0]

    def dispatch(self, x_nd, **how):
        """Rows to other ranks: (rows of x's dtype, their FP8 codes or None, what else arrived)."""
        sent = act_quant(x_nd.contiguous(), True) if self.fp8 else x_nd.bfloat16().contiguous()
        with track_operation(
            "dispatch of tokens", self.group
        ):  # waits until all have told how many come
            got, *more, event = self.buffer.dispatch(sent, **how, async_finish=True)
        yield
        event.current_stream_wait()
        x_md, codes = (act_dequant(*got), got) if self.fp8 else (got, None)
        return x_md.to(x_nd.dtype), codes, *more

    def combine(self, y_md, handle, weight_mk=None):
        """Rows to where they came from, added up there: rows of y's dtype, and weights likewise."""
        sent = y_md.bfloat16().contiguous()
        y_nd, weight_nk, event = self.buffer.combine(sent, handle, weight_mk, async_finish=True)
        yield
        event.current_stream_wait()
        return y_nd.to(y_md.dtype), weight_nk
