"""Options that several commands have, and what is made of them."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import torch
import typer

from fathom.errors import FathomError
from fathom.inference import Sampling

RunOrDir = Annotated[
    str, typer.Argument(metavar="RUN_OR_DIR", help="Run folder or exported directory.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token always.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest that make up this share.")]
TopK = Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0: all.")]
MinP = Annotated[float, typer.Option(help="Draw among those at least so likely as the likeliest.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens of prompt and answer become less likely.")
]
PresencePenalty = Annotated[float, typer.Option(help="Above 0: tokens of the answer too.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same, for each time they are in it.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")
]
Speculate = Annotated[
    int | None,
    typer.Option(
        min=0, help="Drafts by MTP modules; by default one for each module, where that is faster."
    ),
]
MaxMemory = Annotated[str, typer.Option(help="For the cache and the work of a pass.")]
Weights = Annotated[
    str,
    typer.Option(help="How weights are stored on a CPU: float32, bfloat16 or int8, less to read."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Ema = Annotated[
    bool, typer.Option("--ema", help="The average of the weights that the run keeps (ema.decay).")
]


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # which a device without data (meta) cannot
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise FathomError(f"device {name!r} cannot be used here; try 'auto' or 'cpu'") from error


def choose_sampling(seed: int | None, stop: list[str] | None, **wishes: Any) -> Sampling:
    """What the options ask for, with a seed of its own when none was given, so that it can be told."""
    own = secrets.randbelow(2**31) if seed is None else seed
    return Sampling(seed=own, stop=tuple(stop or ()), **wishes)
