"""Settings for all tests: one thread (small products are slower on two) and a fixed seed each."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
