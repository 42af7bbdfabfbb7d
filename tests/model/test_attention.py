"""MLA: absorbed equals expanded, cache in any chunks, documents isolated, recomputation exact."""

from __future__ import annotations

import gc
import random

import pytest
import torch

import fathom
from fathom.kernels.recompute import Remade
from tests.model.tiny import YARN, random_fields, tiny_config, tiny_model


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(8))
def test_absorbed_equals_expanded(seed: int) -> None:
    """Tokens fed to a cache in random chunks give the logits of one whole pass."""
    rng = random.Random(seed)
    model = tiny_model(seed, **random_fields(rng)).eval()
    tokens = random_tokens(2, 40, seed)
    with torch.inference_mode():
        whole = model(tokens).logits
        cache, parts, at = fathom.LatentCache(model.config, 2, 40), [], 0
        while at < 40:
            step = min(rng.choice((1, 1, 2, 7, 13)), 40 - at)
            parts.append(model(tokens[:, at : at + step], cache=cache).logits)
            at += step
    assert cache.length == 40
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-5


def test_padded_batch_decodes_like_its_rows() -> None:
    model = tiny_model(rope_scaling=YARN).eval()
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    with torch.inference_mode():
        alone = model(tokens[:1, 6:]).logits
        cache = fathom.LatentCache(model.config, 2, 20)
        parts = [model(tokens[:, :15], attention_mask=mask[:, :15], cache=cache).logits]
        for i in range(15, 20):
            step = tokens[:, i : i + 1]
            parts.append(model(step, attention_mask=mask[:, : i + 1], cache=cache).logits)
    assert (torch.cat(parts, dim=1)[:1, 6:] - alone).abs().max() <= 1e-5


def test_cache_forgets_what_is_truncated() -> None:
    model = tiny_model().eval()
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        cache = fathom.LatentCache(model.config, 1, 20)
        model(tokens[:, :15], cache=cache)
        cache.truncate(10)
        found = model(tokens[:, 10:], cache=cache).logits
        assert (found - model(tokens).logits[:, 10:]).abs().max() <= 1e-5


def test_cache_refuses_overflow() -> None:
    model = tiny_model()
    cache = fathom.LatentCache(model.config, 1, 4)
    with pytest.raises(fathom.FathomError, match="room for 4 tokens, 5 are needed"):
        model(random_tokens(1, 5), cache=cache)


def test_context_longer_than_the_model() -> None:
    with pytest.raises(fathom.FathomError, match="129 tokens exceeds max_position_embeddings=128"):
        tiny_model()(random_tokens(1, 129))


def test_documents_do_not_see_each_other() -> None:
    model = tiny_model()
    tokens = random_tokens(2, 30)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    ids[0, 11:] = 1
    ids[1, 5:] = 1
    ids[1, 25:] = 2
    found = model(tokens, document_ids=ids).logits
    for row, lo, hi in ((0, 0, 11), (0, 11, 30), (1, 0, 5), (1, 5, 25), (1, 25, 30)):
        alone = model(tokens[row : row + 1, lo:hi]).logits
        assert (found[row : row + 1, lo:hi] - alone).abs().max() <= 1e-5


def test_long_documents_take_the_flash_path() -> None:
    model = tiny_model(num_hidden_layers=2, max_position_embeddings=4096)
    tokens = random_tokens(1, 1400)
    ids = torch.zeros(1, 1400, dtype=torch.int64)
    ids[0, 1100:] = 1
    with torch.no_grad():
        found = model(tokens, document_ids=ids, mtp=False).logits
        alone = model(tokens[:, 1100:], mtp=False).logits
    assert (found[:, 1100:] - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("length", [33, 1100])
def test_recomputation_changes_no_gradient(length: int) -> None:
    """Same loss, same gradients, and the router counts every token once."""
    made = []
    original = Remade.get

    def counting(self: Remade) -> torch.Tensor:
        made.append(self)
        return original(self)

    model = tiny_model(max_position_embeddings=2048)
    tokens = random_tokens(1, length)
    grads = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        Remade.get = counting  # type: ignore[method-assign]
        try:
            losses = fathom.losses(model, tokens)
            losses.total.backward()
        finally:
            Remade.get = original  # type: ignore[method-assign]
        load = torch.stack([router.expert_load for router in model.routers()])
        per_block = (length - 1) * 2, (length - 2) * 2
        assert load.sum(-1).tolist() == [per_block[0], per_block[0], per_block[1]]
        assert torch.equal(load, losses.expert_load)
        fathom.update_bias(model, 0.0)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert bool(made) is recompute
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_bf16_products_with_float32_masters() -> None:
    model = tiny_model()
    tokens = random_tokens(2, 33)
    exact = fathom.losses(model, tokens).total.item()
    model.set_compute_dtype(torch.bfloat16)
    losses = fathom.losses(model, tokens)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(exact, rel=0.05)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_matmul_seam() -> None:
    """Replacing `matmul` reaches every product but the router's."""
    model = tiny_model(tiny_config().q_lora_rank or 0)
    seen = []
    for module in model.modules():
        if hasattr(module, "matmul"):
            inner = module.matmul

            def spy(*arguments, inner=inner):  # type: ignore[no-untyped-def]
                seen.append(arguments[1].shape)
                return inner(*arguments)

            module.matmul = spy
    model(random_tokens(1, 8))
    attention, dense, moe = 5, 3, 2 + 3
    assert len(seen) == 4 * attention + dense + 3 * moe + 1 + 2


def test_recomputation_keeps_less() -> None:
    """What a loss holds for its backward pass: no norm output, no up-projection, no SwiGLU output."""
    kept = []
    for recompute in (False, True):
        model = tiny_model(num_nextn_predict_layers=0)
        model.set_recompute(recompute)
        tokens = random_tokens(2, 65)
        before = live_numbers()
        loss = fathom.losses(model, tokens)
        kept.append(live_numbers() - before)
        assert loss.total.requires_grad
    assert kept[1] < 0.75 * kept[0]


def live_numbers() -> int:
    """Numbers in all tensor storages that are alive."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        for tensor in saved_of(thing):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def saved_of(thing: object) -> list[torch.Tensor]:
    if isinstance(thing, torch.autograd.function.BackwardCFunction):
        try:
            return [tensor for tensor in thing.saved_tensors if tensor is not None]
        except RuntimeError:
            return []
    return [thing] if type(thing) is torch.Tensor else []


def test_documents_with_padding_and_ids_that_return() -> None:
    """A document is a run of equal ids, with a padding mask and without."""
    model = tiny_model()
    tokens = random_tokens(1, 17)
    ids = torch.tensor([[0] * 5 + [1] * 5 + [0] * 7])
    plain = model(tokens, document_ids=ids)
    masked = model(tokens, attention_mask=torch.ones(1, 17), document_ids=ids)
    assert (plain.logits - masked.logits).abs().max() <= 1e-5
    alternating = torch.arange(17)[None] % 2
    assert fathom.losses(model, tokens, alternating).mtp.item() == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"document_ids": torch.zeros(1, 20)}, "one id for each token"),
        ({"document_ids": torch.zeros(3, 19)}, "one id for each token"),
        ({"attention_mask": torch.ones(1, 20)}, "does not cover 3 rows"),
        ({"positions": torch.zeros(3, 7)}, "do not fit tokens"),
    ],
)
def test_arguments_of_the_wrong_shape(arguments: dict, message: str) -> None:
    with pytest.raises(fathom.FathomError, match=message):
        tiny_model()(random_tokens(3, 20), **arguments)


def test_nothing_to_read_and_nothing_to_predict() -> None:
    with pytest.raises(fathom.FathomError, match="T >= 1"):
        tiny_model()(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(fathom.FathomError, match="no input and target"):
        fathom.losses(tiny_model(), random_tokens(1, 1))


def test_training_after_inference() -> None:
    model = tiny_model()
    with torch.inference_mode():
        model(random_tokens(1, 9))
    fathom.losses(model, random_tokens(1, 9)).total.backward()
    assert model.lm_head.weight.grad is not None


def test_a_model_made_on_meta_can_be_filled() -> None:
    with torch.device("meta"):
        model = fathom.Transformer(tiny_config(tie_word_embeddings=True))
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(not buffer.any() for buffer in model.buffers())


def test_float64_attends_like_float32() -> None:
    model = tiny_model(max_position_embeddings=2048)
    tokens = random_tokens(1, 1100)
    single = model(tokens, mtp=False).logits
    double = model.double()(tokens, mtp=False).logits
    double.sum().backward()
    assert double.dtype == torch.float64 and (double - single).abs().max() <= 1e-5
