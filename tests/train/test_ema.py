"""The average of the weights: the thread computes what a plain loop would, and nothing of it is lost or leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.errors import RecipeError
from fathom.runs.saving import resume_run, save_run
from fathom.train.ema import Ema, EmaConfig, averaged
from fathom.train.loop import Trainer, train_stage
from fathom.train.optimizer import OptimConfig
from tests.train.test_loop import build, plan

STEPS = 6


def start(every: int = 1, tied: bool = False) -> Trainer:
    model = build(tie_word_embeddings=tied)
    return Trainer.start(model, OptimConfig(), ema=EmaConfig(0.6, every))


def average(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.ema
    return {name: t.clone() for name, t in trainer.ema.tensors().items()}


@pytest.mark.parametrize(("every", "tied"), [(1, False), (2, True)])
def test_the_thread_computes_what_a_plain_loop_does(every: int, tied: bool) -> None:
    """Bit for bit, over real steps that change the weights as soon as they may."""
    trainer = start(every, tied)
    reference = {name: t.clone() for name, t in averaged(trainer.model).items()}
    updates = 0

    def plainly(trainer: Trainer, record: object) -> None:
        nonlocal updates
        if trainer.step % every == 0:
            updates += 1
            decay = min(0.6**every, updates / (updates + 9))
            for name, live in averaged(trainer.model).items():
                reference[name].lerp_(live, 1 - decay)

    train_stage(trainer, plan(last=STEPS), [plainly])
    found = average(trainer)
    assert found.keys() == reference.keys()
    assert ("lm_head.weight" in found) != tied
    assert all(torch.equal(found[name], t) for name, t in reference.items())
    assert updates == STEPS // every
    moved = [name for name, t in averaged(trainer.model).items() if not torch.equal(t, found[name])]
    assert any("e_score_correction_bias" in name for name in moved) and len(moved) == len(found)


def test_the_initial_weights_are_soon_forgotten() -> None:
    """Of an average that starts as all ones and then sees zeros, 1/10! / ... is left: tiny after twenty updates."""
    model = build()
    parameters = list(model.parameters())
    torch._foreach_zero_([p.data for p in parameters])
    ema = Ema(model, EmaConfig(0.99))
    for tensor in ema.tensors().values():
        tensor.fill_(1.0)
    for step in range(1, 21):
        ema.update(step)
    left = ema.tensors()["model.embed_tokens.weight"].max().item()
    expected = 1.0
    for n in range(1, 21):
        expected *= n / (n + 9)
    assert left == pytest.approx(expected, rel=1e-4) and left < 1e-6


def test_the_model_computes_with_it_and_gets_its_weights_back() -> None:
    trainer = start()
    train_stage(trainer, plan(last=3), [])
    assert trainer.ema
    expected, live = average(trainer), {n: t.clone() for n, t in trainer.model.state_dict().items()}
    with trainer.ema.in_place_of_weights():
        inside = {name: t.clone() for name, t in averaged(trainer.model).items()}
    assert all(torch.equal(inside[name], t) for name, t in expected.items())
    assert all(torch.equal(live[name], t) for name, t in trainer.model.state_dict().items())
    after = average(trainer)
    assert all(torch.equal(after[name], t) for name, t in expected.items())


def test_restored_it_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    whole = start()
    train_stage(whole, plan(last=STEPS), [])
    first = start()
    train_stage(first, plan(last=3), [])
    save_run(first, tmp_path, 1, {})
    second = start()
    assert resume_run(second, tmp_path, {}, print)
    assert second.ema and second.ema.updates == 3
    train_stage(second, plan(last=STEPS), [])
    expected, found = average(whole), average(second)
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_what_goes_wrong_in_the_thread_is_heard_of() -> None:
    trainer = start()
    assert trainer.ema
    del trainer.ema._average["model.norm.weight"]
    trainer.ema._average["nobody"] = torch.zeros(1)
    trainer.ema.update(1)
    with pytest.raises(KeyError, match="nobody"):
        trainer.ema.wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_a_gpu_it_is_the_same() -> None:
    averages = []
    for device in ("cpu", "cuda"):
        model = build().to(device)
        ema = Ema(model, EmaConfig(0.9))
        for step in range(1, 5):
            ema.wait()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
            ema.update(step)
        averages.append(ema.tensors())
        assert all(t.device.type == "cpu" for t in ema.tensors().values())
    assert all(torch.equal(averages[1][name], t) for name, t in averages[0].items())


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (-0.1, 1), (0.9, 0)])
def test_impossible_settings_are_refused(decay: float, every: int) -> None:
    with pytest.raises(RecipeError, match=r"ema\.(decay|every) = "):
        EmaConfig(decay, every)
