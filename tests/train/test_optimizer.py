"""AdamW as configured: what decays, what is clipped, and a state that can be put back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fathom.errors import RecipeError
from fathom.parallel import Group
from fathom.parallel.pieces import Named, Piece, optimizer_shards
from fathom.train.optimizer import (
    OptimConfig,
    build_adamw,
    clip,
    set_learning_rate,
)
from tests.model.tiny import tiny_model


class Toy(nn.Module):
    """A matrix, a stack of matrices and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((2, 3), 2.0))
        self.experts = nn.Parameter(torch.full((2, 2, 2), 2.0))
        self.norm = nn.Parameter(torch.full((3,), 2.0))


def test_matrices_decay_and_norms_do_not() -> None:
    toy = Toy()
    optimizer = build_adamw(toy, OptimConfig(weight_decay=0.1))
    for parameter in toy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    assert toy.matrix.unique().item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
    assert toy.experts.unique().item() == pytest.approx(2.0 * (1 - 0.5 * 0.1))
    assert toy.norm.unique().item() == 2.0


def test_every_parameter_of_a_model_has_its_place_and_the_router_bias_none() -> None:
    model = tiny_model()
    groups = build_adamw(model, OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    spared = {id(p) for p in groups[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    assert names == {name for name, _ in model.named_parameters() if "norm" in name}


def test_one_step_is_the_formula() -> None:
    toy = Toy()
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.0)
    optimizer = build_adamw(toy, config)
    set_learning_rate(optimizer, 0.25)
    expected = torch.full((3,), 2.0)
    first = second = torch.zeros(3)
    for n, slope in enumerate((0.5, -2.0), start=1):
        for parameter in toy.parameters():
            parameter.grad = torch.full_like(parameter, slope)
        optimizer.step()
        first = 0.8 * first + 0.2 * slope
        second = 0.9 * second + 0.1 * slope**2
        ahead = first / (1 - 0.8**n) / ((second / (1 - 0.9**n)).sqrt() + 1e-3)
        expected = expected - 0.25 * ahead
    torch.testing.assert_close(toy.norm.detach(), expected)


def test_clip_tells_the_norm_before_and_leaves_short_gradients_alone() -> None:
    toy = Toy()
    toy.matrix.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    toy.norm.grad = torch.tensor([0.0, 4.0, 0.0])
    assert clip(toy, 10.0).item() == pytest.approx(5.0)
    assert toy.norm.grad[1].item() == 4.0
    assert clip(toy, 1.0).item() == pytest.approx(5.0)
    assert toy.matrix.grad[0, 0].item() == pytest.approx(0.6, rel=1e-5)
    assert toy.norm.grad[1].item() == pytest.approx(0.8, rel=1e-5)
    toy.norm.grad[0] = float("inf")
    assert clip(toy, 1.0).item() == float("inf")


def state_of(toy: Toy, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    alone = Group((0,), 0)
    pieces = [Piece(Named(name, p, alone, p.shape, 0), p) for name, p in toy.named_parameters()]
    return {shard.name: shard.tensor for shard in optimizer_shards(pieces, optimizer, True)}


def test_state_is_complete_by_name_and_live() -> None:
    """A parameter that never had a gradient counts no updates, also after its state was asked for."""
    toy = Toy()
    optimizer = build_adamw(toy, OptimConfig())
    set_learning_rate(optimizer, 0.1)
    toy.matrix.grad = torch.ones_like(toy.matrix)
    optimizer.step()
    tensors = state_of(toy, optimizer)
    names = [name for name, _ in toy.named_parameters()]
    assert set(tensors) == {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in names}
    assert tensors["step.matrix"].item() == 1 and tensors["step.norm"].item() == 0
    optimizer.step()
    assert tensors["step.matrix"].item() == 2, "not the optimiser's own tensors"
    assert state_of(toy, optimizer)["step.norm"].item() == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("clip_norm", 0.0), ("weight_decay", -1.0)],
)
def test_impossible_settings_are_refused(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"optim.{key} = {value}"):
        dataclasses.replace(OptimConfig(), **{key: value})
