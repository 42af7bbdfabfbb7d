"""DeepSeekMoE: grouped equals a naive loop, selection by bias only, balancing, load counting."""

from __future__ import annotations

import pytest
import torch

import fathom
from fathom.errors import ConfigError
from fathom.model.context import Context
from fathom.model.moe import MoE
from fathom.model.rope import RotaryTable
from fathom.model.router import affinities
from tests.model.tiny import YARN, tiny_config, tiny_model


def naive(moe: MoE, x_BTD: torch.Tensor) -> torch.Tensor:
    """Eq 12 token by token, expert by expert."""
    out = []
    for u in x_BTD.flatten(0, 1):
        indices, weights = fathom.route(
            moe.gate(u[None]), moe.gate.e_score_correction_bias, moe.config
        )
        y = moe.shared_experts(u)
        for i, g in zip(indices[0], weights[0], strict=True):
            gate, up = (moe.experts.gate_up_proj[i] @ u).chunk(2)
            y = y + g * (moe.experts.down_proj[i] @ (torch.nn.functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x_BTD)


def one_moe(**changes) -> tuple[MoE, Context]:  # type: ignore[no-untyped-def]
    model = tiny_model(3, **changes)
    rotation = RotaryTable(model.config).first(7, torch.device("cpu"))
    first = next(module for module in model.modules() if isinstance(module, MoE))
    return first, Context(rotation)


def test_equals_the_naive_loop_with_gradients() -> None:
    moe, context = one_moe()
    x = torch.randn(2, 7, 32, requires_grad=True)
    weights = torch.randn(2, 7, 32)
    grads = []
    for function in (lambda: moe(x, context), lambda: naive(moe, x)):
        x.grad = None
        moe.zero_grad()
        y = function()
        (y * weights).sum().backward()
        found = [p.grad.clone() for p in moe.parameters() if p.grad is not None]
        grads.append([y.detach(), x.grad, *found])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bias_chooses_but_does_not_weigh() -> None:
    config = tiny_config(n_group=1, topk_group=1)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]])
    bias = torch.zeros(8)
    bias[7] = 10.0
    indices, weights = fathom.route(logits, bias, config)
    assert indices.tolist() == [[7, 0]]
    s = logits.sigmoid()[0]
    expected = 2.5 * s[[7, 0]] / s[[7, 0]].sum()
    torch.testing.assert_close(weights[0], expected)


def test_groups_stay_masked_when_biased_scores_are_negative() -> None:
    """With every biased score below zero a mask of 0 would let the unselected groups win."""
    config = tiny_config(n_group=4, topk_group=1)
    logits = torch.randn(64, 8)
    indices, _ = fathom.route(logits, torch.full((8,), -5.0), config)
    assert all(len(set(row)) == 1 for row in (indices // 2).tolist())


def test_group_score_is_the_sum_of_the_best_two() -> None:
    config = tiny_config(n_group=2, topk_group=1)
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1]])
    indices, _ = fathom.route(torch.logit(scores), torch.zeros(8), config)
    assert sorted(indices[0].tolist()) == [4, 5]


def test_no_token_is_dropped_when_all_choose_the_same_expert() -> None:
    moe, context = one_moe()
    with torch.no_grad():
        moe.gate.e_score_correction_bias[:] = torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0])
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(moe(x, context), naive(moe, x), atol=1e-5, rtol=1e-4)
    assert context.routers[0].load_E.tolist() == [14, 14, 0, 0, 0, 0, 0, 0]


def test_bias_moves_by_exactly_gamma_over_the_whole_batch() -> None:
    """Load of two micro-batches together decides, MTP blocks too; evaluation does not count."""
    model = tiny_model()
    tokens = torch.randint(0, 101, (4, 21))
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    loads = [fathom.losses(model, half).expert_load for half in tokens.split(2)]
    model.eval()
    model(tokens)
    model.train()
    fathom.update_bias(model, 0.125)
    total = sum(loads)
    assert len(model.routers()) == 3
    for router, old, load in zip(model.routers(), before, total, strict=True):
        expected = 0.125 * torch.sign(load.float().mean() - load)
        torch.testing.assert_close(router.e_score_correction_bias - old, expected)
        assert router.expert_load.sum() == 0


def test_bias_balances_a_skewed_router() -> None:
    torch.manual_seed(0)
    model = tiny_model(n_group=1, topk_group=1, num_hidden_layers=2)
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias[:] = torch.linspace(-1, 1, 8)
    tokens = torch.randint(0, 101, (8, 33))
    worst = []
    for _ in range(100):
        with torch.no_grad():
            load = fathom.losses(model, tokens).expert_load.float()
        worst.append((load.amax(1) / load.mean(1)).max().item())
        fathom.update_bias(model, 0.02)
    assert worst[0] > 3 and max(worst[-10:]) < 1.3


def test_bias_stays_float32_under_casts() -> None:
    model = tiny_model()
    exact = model.routers()[0].e_score_correction_bias.clone()
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.routers()[0].e_score_correction_bias, exact)
    assert "e_score_correction_bias" not in dict(model.named_parameters())


def test_balance_loss_adds_over_blocks_and_trains_the_router() -> None:
    model = tiny_model()
    tokens = torch.randint(0, 101, (2, 17))
    losses = fathom.losses(model, tokens, mtp_weight=0, balance_alpha=1.0)
    trunk = model.trunk(tokens[:, :-1], mtp=False, keep_scores=True)
    expected = 0
    for record in trunk.routers:
        s = record.scores_BTE
        f = torch.stack([torch.bincount(r.topk(2).indices.flatten(), minlength=8) for r in s])
        expected += (f * 8 / (2 * 16) * (s / s.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()
    torch.testing.assert_close(losses.balance, expected)
    losses.balance.backward()
    assert model.routers()[0].weight.grad.abs().sum() > 0


def test_softmax_routers_have_no_bias() -> None:
    model = tiny_model(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
    assert all(router.e_score_correction_bias is None for router in model.routers())
    fathom.update_bias(model, 0.1)
    scores = affinities(torch.randn(5, 8), model.config)
    torch.testing.assert_close(scores.sum(-1), torch.ones(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "multiple of n_group=3"),
        ({"n_group": 8}, "at most 4 groups"),
        ({"topk_group": 3}, "topk_group=3 cannot exceed n_group=2"),
        ({"num_experts_per_tok": 5}, "exceeds the 4 experts"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"hidden_size": 1.5}, "must be an integer"),
        ({"qk_rope_head_dim": 3}, "must be even"),
        ({"scoring_func": "tanh"}, "use one of sigmoid, softmax"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**YARN, "mscale_all_dims": 1}}, "unknown key 'mscale_all_dims'"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "must be a number"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": "yarn"}, "must be a table"),
        ({"norm_topk_prob": "false"}, "must be true or false"),
    ],
)
def test_impossible_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)
