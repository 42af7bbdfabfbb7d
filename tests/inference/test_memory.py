"""The memory an engine is granted is enough for its work, and sizes read as people write them."""

from __future__ import annotations

import pytest
import torch

from fathom.errors import GenerationError
from fathom.inference import Engine, Sampling, pages
from fathom.inference.few import MOST_ROWS
from fathom.inference.memory import bytes_of, bytes_of_a_pass
from tests.live_memory import live
from tests.model.tiny import tiny_model


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (7, 7),
        ("7", 7),
        ("4GiB", 4 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512mib", 512 << 20),
        ("2M", 2 << 20),
    ],
)
def test_sizes(size: int | str, found: int) -> None:
    assert bytes_of(size) == found


@pytest.mark.parametrize("size", ["", "GiB", "4 Gib s", "1.2.3MB", "-1GB", True])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(GenerationError, match="is not a size"):
        bytes_of(size)


def test_too_little_is_told_with_what_would_do() -> None:
    model = tiny_model().eval()
    with pytest.raises(GenerationError, match=r"give at least [0-9,]+") as told:
        Engine(model, max_memory="1MiB")
    least = int(
        str(told.value)
        .split("give at least ")[1]
        .split(",  or")[0]
        .split(", or")[0]
        .replace(",", "")
    )
    assert Engine(model, max_memory=least).pool.count == 2


@pytest.mark.parametrize("tokens", [64, 500])
@pytest.mark.parametrize(
    "wish", [Sampling(0.0, max_new_tokens=3), Sampling(1.0, top_p=0.9, max_new_tokens=3)]
)
def test_a_pass_takes_no_more_than_was_reckoned(tokens: int, wish: Sampling) -> None:
    """Counted at the dispatcher: tensors alive at a time beside the cache and the weights."""
    model = tiny_model(hidden_size=64, vocab_size=3000, max_position_embeddings=1024).eval()
    engine = Engine(model, max_requests=8, batch_tokens=tokens, always_speculate=True)
    prompts = [[2 + (k + i) % 2900 for i in range(90)] for k in range(8)]
    rows = 8 * 2
    reckoned = bytes_of_a_pass(model.config, tokens + rows, torch.float32, rows)
    taken = live(lambda: list(engine.generate(prompts, wish))).peak
    seldom = 15 if tokens > MOST_ROWS else 80  # the dispatcher does not see what C++ holds
    assert reckoned / seldom < taken <= reckoned


def test_no_more_is_expanded_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is read by absorbing where expanding it would take too much, and says the same."""
    model = tiny_model(max_position_embeddings=1024).eval()
    prompt = [[2 + i % 97 for i in range(600)]]
    wish = Sampling(0.0, max_new_tokens=4, ignore_eos=True)
    expected = next(Engine(model, batch_tokens=200).generate(prompt, wish))
    monkeypatch.setattr(pages, "EXPANDED", 250 * 4 * (16 + 4 + 16))
    assert not pages.absorbing_pays(model.config, 200, 200)
    assert pages.absorbing_pays(model.config, 200, 400)
    found = next(Engine(model, batch_tokens=200).generate(prompt, wish))
    assert found.token_ids == expected.token_ids
