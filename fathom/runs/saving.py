"""What a checkpoint of a run holds, and how a run is put back into exactly that state."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.data.progress import Say
from fathom.errors import CheckpointError
from fathom.model import Transformer
from fathom.parallel import Parallel
from fathom.parallel.pieces import Shard
from fathom.parallel.together import Together
from fathom.runs.folder import RunFolder
from fathom.train.checkpoint import (
    newest_good,
    put_in_place,
    read_state,
    read_tensors,
    remove_unfinished,
    save_checkpoint,
    size_of,
)
from fathom.train.ema import averaged
from fathom.train.loop import Trainer

RANDOM = "random.cpu"


def run_shards(trainer: Trainer) -> list[Shard]:
    """This rank's part of masters, router biases, AdamW's state, the EMA and the random state. They are live.

    Nothing in training draws from a GPU's generator, so that a run may go on on another device; nor from a rank's own
    one what others do not, so that the first rank's random state is everyone's.
    """
    parallel, live = trainer.parallel, averaged(trainer.model)
    masters = {shard.name: shard for shard in parallel.weight_shards()}
    parameters = {one.name for one in parallel.named}
    biases = {name: tensor for name, tensor in live.items() if name not in parameters}
    masters |= {shard.name: shard for shard in parallel.model_shards(biases)}
    in_order = [masters[name] for name in live if name in masters]
    shards = _called("model", in_order)
    shards += _called("optimizer", parallel.optimizer_shards(trainer.optimizer))
    if trainer.ema:
        shards += _called("ema", parallel.model_shards(trainer.ema.tensors()))
    random = torch.get_rng_state()
    return [*shards, Shard(RANDOM, random, random.shape, 0, parallel.mesh.rank == 0)]


def _called(kind: str, shards: Iterable[Shard]) -> list[Shard]:
    return [replace(shard, name=f"{kind}.{shard.name}") for shard in shards]


def _whole(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """The shards of one process in the shapes of the tensors that they are."""
    return {shard.name: shard.tensor.view(shard.shape) for shard in shards}


def save_run(
    trainer: Trainer,
    directory: Path,
    keep: int,
    data: dict[str, Any],
    asynchronous: bool = False,
) -> Path:
    """Write a checkpoint of the whole run at its present step; `data` says what it is trained on.

    All ranks together, into a directory that all see; what is written does not depend on the layout. A save that is
    `asynchronous` comes back when the state is copied to CPU memory; the next save, `resume_run` and `finish_saving`
    wait until it is on the disk. Raises `CheckpointError` on all ranks when one cannot write (of a save that is under
    way, when it is waited for), and `ParallelError` when one is lost; earlier checkpoints stay.
    """
    trainer.saving.wait()
    state: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens, "data": data}
    state |= {"passed_over": trainer.passed_over, "guard": trainer.guard.state()}
    state |= {"ema_updates": trainer.ema.updates} if trainer.ema else {}
    shards = [shard for shard in run_shards(trainer) if shard.first]
    if asynchronous:
        shards = [replace(one, tensor=one.tensor.to("cpu", copy=True)) for one in shards]
        state = copy.deepcopy(state)
    step, ranks = trainer.step, _ranks(trainer)

    def write() -> None:
        _write(directory, step, shards, state, keep, ranks)

    if asynchronous:
        trainer.saving.begin(write)
    else:
        write()
    return directory / f"step-{step}"


def finish_saving(trainer: Trainer) -> None:
    """Return once no checkpoint is being written. Raises what kept one from being written."""
    trainer.saving.wait()


def _ranks(trainer: Trainer) -> Together:
    """Those who save together; their messages must not meet the training's."""
    return Together(trainer.parallel.mesh.beside("checkpoints"))


def _write(
    directory: Path,
    step: int,
    shards: list[Shard],
    state: dict[str, Any],
    keep: int,
    ranks: Together,
) -> None:
    if ranks.group.size == 1:
        save_checkpoint(directory, step, _whole(shards), state, keep)
        return
    from fathom.train.sharded import write_shards

    def write(folder: Path) -> list[Path]:
        return write_shards(folder, shards, ranks)

    size = size_of(shard.tensor for shard in shards)
    put_in_place(directory, step, write, size, state, keep, ranks)


def resume_run(trainer: Trainer, directory: Path, data: dict[str, Any], say: Say) -> bool:
    """Put the trainer into the state of the newest good checkpoint; False when there is none.

    All ranks together; the checkpoint may be of another layout. What a killed save left is removed.
    Raises `CheckpointError` when that was trained on something else than `data` or does not fit the model.
    """
    finish_saving(trainer)
    ranks = _ranks(trainer)
    ranks.lead(lambda: remove_unfinished(directory))
    folder = newest_good(directory, say, ranks)
    if folder is None:
        return False
    state = ranks.lead(lambda: read_state(folder))
    ranks.each(lambda: _check_data(folder, state, data))
    shards = run_shards(trainer)
    ranks.each(lambda: _read(folder, shards, trainer.parallel))
    trainer.parallel.share()
    random = next(shard.tensor for shard in shards if shard.name == RANDOM)
    torch.set_rng_state(random)
    trainer.step, trainer.tokens = state["step"], state["tokens"]
    trainer.passed_over = state.get("passed_over") or {}
    trainer.guard.restore(state.get("guard", {}))
    if trainer.ema:
        trainer.ema.updates = state["ema_updates"]
    return True


def _check_data(folder: Path, state: dict[str, Any], data: dict[str, Any]) -> None:
    trained_on = state.get("data", data)  # a checkpoint of an earlier version does not say
    other = [key for key, value in data.items() if trained_on.get(key, value) != value]
    if other:
        raise CheckpointError(
            f"checkpoint {folder} was trained on another {' and '.join(other)} than {folder.parent.parent / 'data'} "
            f"now holds; put the sources back as they were and remove that folder, or begin anew with --out"
        )


def _read(folder: Path, shards: list[Shard], parallel: Parallel) -> None:
    if parallel.alone:
        read_tensors(folder, _whole(shards))
        return
    from fathom.train.sharded import read_shards

    read_shards(folder, shards)


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
