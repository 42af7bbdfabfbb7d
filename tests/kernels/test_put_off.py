"""Weight gradients put off: the same numbers, later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fathom import kernels
from fathom.kernels.put_off import PutOff, run_tasks

COUNTS = torch.tensor([2, 0, 3])


def dense(x: Tensor, weight: Tensor, put_off: PutOff | None) -> Tensor:
    return kernels.linear(x, weight, put_off=put_off)


def grouped(x: Tensor, weight: Tensor, put_off: PutOff | None) -> Tensor:
    return kernels.grouped_linear(x, weight, COUNTS, put_off=put_off)


PRODUCTS = [(dense, (6, 4)), (grouped, (3, 6, 4))]


def operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x, weight = torch.randn(5, 4).double(), torch.randn(shape).double()
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize(("product", "shape"), PRODUCTS)
def test_the_gradient_of_the_weight_comes_with_its_task(
    product: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    x, weight = operands(shape)
    product(x, weight, None).square().sum().backward()
    of_x, of_weight = x.grad, weight.grad
    put_off = PutOff()
    x, weight = operands(shape)
    with put_off.collecting() as tasks:
        product(x, weight, put_off).square().sum().backward()
    assert torch.equal(x.grad, of_x) and weight.grad is None  # type: ignore[arg-type]
    assert [one for one, _ in tasks] == [weight]
    run_tasks(tasks)
    assert torch.equal(weight.grad, of_weight) and not tasks  # type: ignore[arg-type]


def test_a_second_task_adds_to_what_is_there() -> None:
    put_off = PutOff()
    x, weight = operands((6, 4))
    with put_off.collecting() as tasks:
        for _ in range(2):
            dense(x, weight, put_off).sum().backward()
    run_tasks(tasks)
    assert torch.equal(weight.grad, 2 * x.detach().sum(0).expand(6, 4))  # type: ignore[arg-type]


def test_outside_of_collecting_nothing_is_put_off() -> None:
    x, weight = operands((6, 4))
    put_off = PutOff()
    with pytest.raises(ZeroDivisionError), put_off.collecting():
        raise ZeroDivisionError
    dense(x, weight, put_off).sum().backward()
    assert weight.grad is not None
