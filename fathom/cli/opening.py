"""RUN_OR_DIR: what a command that speaks opens, an exported Hugging Face directory or the run folder that holds one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fathom
from fathom.cli.options import choose_device
from fathom.data import Tokenizer
from fathom.errors import CheckpointError
from fathom.inference import Engine
from fathom.model import Transformer
from fathom.precision.storage import store_weights
from fathom.runs.folder import RunFolder
from fathom.runs.saving import newest_model
from fathom.train.checkpoint import checkpoints, step_of


@dataclass(frozen=True)
class Speaker:
    """A model that can speak: in evaluation mode, with its tokenizer and the directory both came from."""

    model: Transformer
    tokenizer: Tokenizer
    directory: Path

    def engine(
        self,
        speculate: int | None = None,
        max_memory: str = "4GiB",
        max_requests: int = 1,
        batch_tokens: int = 512,
    ) -> Engine:
        """What answers with it."""
        return Engine(
            self.model,
            self.tokenizer,
            max_memory=max_memory,
            speculate=speculate,
            max_requests=max_requests,
            batch_tokens=batch_tokens,
        )


def open_speaker(
    run_or_dir: str | Path,
    device: str,
    ema: bool = False,
    mtp: bool | None = None,
    weights: str = "float32",
) -> Speaker:
    """Load the model and tokenizer of a run folder, finished or not, or of an exported directory; `ema`: its average.

    `mtp` False leaves MTP modules out; `weights`: how they are stored (`precision.storage`).

    Raises `CheckpointError` when it holds no model, `DataError` when the tokenizer is missing.
    """
    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    model, tokenizer, origin = open_model(run_or_dir, dtype, mtp=mtp, ema=ema)
    tokenizer = tokenizer or Tokenizer.load(origin)
    model = store_weights(model.to(place, dtype).eval(), weights)
    return Speaker(model, tokenizer, origin)


def open_model(
    run_or_dir: str | Path,
    dtype: torch.dtype | None = None,
    mtp: bool | None = None,
    ema: bool = False,
) -> tuple[Transformer, Tokenizer | None, Path]:
    """Model, tokenizer if there is one, and where they came from.

    Of a run that has not come to its end that is its newest checkpoint, as long as there is one. With `ema` it is
    the average of the weights that the run keeps, which only checkpoints hold.
    """
    run = RunFolder(run_or_dir)
    if run.recipe_file.is_file() and (ema or not _is_finished(run)):
        model, origin = newest_model(run, partial(print, file=sys.stderr), ema)
        return model, Tokenizer.load(run.data), origin
    if ema:
        raise CheckpointError(
            f"{run_or_dir} is no run folder, and only the checkpoints of one hold an average; leave --ema out"
        )
    source = _exported_directory(run_or_dir)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    return fathom.load(source, dtype, mtp=mtp), tokenizer, source


def _is_finished(run: RunFolder) -> bool:
    """Whether `model/` is the run's last word: earlier stages leave an export there too."""
    if not run.model.is_dir():
        return False
    saved = checkpoints(run.checkpoints)
    return not saved or step_of(saved[-1]) >= run.read_recipe().steps


def _exported_directory(run_or_dir: str | Path) -> Path:
    """The Hugging Face directory that `run_or_dir` is or holds as `model/`."""
    path = Path(run_or_dir)
    for directory in (path, path / "model"):
        if (directory / "config.json").is_file():
            return directory
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder or an exported directory")
    if path.parent.name == "checkpoints":
        raise CheckpointError(
            f"{path} is a checkpoint, which has what training needs; give its run folder, {path.parent.parent}, "
            f"finished or not"
        )
    raise CheckpointError(
        f"{path} is neither a run folder nor an exported directory (no config.json, no model/)"
    )
