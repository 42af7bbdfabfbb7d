"""A recipe's text as tokens in a run's folder."""

from __future__ import annotations

from pathlib import Path

from fathom.data.prepare import prepare
from fathom.data.prepared import TokenData
from fathom.data.progress import Say
from fathom.runs.recipe import Recipe


def token_data(recipe: Recipe, folder: Path, say: Say) -> TokenData:
    """Made as table [data] says, or opened where it is there already. Raises `DataError`."""
    source, ids = recipe.data, recipe.model.vocab_size
    data = prepare(
        folder,
        source.sources,
        source.tokenizer,
        ids,
        source.held_out,
        source.held_out_kind,
        recipe.seed,
        fim_rate=source.fim_rate,
        split_rate=source.split_rate,
        dedup=source.dedup,
        filters=source.filters,
        weights=source.weights,
        say=say,
    )
    if data.tokenizer.vocab_size < ids:
        say(
            f"the model has {ids:,} ids, the tokenizer {data.tokenizer.vocab_size:,}: the rest is never used "
            f"(model.vocab_size could be smaller)"
        )
    return data
