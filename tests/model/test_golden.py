"""The golden checks of the architecture: counted, computed by hand, or from outside files."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

import fathom
from fathom.interop.config_json import from_json
from fathom.model.rope import (
    RotaryTable,
    correction_range,
    inverse_frequencies,
    magnitude,
    mscale,
    softmax_scale,
)
from fathom.model.router import sequence_balance_loss
from tests.shared_data import shared_data

YARN_671B = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_parameters_of_the_671b_model() -> None:
    started = time.perf_counter()
    with torch.device("meta"):
        main = fathom.Transformer(fathom.ModelConfig(num_nextn_predict_layers=0))
        whole = fathom.Transformer(fathom.ModelConfig())
    assert main.num_parameters() == 671_026_404_352
    biases = [router.e_score_correction_bias for router in main.routers()]
    assert sum(bias.numel() for bias in biases if bias is not None) == 14_848
    mtp = whole.num_parameters() - main.num_parameters()
    assert round(mtp / 1e9, 3) == 11.610
    duplicated = 2 * 129280 * 7168
    assert round((whole.num_parameters() + duplicated) / 1e9, 2) == 684.49
    assert time.perf_counter() - started < 60


def test_cache_of_the_671b_model() -> None:
    cache = fathom.LatentCache(fathom.ModelConfig(), 1, 1, torch.bfloat16, "meta")
    assert {tensor.shape[-1] for tensor in cache.tensors} == {576}
    assert sum(tensor.nbytes for tensor in cache.tensors) == 70_272  # there is one token


def test_yarn_at_the_released_settings() -> None:
    config = fathom.ModelConfig(rope_scaling=YARN_671B)
    assert correction_range(64, 10000.0, 4096, 32, 1) == (10, 23)
    assert mscale(40) == pytest.approx(1.368888, abs=1e-6)
    assert softmax_scale(fathom.ModelConfig()) == pytest.approx(0.0721688, abs=1e-7)
    assert softmax_scale(config) == pytest.approx(0.1352338, abs=1e-7)
    assert magnitude(config) == 1.0
    plain, stretched = inverse_frequencies(fathom.ModelConfig()), inverse_frequencies(config)
    assert torch.equal(stretched[:11], plain[:11])
    torch.testing.assert_close(stretched[23:], plain[23:] / 40)
    blend = (15 - 10) / (23 - 10)
    expected = plain[15] / 40 * blend + plain[15] * (1 - blend)
    torch.testing.assert_close(stretched[15], expected)


def test_yarn_against_the_released_code() -> None:
    golden = json.loads(shared_data("golden/yarn_v3_671b.json").read_text())
    config = fathom.ModelConfig(rope_scaling=YARN_671B, max_position_embeddings=163840)
    theirs = torch.tensor(golden["inv_freq"], dtype=torch.float32)
    torch.testing.assert_close(inverse_frequencies(config), theirs, rtol=1e-6, atol=0)


def test_plain_rope_turns_pairs() -> None:
    config = fathom.ModelConfig(qk_rope_head_dim=4)
    rotation = RotaryTable(config).at(torch.tensor([[3]]))
    angles = [3.0, 3.0 / 100.0]
    expected = torch.tensor([math.cos(a) for a in angles])
    torch.testing.assert_close(rotation.cos.flatten(), expected)


def test_balance_loss_is_alpha_when_even() -> None:
    scores = torch.full((1, 8, 4), 0.1)
    for position in range(8):
        scores[0, position, [position % 4, (position + 1) % 4]] = 0.9
    assert sequence_balance_loss(scores, 2, 1e-4).item() == pytest.approx(1e-4, rel=1e-5)


def test_balance_loss_against_two_lines() -> None:
    torch.manual_seed(0)
    B, T, E, K, alpha = 3, 11, 8, 3, 0.01
    scores = torch.rand(B, T, E)
    expected = []
    for s in scores:
        f = torch.bincount(s.topk(K).indices.flatten(), minlength=E) * E / (K * T)
        expected.append(alpha * (f * (s / s.sum(-1, keepdim=True)).mean(0)).sum())
    found = sequence_balance_loss(scores, K, alpha)
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("name", ["base", "yarn", "noqlora"])
def test_tiny_reference_files(name: str) -> None:
    """Logits, loss, gradients and greedy text made by three independent implementations."""
    golden = np.load(shared_data(f"golden/tiny_v3_{name}.npz"))
    model = golden_model(golden)
    tokens = torch.from_numpy(golden["ref.input_ids"]).long()
    logits = model(tokens).logits
    assert (logits - torch.from_numpy(golden["ref.logits"])).abs().max() <= 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(golden["ref.loss"]), abs=1e-5)
    chunked = fathom.losses(model, tokens, mtp_weight=0, balance_alpha=0).total
    assert chunked.item() == pytest.approx(float(golden["ref.loss"]), abs=1e-5)
    chunked.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    checked = [n for n in norms if f"ref.gradnorm.{n}" in golden.files]
    assert len(checked) > 20
    for parameter in checked:
        expected = float(golden[f"ref.gradnorm.{parameter}"])
        assert norms[parameter] == pytest.approx(expected, rel=1e-4, abs=1e-7), parameter


def golden_model(golden) -> fathom.Transformer:  # type: ignore[no-untyped-def]
    """A model holding the file's weights, experts stacked."""
    config = from_json(json.loads(bytes(golden["config"]).decode()))
    model = fathom.Transformer(config.replace(num_nextn_predict_layers=0))
    state = {}
    for name in model.state_dict():
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            state[name] = torch.from_numpy(golden[f"w.{name}"])
            continue
        prefix, kind = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        stacked = [
            np.concatenate([golden[f"w.{prefix}.{e}.{part}.weight"] for part in parts])
            for e in range(config.n_routed_experts)
        ]
        state[name] = torch.from_numpy(np.stack(stacked))
    model.load_state_dict(state)
    return model


def test_router_against_the_released_gate() -> None:
    golden = np.load(shared_data("golden/router_v3_256e.npz"))
    logits = torch.from_numpy(golden["x"]) @ torch.from_numpy(golden["w"]).T
    indices, weights = fathom.route(logits, torch.from_numpy(golden["bias"]), fathom.ModelConfig())
    order = indices.argsort(-1)
    assert torch.equal(indices.gather(1, order), torch.from_numpy(golden["idx_sorted"]).long())
    expected = torch.from_numpy(golden["weight_sorted"])
    torch.testing.assert_close(weights.gather(1, order), expected, atol=1e-6, rtol=1e-5)
