"""RUN_OR_DIR: what a command that speaks opens, an exported Hugging Face directory or the run folder that holds one."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fathom
from fathom.data import Tokenizer
from fathom.errors import CheckpointError
from fathom.inference import Sampling, Session, Step
from fathom.model import Transformer
from fathom.runs.folder import RunFolder
from fathom.runs.saving import newest_model
from fathom.train.checkpoint import checkpoints, step_of

COMPILE_HELP = (
    "Compile the step that reads a token: faster on a CPU, after ten seconds at the start."
)


@dataclass(frozen=True)
class Speaker:
    """A model that can speak: in evaluation mode, with its tokenizer and the directory both came from."""

    model: Transformer
    tokenizer: Tokenizer
    directory: Path
    step: Step | None
    """What reads single tokens faster than the model itself, on a CPU."""

    def session(self) -> Session:
        """A new text."""
        return Session(self.model, self.step)


def open_speaker(run_or_dir: str | Path, device: str, compiled: bool = False) -> Speaker:
    """Load the model and tokenizer of a run folder, finished or not, or of an exported directory.

    Raises `CheckpointError` when it holds no model, `DataError` when the tokenizer is missing.
    """
    if compiled and choose_device(device).type != "cpu":
        raise fathom.FathomError(
            f"--compile is for speaking on a CPU, this is {device}; leave it out"
        )
    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    model, tokenizer, origin = open_model(run_or_dir, dtype, mtp=False)
    tokenizer = tokenizer or Tokenizer.load(origin)
    model = model.to(place, dtype).eval()
    if compiled:
        print("compiling, which takes some ten seconds the first time …", file=sys.stderr)
    step = Step(model, compiled) if Step.suits(model) else None
    return Speaker(model, tokenizer, origin, step)


def open_model(
    run_or_dir: str | Path, dtype: torch.dtype | None = None, mtp: bool | None = None
) -> tuple[Transformer, Tokenizer | None, Path]:
    """Model, tokenizer if there is one, and where they came from.

    Of a run that has not come to its end that is its newest checkpoint, as long as there is one.
    """
    run = RunFolder(run_or_dir)
    if run.recipe_file.is_file() and not _is_finished(run):
        model, origin = newest_model(run, partial(print, file=sys.stderr))
        return model, Tokenizer.load(run.data), origin
    source = exported_directory(run_or_dir)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").exists() else None
    return fathom.load(source, dtype, mtp=mtp), tokenizer, source


def _is_finished(run: RunFolder) -> bool:
    """Whether `model/` is the run's last word: earlier stages leave an export there too."""
    if not run.model.is_dir():
        return False
    saved = checkpoints(run.checkpoints)
    return not saved or step_of(saved[-1]) >= run.read_recipe().steps


def exported_directory(run_or_dir: str | Path) -> Path:
    """The Hugging Face directory that `run_or_dir` is or holds as `model/`."""
    path = Path(run_or_dir)
    for directory in (path, path / "model"):
        if (directory / "config.json").is_file():
            return directory
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder or an exported directory")
    raise CheckpointError(
        f"{path} is neither a run folder nor an exported directory (no config.json, no model/)"
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # which a device without data (meta) cannot
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise fathom.FathomError(
            f"device {name!r} cannot be used here; try 'auto' or 'cpu'"
        ) from error


def choose_sampling(temperature: float, top_p: float, seed: int | None) -> Sampling:
    """The sampling that the options ask for, with a seed of its own when none was given, so that it can be told."""
    return Sampling(temperature, top_p, secrets.randbelow(2**31) if seed is None else seed)


# A model may say anything, also what would ring a terminal's bell or repaint it.
_AS_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    127: 0x2421
}
_AS_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def show(text: str) -> None:
    """Print a piece of text at once; on a terminal, control characters appear as pictures (ESC as ␛)."""
    print(text.translate(_AS_PICTURES) if sys.stdout.isatty() else text, end="", flush=True)
