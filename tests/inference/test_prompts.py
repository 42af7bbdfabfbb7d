"""What may be asked, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fathom.errors import GenerationError
from fathom.inference import Engine, Sampling
from tests.model.tiny import tiny_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model().eval())


@pytest.mark.parametrize("prompt", [(5, 6, 7), torch.tensor([5, 6, 7]), np.array([5, 6, 7])])
def test_ids_come_in_many_forms(engine: Engine, prompt: Any) -> None:
    wish = Sampling(0.0, max_new_tokens=5)
    expected = next(engine.generate([[5, 6, 7]], wish)).token_ids
    assert next(engine.generate([prompt], wish)).token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"abc", "a prompt of bytes is none"),
        ([1.0, 2.0], "a prompt of list with float is none"),
        (torch.tensor([[1, 2]]), "a prompt of list with list is none"),
        ([], "the prompt is empty"),
        ([5, 10**6], "token id 1000000 is outside"),
        ("text", "there is no tokenizer"),
    ],
)
def test_what_is_no_prompt(engine: Engine, prompt: Any, said: str) -> None:
    with pytest.raises(GenerationError, match=said):
        list(engine.generate([prompt]))


@pytest.mark.parametrize("drafts", [True, 1.5, -1, "2"])
def test_drafts_are_a_whole_number(drafts: Any) -> None:
    with pytest.raises(GenerationError, match="must be a whole number of drafts"):
        Engine(tiny_model().eval(), speculate=drafts)
