"""What each stage of a run reads: windows of its length, from its sources, going on where an earlier stage stopped.

Stages with the same window length and the same sources read one stream: the report's pre-training (§4.2) has four
stages and no text is seen twice because the learning rate changed. A stage with longer windows has a stream of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fathom.data.loader import Loader, Ring
from fathom.data.mixture import Mixture
from fathom.data.prepare import TokenData
from fathom.errors import RecipeError
from fathom.runs.recipe import Recipe

ALL = "all"
"""Name of the one ring where sources are not weighted."""


def stage_loader(recipe: Recipe, index: int, data: TokenData) -> Loader:
    """The loader of stage `index`. Raises `RecipeError` for weights of a source that there is not."""
    stage, seed = recipe.stages[index], recipe.seed + _origin(recipe, index)
    weights = _weights(recipe, index)
    _check_names(weights, data.names, stage.name)
    rings = {}
    for number, name in enumerate(sorted(weights) or [ALL]):
        source = None if name == ALL else name
        tokens = data.tokens("train", source)
        documents = tokens.documents if recipe.data.isolate else None
        rings[name] = Ring(tokens, stage.seq_len, seed, number, documents)
    mixture = Mixture(weights, recipe.seed + index) if weights else None
    return Loader(rings, mixture, _begun(recipe, index))


def _weights(recipe: Recipe, index: int) -> dict[str, float]:
    """Weights of a stage, without the sources that it leaves out."""
    return {name: w for name, w in recipe.weights(recipe.stages[index]).items() if w > 0}


def _stream(recipe: Recipe, index: int) -> tuple[int, frozenset[str]]:
    """What tells the streams of a run apart."""
    return recipe.stages[index].seq_len, frozenset(_weights(recipe, index))


def _same_stream(recipe: Recipe, index: int) -> list[int]:
    """Stages up to `index` that read its stream."""
    return [i for i in range(index + 1) if _stream(recipe, i) == _stream(recipe, index)]


def _origin(recipe: Recipe, index: int) -> int:
    return _same_stream(recipe, index)[0]


def _begun(recipe: Recipe, index: int) -> dict[str, int]:
    """Sequences of each ring that earlier stages of the stream have read."""
    begun: Counter[str] = Counter()
    for earlier in _same_stream(recipe, index)[:-1]:
        span, weights = recipe.spans[earlier], _weights(recipe, earlier)
        sequences = span.sequences_before(span.last_step + 1)
        if weights:
            begun.update(Mixture(weights, recipe.seed + earlier).before(sequences))
        else:
            begun[ALL] += sequences
    return dict(begun)


def _check_names(weights: Mapping[str, float], known: tuple[str, ...], stage: str) -> None:
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise RecipeError(
            f"stage {stage} weighs a source {unknown[0]!r} that the data has not; there are {', '.join(known)} "
            f'(a source is named as in sources = ["{unknown[0]}=FOLDER"])'
        )
