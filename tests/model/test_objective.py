"""Where the objective's tensors are; that its numbers are right is in test_mtp.py and test_moe.py."""

from __future__ import annotations

import torch

from fathom.model.objective import Rows
from tests.model.tiny import tiny_model


def test_document_ids_go_where_the_tokens_are() -> None:
    """Loaders give both on the CPU, and only tokens are moved to the model's device."""
    ids = torch.arange(9).repeat(2, 1) // 4
    rows = Rows.of(torch.zeros(2, 9, dtype=torch.long, device="meta"), ids)
    assert rows.ids is not None and rows.ids.device.type == "meta"
    assert rows.targets.device.type == "meta"


def test_the_loads_of_no_block_are_on_the_models_device() -> None:
    """A pipeline's stage without experts adds them to the loads of the others."""
    model = tiny_model(0).to("meta")
    loads = torch.zeros(2, model.config.n_routed_experts, dtype=torch.int64, device="meta")
    loads[[]] += model.stack_loads([])
    assert model.stack_loads([]).device == loads.device
