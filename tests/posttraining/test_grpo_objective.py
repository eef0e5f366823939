"""The objective of GRPO in micro-batches beside each completion by itself."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dsv3_ref.grpo import GRPOOutput, grpo_loss, token_logprobs
from dsv3_ref.posttraining.grpo_objective import GRPOObjective, RolloutRows
from dsv3_ref.training.objective import ALL_TOKENS

PROMPTS, COMPLETIONS = [3, 1, 2, 4, 1], [2, 5, 1, 3, 4]
LENGTHS = [p + n for p, n in zip(PROMPTS, COMPLETIONS)]
EPSILON, BETA = (0.2, 0.3), 0.05
CAP = 1.2
TEMPERATURE, MAX_NEW_TOKENS = 0.7, 9
NUM_ROLLOUTS, NUM_TOKENS = 7, 40.0  # of the minibatch, with two rollouts that have no gradient
VOCAB, DIM = 11, 6


def log_probabilities() -> torch.Tensor:
    """Draw values below 0, with 5 in the padding, which nothing may read."""
    rows = [-torch.rand(n, dtype=torch.double) * 3 for n in COMPLETIONS]
    return pad_sequence(rows, batch_first=True, padding_value=5.0)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return RolloutRows(
        pad_sequence([torch.randint(VOCAB, (n,)) for n in LENGTHS], batch_first=True),
        torch.tensor(PROMPTS), torch.tensor(LENGTHS), torch.randn(5, dtype=torch.double),
        log_probabilities(), log_probabilities(), log_probabilities(),
    )  # fmt: skip


@pytest.fixture
def states(batch):
    """Return the hidden states of each rollout's tokens, and the head."""
    h_nd = torch.randn(sum(LENGTHS), DIM, dtype=torch.double, requires_grad=True)
    return h_nd, torch.randn(VOCAB, DIM, dtype=torch.double)


def make_objective(loss_type: str = "grpo", cap: float = CAP) -> GRPOObjective:
    objective = GRPOObjective(TEMPERATURE, EPSILON, BETA, loss_type, MAX_NEW_TOKENS, cap)
    objective.start_batch(has_reference=True)
    objective.start_minibatch(NUM_ROLLOUTS, len(LENGTHS), NUM_TOKENS)
    return objective


def rows_of(batch: RolloutRows, begin: int, end: int) -> RolloutRows:
    """Return some rollouts of a batch."""
    return RolloutRows(*(None if x is None else x[begin:end] for x in vars(batch).values()))


def loss_in_parts(objective, batch, states, sizes) -> torch.Tensor:
    """Return the mean loss of micro-batches, weighted as the training loop weights them."""
    h_nd, head_wd = states
    total, begin = 0.0, 0
    for size in sizes:
        part = rows_of(batch, begin, begin + size)
        first, last = sum(LENGTHS[:begin]), sum(LENGTHS[: begin + size])
        weight = objective.loss_weight(part) / len(batch)
        places = objective.locate(part, ALL_TOKENS)
        loss = objective.loss(h_nd[None, first:last], head_wd, part, places, ALL_TOKENS)
        total = total + weight * loss
        begin += size
    return total


def each_alone(batch, states) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return log π and entropies of each completion, from its own hidden states."""
    h_nd, head_wd = states
    found = []
    for h, row, p, n in zip(h_nd.split(LENGTHS), batch.rows_bs, PROMPTS, LENGTHS):
        found.append(token_logprobs(h[p - 1 : n - 1], head_wd, row[p:n], TEMPERATURE))
    return found


def output_alone(batch, states, i: int, loss_type: str, old=None, cap=CAP) -> GRPOOutput:
    """Return `grpo_loss` of one completion; for dapo, the sum over its tokens."""
    logp_1t, n = each_alone(batch, states)[i][0][None], COMPLETIONS[i]
    old_1t = batch.old_logp_bt[i : i + 1, :n] if old is None else old
    return grpo_loss(
        logp_1t, old_1t, batch.ref_logp_bt[i : i + 1, :n], batch.advantage_b[i : i + 1],
        torch.ones(1, n, dtype=torch.bool), EPSILON, BETA, loss_type,
        {"dapo": 1.0, "dr_grpo": MAX_NEW_TOKENS}.get(loss_type),
        batch.sampled_logp_bt[i : i + 1, :n] if cap else None, cap,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "sequence"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 3)], ids=str)
def test_micro_batches_are_parts_of_the_mean_over_all_rollouts(loss_type, sizes, batch, states):
    """dapo divides by the tokens of the minibatch, the others by its number of rollouts."""
    alone = [output_alone(batch, states, i, loss_type).loss for i in range(5)]
    want = sum(alone) / (NUM_TOKENS if loss_type == "dapo" else NUM_ROLLOUTS)
    got = loss_in_parts(make_objective(loss_type), batch, states, sizes)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, states[0])[0] for x in (got, want)))


def test_without_a_cap_the_sampler_does_not_matter(batch, states):
    want = sum(output_alone(batch, states, i, "grpo", cap=0).loss for i in range(5)) / NUM_ROLLOUTS
    got = loss_in_parts(make_objective(cap=0), batch, states, (2, 3))
    torch.testing.assert_close(got, want)
    assert abs(got - loss_in_parts(make_objective(), batch, states, (2, 3))) > 1e-4


def test_in_the_first_step_the_old_policy_is_the_policy(batch, states):
    logps = [logp_n.detach()[None] for logp_n, _ in each_alone(batch, states)]
    alone = [output_alone(batch, states, i, "grpo", old).loss for i, old in enumerate(logps)]
    first = RolloutRows(**vars(batch) | {"old_logp_bt": None})
    objective = make_objective()
    got = loss_in_parts(objective, first, states, (5,))
    torch.testing.assert_close(got, sum(alone) / NUM_ROLLOUTS)
    assert got.requires_grad and objective.sums["clip_ratio"] == 0


@pytest.mark.parametrize("sizes", [(5,), (2, 3)], ids=str)
def test_metrics_are_sums_over_tokens(sizes, batch, states):
    objective = make_objective()
    loss_in_parts(objective, batch, states, sizes)
    states = [x.detach() for x in states]
    alone = [output_alone(batch, states, i, "grpo") for i in range(5)]
    logps, entropies = zip(*each_alone(batch, states))

    def distance(others) -> list[torch.Tensor]:
        return [x - y[: len(x)] for x, y in zip(logps, others)]

    want = {
        "tokens": sum(COMPLETIONS),
        "entropy": sum(x.sum() for x in entropies),
        "sampling_logp_difference": sum(x.abs().sum() for x in distance(batch.sampled_logp_bt)),
        "kl_k1": sum(x.sum() for x in distance(batch.ref_logp_bt)),
    }
    for name in ("kl", "clip_ratio", "sampler_weight"):
        want[name] = sum(n * getattr(x, name) for n, x in zip(COMPLETIONS, alone))
    assert {k: float(x) for k, x in objective.sums.items()} == pytest.approx(
        {k: float(x) for k, x in want.items()}
    )
    assert 0 < objective.sums["clip_ratio"] < 15 and not objective.sums["entropy"].requires_grad
    objective.start_batch(has_reference=False)
    assert set(objective.sums) == set(want) - {"kl_k1"} and not any(objective.sums.values())


def test_the_model_reads_the_rollouts_without_their_padding(batch, states):
    objective = make_objective()
    tokens_1n, cu_seqlens = objective.model_input(batch)
    assert tokens_1n.shape == (1, 26)
    assert cu_seqlens.tolist() == [0, 5, 11, 14, 21, 26]
    for i, n in enumerate(LENGTHS):
        end = int(cu_seqlens[i + 1])
        assert torch.equal(tokens_1n[0, end - n : end], batch.rows_bs[i, :n])
    assert batch.completion_mask_bt.sum(1).tolist() == COMPLETIONS
    places = objective.locate(batch, ALL_TOKENS)
    logp_bt = objective.read_logprobs(states[0][None], states[1], batch, places, ALL_TOKENS)
    for row_t, (logp_n, _) in zip(logp_bt, each_alone(batch, states)):
        torch.testing.assert_close(row_t[: len(logp_n)], logp_n)
        assert not row_t[len(logp_n) :].any()


def test_a_process_without_rollouts_has_a_loss_of_0(batch):
    h_1nd = torch.zeros(1, 0, DIM, requires_grad=True)
    objective, none = make_objective(), rows_of(batch, 0, 0)
    places = objective.locate(none, ALL_TOKENS)
    loss = objective.loss(h_1nd, torch.zeros(VOCAB, DIM), none, places, ALL_TOKENS)
    assert loss == 0 and torch.autograd.grad(loss, h_1nd)[0].shape == h_1nd.shape
