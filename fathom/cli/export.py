"""`fathom export`: a model as a Hugging Face directory of its own, in the dtype that is wanted."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.options import Ema


class Dtype(enum.StrEnum):
    """What weights can be written as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def export(
    run_or_dir: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="Run folder or exported directory.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write; made, or replaced.")
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights (default: as they are).")
    ] = None,
    ema: Ema = False,
) -> None:
    """Write a model as a Hugging Face directory that transformers and other programs read.

    Of a run that is still going on, the newest checkpoint is taken.
    """
    import torch

    import fathom
    from fathom.cli.opening import open_model

    model, tokenizer, origin = open_model(run_or_dir, ema=ema)
    fathom.save(model, directory, tokenizer, getattr(torch, dtype) if dtype else None)
    without = "" if tokenizer else ", without a tokenizer, as there is none in the source"
    print(f"{directory}: {model.num_parameters():,} parameters from {origin}{without}")
