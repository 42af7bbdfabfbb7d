"""Equal to `transformers` 5.23: logits, gradients, padding, caches; V3 and V2 (report §2)."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf_v3

import fathom
from tests.model.tiny import ours_from, random_fields, v2_twin, v3_twin

TOLERANCE = 1e-5


def tokens_of(seed: int, batch: int = 2, length: int = 40, vocab: int = 101) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, length), generator=generator)


def assert_same_gradients(ours: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Each within 1e-4 of its norm; what is zero but for rounding (a router that picks one expert and
    normalises its weight to 1) within 1e-6 of the largest norm."""
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert all(grad is not None for grad in theirs.values())
    rounding = 1e-6 * max(grad.norm() for grad in theirs.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        g, h = parameter.grad, theirs[name]
        assert h is not None and g is not None, name
        assert (g - h).norm() <= max(1e-4 * h.norm(), rounding), name


MANY = [*range(16), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(16, 200))]


@pytest.mark.parametrize("seed", MANY)
def test_v3_logits_and_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    fields = random_fields(random.Random(seed))
    twin = v3_twin(fields)
    ours = ours_from(twin, fields)
    tokens = tokens_of(seed)
    expected = twin(tokens, use_cache=False).logits
    found = ours(tokens).logits
    assert (found - expected).abs().max() <= TOLERANCE
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert_same_gradients(ours, twin)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("seed", range(3))
def test_v2_logits_and_gradients(seed: int, method: str) -> None:
    torch.manual_seed(seed)
    fields = random_fields(random.Random(seed + 100))
    fields |= {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False}
    twin = v2_twin(fields)
    ours = ours_from(twin, fields)
    tokens = tokens_of(seed)
    expected, found = twin(tokens, use_cache=False).logits, ours(tokens).logits
    assert (found - expected).abs().max() <= TOLERANCE
    expected.square().sum().backward()
    found.square().sum().backward()
    assert_same_gradients(ours, twin)


@pytest.mark.parametrize("seed", range(4))
def test_left_padding(seed: int) -> None:
    torch.manual_seed(seed)
    fields = random_fields(random.Random(seed + 50))
    twin = v3_twin(fields)
    ours = ours_from(twin, fields)
    tokens, mask = tokens_of(seed), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :11] = 0
    expected = twin(tokens, attention_mask=mask, use_cache=False).logits
    found = ours(tokens, attention_mask=mask).logits
    real = mask.bool()
    assert (found - expected)[real].abs().max() <= TOLERANCE
    alone = ours(tokens[:1, 11:]).logits
    assert (found[:1, 11:] - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_layouts(interleave: bool) -> None:
    torch.manual_seed(1)
    fields = {"num_nextn_predict_layers": 0, "rope_interleave": interleave}
    twin = v3_twin(fields)
    tokens = tokens_of(3)
    found = ours_from(twin, fields)(tokens).logits
    assert (found - twin(tokens, use_cache=False).logits).abs().max() <= TOLERANCE


def test_router_equals_transformers_at_the_v3_shape() -> None:
    torch.manual_seed(0)
    config = fathom.ModelConfig()
    shape = {name: getattr(config, name) for name in ("n_group", "topk_group", "hidden_size")}
    hf_config = hf_v3.DeepseekV3Config(**shape)
    gate = hf_v3.DeepseekV3TopkRouter(hf_config)
    torch.nn.init.normal_(gate.weight, 0, 0.02)
    gate.e_score_correction_bias.normal_(-1.0, 0.5)
    x = torch.randn(64, config.hidden_size)
    logits, weights, indices = gate(x)
    ours_indices, ours_weights = fathom.route(logits, gate.e_score_correction_bias, config)
    order, ours_order = indices.argsort(-1), ours_indices.argsort(-1)
    assert torch.equal(indices.gather(1, order), ours_indices.gather(1, ours_order))
    gathered = ours_weights.gather(1, ours_order)
    torch.testing.assert_close(gathered, weights.gather(1, order), atol=1e-6, rtol=1e-6)
    assert all(len(set(row)) <= 4 for row in (ours_indices // 32).tolist())
    torch.testing.assert_close(ours_weights.sum(-1), torch.full((64,), 2.5))
