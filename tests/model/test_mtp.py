"""Multi-token prediction (report §2.2, eqs 21-25): composition, targets, no copying, settings."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.modeling_layers import MtpModel

import fathom
from tests.model.tiny import tiny_config, tiny_model, v3_twin


def random_tokens(batch: int, length: int, vocab: int = 101, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, length), generator=generator)


def their_names(name: str) -> str:
    """Our name inside an MTP module -> the one of `transformers`' MtpLayer."""
    if name == "shared_head.norm.weight":
        return "post_norm.weight"
    own = name.startswith(("enorm", "hnorm", "eh_proj"))
    return name if own else f"mtp_block.{name}"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_logits_equal_the_composition_of_transformers(depth: int) -> None:
    torch.manual_seed(depth)
    twin = v3_twin({"num_nextn_predict_layers": depth})
    ours = tiny_model(depth, num_nextn_predict_layers=depth)
    ours.load_state_dict(twin.state_dict(), strict=False)
    theirs = MtpModel(twin, depth).eval()
    for module, layer in zip(ours.model.mtp, theirs.layers, strict=True):
        layer.load_state_dict({their_names(n): t for n, t in module.state_dict().items()})
    tokens = random_tokens(1, 24)
    found = ours(tokens).mtp_logits
    hidden = twin.model(tokens, use_cache=False).last_hidden_state
    for k in range(depth):
        positions = torch.arange(hidden.shape[1] - 1)[None]
        following = tokens[:, k + 1 :]
        hidden = theirs.forward_layer(k, hidden[:, :-1], positions, None, input_ids=following)
        expected = theirs._project_to_logits(hidden)
        assert found[k].shape == expected.shape == (1, 24 - k - 1, 101)
        assert (found[k] - expected).abs().max() <= 1e-5


def test_loss_is_equation_24() -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    tokens = random_tokens(3, 21)
    losses = fathom.losses(model, tokens, mtp_weight=0.3, balance_alpha=0.0)
    logits = model(tokens[:, :-1]).mtp_logits
    T = 20
    for k, found in enumerate(losses.mtp_by_depth, start=1):
        log_p = logits[k - 1].log_softmax(-1)
        terms = log_p.gather(-1, tokens[:, k + 1 :, None])
        assert terms.shape[1] == T - k
        torch.testing.assert_close(found, -terms.sum() / (3 * T))
    mean = sum(losses.mtp_by_depth) / 2
    torch.testing.assert_close(losses.total, losses.main + 0.3 * mean)


def test_cannot_copy_its_target() -> None:
    """On random tokens nothing can be learnt: the loss of every depth stays near ln V."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=32, num_nextn_predict_layers=2, initializer_range=0.05)
    model = fathom.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        losses = fathom.losses(model, random_tokens(8, 33, 32, seed=step))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    chance = math.log(32)
    for depth, loss in enumerate(losses.mtp_by_depth, start=1):
        assert loss.item() > 0.95 * chance * (32 - depth) / 32


def test_a_copying_head_would_be_caught() -> None:
    """The test above can fail: a head that predicts the token it was given learns it at once."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=32, initializer_range=0.05)
    model = fathom.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        tokens = random_tokens(8, 33, 32, seed=step)
        logits = model(tokens).mtp_logits[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 * math.log(32)


def test_order_of_concatenation_is_a_permutation_of_columns() -> None:
    released = tiny_model()
    printed = tiny_model(mtp_concat_order="hidden_first")
    printed.load_state_dict(released.state_dict())
    D = released.config.hidden_size
    with torch.no_grad():
        weight = printed.model.mtp[0].eh_proj.weight
        weight.copy_(torch.cat((weight[:, D:], weight[:, :D]), dim=1))
    tokens = random_tokens(2, 12)
    expected = released(tokens).mtp_logits[0]
    torch.testing.assert_close(printed(tokens).mtp_logits[0], expected, atol=1e-5, rtol=1e-5)


def test_pre_norm_state_is_another_model() -> None:
    post = tiny_model()
    pre = tiny_model(mtp_hidden="pre_norm")
    pre.load_state_dict(copy.deepcopy(post.state_dict()))
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(pre(tokens).logits, post(tokens).logits)
    assert (pre(tokens).mtp_logits[0] - post(tokens).mtp_logits[0]).abs().max() > 1e-2


def test_targets_stay_inside_documents() -> None:
    """With document ids, two packed documents give the losses of each alone, MTP included."""
    model = tiny_model(num_nextn_predict_layers=2)
    first, second = random_tokens(1, 9, seed=1), random_tokens(1, 14, seed=2)
    packed = torch.cat((first, second), dim=1)
    ids = torch.tensor([[0] * 9 + [1] * 14])
    both = fathom.losses(model, packed, ids, balance_alpha=0)
    alone = [fathom.losses(model, t, balance_alpha=0) for t in (first, second)]
    targets = [8, 13]
    for pick in (lambda x: x.main, lambda x: x.mtp_by_depth[0], lambda x: x.mtp_by_depth[1]):
        expected = sum(pick(x) * n for x, n in zip(alone, targets, strict=True)) / sum(targets)
        torch.testing.assert_close(pick(both), expected, atol=1e-5, rtol=1e-5)
