"""What a checkpoint of a run holds, and how a run is put back into exactly that state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom import interop
from fathom.data.progress import Say
from fathom.data.tokenizer import Tokenizer
from fathom.errors import CheckpointError
from fathom.model import Transformer
from fathom.runs.folder import RunFolder
from fathom.train.checkpoint import newest_good, read_state, read_tensors, save_checkpoint
from fathom.train.ema import averaged
from fathom.train.loop import Trainer
from fathom.train.optimizer import optimizer_tensors


def run_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Masters, router biases, AdamW's state, the EMA and the random state, by name. They are the live tensors.

    Nothing in training draws from a GPU's generator, so that a run may go on on another device.
    """
    tensors = _weights(trainer.model)
    optimizer = optimizer_tensors(trainer.model, trainer.optimizer)
    tensors |= {f"optimizer.{name}": t for name, t in optimizer.items()}
    if trainer.ema:
        tensors |= {f"ema.{name}": t for name, t in trainer.ema.tensors().items()}
    return tensors | {"random.cpu": torch.get_rng_state()}


def _weights(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint, a tied head once."""
    return {f"model.{name}": tensor for name, tensor in averaged(model).items()}


def save_run(trainer: Trainer, directory: Path, keep: int, data: dict[str, Any]) -> Path:
    """Write a checkpoint of the whole run at its present step; `data` says what it is trained on. All ranks together.

    Raises `CheckpointError` where no rank holds all of it.
    """
    _check_whole(trainer, "a checkpoint")
    if trainer.parallel.mesh.rank:
        return directory / f"step-{trainer.step}"
    state: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens, "data": data}
    state |= {"passed_over": trainer.passed_over, "guard": trainer.guard.state()}
    state |= {"ema_updates": trainer.ema.updates} if trainer.ema else {}
    return save_checkpoint(directory, trainer.step, run_tensors(trainer), state, keep)


def export_run(trainer: Trainer, directory: Path, tokenizer: Tokenizer) -> None:
    """Write the model as a Hugging Face directory, in float32, tokenizer included. All ranks together.

    Raises `CheckpointError` where no rank holds all of it.
    """
    _check_whole(trainer, "an export")
    if not trainer.parallel.mesh.rank:
        interop.save(trainer.model, directory, tokenizer)


def _check_whole(trainer: Trainer, what: str) -> None:
    """Refuse what only a rank that holds everything can write."""
    layout = trainer.parallel.mesh.layout
    if trainer.parallel.zero1 or layout.pp > 1 or layout.ep > 1:
        raise CheckpointError(
            f"{what} of a run laid out as pp = {layout.pp}, ep = {layout.ep}, zero1 = {trainer.parallel.zero1} cannot "
            f"be written yet; set parallel.pp and parallel.ep to 1 and parallel.zero1 to false"
        )


def resume_run(trainer: Trainer, directory: Path, data: dict[str, Any], say: Say) -> bool:
    """Put the trainer into the state of the newest good checkpoint; False when there is none.

    Raises `CheckpointError` when that was trained on something else than `data`.
    """
    folder = newest_good(directory, say)
    if folder is None:
        return False
    state = read_state(folder)
    trained_on = state.get("data", data)  # a checkpoint of an earlier version does not say
    other = [key for key, value in data.items() if trained_on.get(key, value) != value]
    if other:
        raise CheckpointError(
            f"checkpoint {folder} was trained on another {' and '.join(other)} than {directory.parent / 'data'} "
            f"now holds; put the sources back as they were and remove that folder, or begin anew with --out"
        )
    tensors = run_tensors(trainer)
    read_tensors(folder, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    trainer.step, trainer.tokens = state["step"], state["tokens"]
    trainer.passed_over = state.get("passed_over") or {}
    trainer.guard.restore(state.get("guard", {}))
    if trainer.ema:
        trainer.ema.updates = state["ema_updates"]
    return True


def newest_model(run: RunFolder, say: Say, ema: bool = False) -> tuple[Transformer, Path]:
    """The model in a run's newest good checkpoint, for speaking or exporting while the run goes on.

    With `ema` it has the average of the weights. Raises `CheckpointError` when there is no checkpoint that is
    whole, or no average in it.
    """
    recipe, folder = run.read_recipe(), newest_good(run.checkpoints, say)
    if folder is None:
        raise CheckpointError(
            f"{run.checkpoints} holds no whole checkpoint; give the `fathom run` command again"
        )
    if ema and not recipe.ema.decay:
        raise CheckpointError(
            f"{run.path} kept no average of its weights (ema.decay = 0); leave --ema out, or train with "
            f"--set ema.decay=0.999 in a new run folder"
        )
    model = Transformer(recipe.model)
    kind = "ema" if ema else "model"
    read_tensors(folder, {f"{kind}.{name}": t for name, t in averaged(model).items()})
    model.set_rope_scaling(recipe.at(step=read_state(folder)["step"]).rope_scaling)
    return model, folder
