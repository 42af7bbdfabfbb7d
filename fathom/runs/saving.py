"""What a checkpoint of a run holds, and how a run is put back into exactly that state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.train.checkpoint import Report, newest_good, read_state, read_tensors, save_checkpoint
from fathom.train.loop import Trainer
from fathom.train.optimizer import optimizer_tensors, set_optimizer_step


def run_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Masters, router biases, moments and the random state, by name. They are the live tensors."""
    tensors = {f"model.{name}": t for name, t in _weights(trainer).items()}
    optimizer = optimizer_tensors(trainer.model, trainer.optimizer)
    tensors |= {f"optimizer.{name}": t for name, t in optimizer.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    """The model's tensors, a tied head once."""
    state = dict(trainer.model.state_dict())
    if trainer.model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save_run(trainer: Trainer, directory: Path, keep: int) -> Path:
    """Write a checkpoint of the whole run at its present step."""
    state: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens}
    return save_checkpoint(directory, trainer.step, run_tensors(trainer), state, keep)


def resume_run(trainer: Trainer, directory: Path, report: Report) -> bool:
    """Put the trainer into the state of the newest good checkpoint; False when there is none."""
    folder = newest_good(directory, report)
    if folder is None:
        return False
    state = read_state(folder)
    tensors = run_tensors(trainer)
    read_tensors(folder, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    trainer.step, trainer.tokens = state["step"], state["tokens"]
    set_optimizer_step(trainer.optimizer, trainer.step)
    return True
