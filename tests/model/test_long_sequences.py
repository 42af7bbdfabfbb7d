"""Memory of long sequences: in proportion to the length, without T x T masks or whole logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

import fathom
from fathom.kernels import attention, cross_entropy
from fathom.model.context import padded_segments
from fathom.train.positions import loss_by_position
from tests.live_memory import live
from tests.model.test_attention import random_tokens
from tests.model.tiny import YARN, tiny_model
from tests.train.test_evaluate import data

LENGTHS = (1024, 2048, 4096)


def long_model(**changes: object) -> fathom.Transformer:
    """Two layers, one of them MoE, and an MTP module."""
    return tiny_model(num_hidden_layers=2, max_position_embeddings=8192, **changes)


def step(model: fathom.Transformer, T: int, documents: int = 1) -> Callable[[], None]:
    """Forward and backward of one sequence."""
    tokens = random_tokens(1, T + 1)
    ids = None if documents == 1 else torch.arange(T + 1)[None] * documents // (T + 1)

    def work() -> None:
        fathom.losses(model, tokens, ids).total.backward()
        model.zero_grad()

    return work


def reading(model: fathom.Transformer, T: int) -> Callable[[], None]:
    """Half a prompt, and half of it again behind the first."""
    tokens = random_tokens(1, T)

    def work() -> None:
        cache = fathom.LatentCache(model.config, 1, T)
        with torch.no_grad():
            for half in tokens.split(T // 2, dim=1):
                model.lm_head(model.trunk(half, cache=cache, mtp=False).hidden[:, -1])

    return work


CASES: dict[str, Callable[[int], Callable[[], object]]] = {
    "a step": lambda T: step(long_model(), T),
    "a step under YaRN with recomputation": lambda T: step(recomputing(), T),
    "a long and a short document": lambda T: step(long_model(), T, documents=2),
    "many documents": lambda T: step(long_model(), T, documents=T // 100),
    "loss by position": lambda T: lambda: loss_by_position(long_model(), data(T + 1), T, T),
    "a padded batch": lambda T: padded(long_model(), T),
    "reading a prompt in two parts": lambda T: reading(long_model(), T),
}


def padded(model: fathom.Transformer, T: int) -> Callable[[], object]:
    """Two rows, one of them short."""
    tokens, mask = random_tokens(2, T), torch.ones(2, T)
    mask[0, : T // 3] = 0
    return lambda: model(tokens, attention_mask=mask)


def recomputing() -> fathom.Transformer:
    model = long_model(rope_scaling=YARN)
    model.set_recompute(True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_memory_is_in_proportion_to_the_length(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens allocate at most twice the bytes; half of them T x T would make it four times."""
    monkeypatch.setattr(attention, "SCORES", 1 << 18)
    seen = [live(CASES[case](T)) for T in LENGTHS]
    for before, after in pairwise(seen):
        assert after.peak < 2.1 * before.peak
    assert seen[-1].largest < LENGTHS[-1] ** 2 // 4, "bytes of a quarter of a bool T x T mask"


@pytest.mark.parametrize("sides", [(60, 0), (0, 60), (40, 20), (0, 0)])
def test_long_rows_with_padding_are_read_as_alone(sides: tuple[int, int]) -> None:
    model, tokens, mask = long_model(), random_tokens(2, 1100), torch.ones(2, 1100)
    begin, end = sides[0], 1100 - sides[1]
    mask[0, :begin], mask[0, end:] = 0, 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, mtp=False).logits
        for row, lo, hi in ((0, begin, end), (1, 0, 1100)):
            alone = model(tokens[row : row + 1, lo:hi], mtp=False).logits
            assert (found[row : row + 1, lo:hi] - alone).abs().max() <= 2e-5


def test_padding_in_the_middle_needs_a_mask() -> None:
    mask = torch.ones(2, 9)
    assert padded_segments(mask) == (((0, 9),), ((0, 9),))
    mask[1, :2], mask[1, 7:] = 0, 0
    assert padded_segments(mask) == (((0, 9),), ((0, 2), (2, 7), (7, 9)))
    mask[0, 4] = 0
    assert padded_segments(mask) is None


def test_whole_logits_never_exist() -> None:
    vocab, T = 20_000, 2048
    seen = live(step(long_model(vocab_size=vocab), T))
    chunk = cross_entropy.chunk_rows(vocab, on_cpu=True)
    assert chunk <= T // 8
    assert seen.largest == 4 * chunk * vocab


@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_attention_in_pieces(
    length: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few scores at a time that pieces of one, two or three queries are made."""
    model, tokens = tiny_model().eval(), random_tokens(2, 17 + length)
    mask = torch.ones(2, 17 + length, dtype=torch.int64)
    mask[0, :4] = 0

    def behind_a_context() -> torch.Tensor:
        cache = fathom.LatentCache(model.config, 2, 17 + length)
        with torch.no_grad():
            for lo, hi in ((0, 17), (17, 17 + length)):
                seen = mask[:, :hi] if masked else None
                logits = model(tokens[:, lo:hi], attention_mask=seen, cache=cache).logits
        return logits

    whole = behind_a_context()
    for queries in (1, 2, 3):
        monkeypatch.setattr(attention, "SCORES", queries * 2 * 4 * (17 + length))
        assert (behind_a_context() - whole).abs().max() <= 1e-5


def test_long_packed_documents_have_the_losses_of_each_alone() -> None:
    """Past the length at which the flash kernel takes over; MTP's targets included."""
    model = long_model(num_nextn_predict_layers=2)
    parts = [random_tokens(1, length, seed=length) for length in (1200, 300, 40)]
    ids = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)], dim=1)
    packed = fathom.losses(model, torch.cat(parts, dim=1), ids, balance_alpha=0)
    alone = [fathom.losses(model, part, balance_alpha=0) for part in parts]
    targets = np.array([part.shape[1] - 1 for part in parts])
    for name, pick in {
        "main": lambda found: found.main,
        "depth 1": lambda found: found.mtp_by_depth[0],
        "depth 2": lambda found: found.mtp_by_depth[1],
    }.items():
        expected = (targets * [pick(found).item() for found in alone]).sum() / targets.sum()
        assert pick(packed).item() == pytest.approx(expected, rel=1e-5), name


def test_another_document_changes_nothing() -> None:
    """Loss and gradient of the first document, whatever stands in the second."""
    model = long_model()
    first, ids = random_tokens(1, 1100), torch.tensor([[0] * 1100 + [1] * 60])
    found = []
    for seed in (1, 2):
        tokens = torch.cat((first, random_tokens(1, 60, seed)), dim=1)
        trunk = model.trunk(tokens, document_ids=ids)
        # An MTP position beside the border reads the next document's token and has no target.
        states = (trunk.hidden[:, :1100], trunk.mtp_hidden[0][:, :1098])
        grads = torch.autograd.grad(
            sum(s.square().sum() for s in states), list(model.parameters())[1:], allow_unused=True
        )
        found.append((*states, *(g for g in grads if g is not None)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
