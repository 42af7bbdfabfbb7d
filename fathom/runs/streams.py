"""What each stage of a run reads: windows of its length, from its sources, going on where an earlier stage stopped.

Stages with the same window length and the same sources read one stream: the report's pre-training (§4.2) has four
stages and no text is seen twice because the learning rate changed. A stage with longer windows has a stream of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fathom.data.loader import Loader, Ring
from fathom.data.mixture import Mixture
from fathom.data.prepared import TokenData
from fathom.errors import RecipeError, did_you_mean
from fathom.runs.recipe import Recipe

ALL = "all"
"""Name of the one ring where sources are not weighted."""


def stage_loader(
    recipe: Recipe, index: int, data: TokenData, passed_over: Mapping[str, int] | None = None
) -> Loader:
    """The loader of stage `index`; `passed_over`: sequences that roll-backs took out of each stage, by its name.

    Sources have the stage's weights, else the recipe's, else those that the text was prepared with. Raises
    `RecipeError` for weights of a source that there is not.
    """
    return _Streams(recipe, data, passed_over or {}).loader(index)


class _Streams:
    """The streams of a run."""

    def __init__(self, recipe: Recipe, data: TokenData, passed_over: Mapping[str, int]) -> None:
        self.recipe, self.data, self.passed_over = recipe, data, passed_over

    def loader(self, index: int) -> Loader:
        stage, weights = self.recipe.stages[index], self._weights(index)
        _check_names(weights, self.data.names, stage.name)
        origin, *_ = self._same_stream(index)
        rings = {}
        for number, name in enumerate(sorted(weights) or [ALL]):
            tokens = self.data.tokens("train", name if weights else None)
            documents = tokens.documents if self.recipe.data.isolate else None
            seed = self.recipe.seed + origin
            rings[name] = Ring(tokens, stage.seq_len, seed, number, documents)
        mixture = Mixture(weights, self.recipe.seed + index) if weights else None
        return Loader(rings, mixture, self._begun(index))

    def _weights(self, index: int) -> dict[str, float]:
        """Weights of a stage, without the sources that it leaves out."""
        asked = self.recipe.weights(self.recipe.stages[index]) or self.data.manifest["weights"]
        return {name: weight for name, weight in asked.items() if weight > 0}

    def _same_stream(self, index: int) -> list[int]:
        """Stages up to `index` that read its stream: windows as long from the same sources."""
        marks = [(self.recipe.stages[i].seq_len, {*self._weights(i)}) for i in range(index + 1)]
        return [i for i, mark in enumerate(marks) if mark == marks[index]]

    def _begun(self, index: int) -> dict[str, int]:
        """Sequences of each ring that earlier stages of the stream have read or passed over."""
        begun: Counter[str] = Counter()
        for earlier in self._same_stream(index)[:-1]:
            span, weights = self.recipe.spans[earlier], self._weights(earlier)
            sequences = span.sequences_before(span.last_step + 1)
            sequences += self.passed_over.get(span.stage.name, 0)
            if weights:
                begun.update(Mixture(weights, self.recipe.seed + earlier).before(sequences))
            else:
                begun[ALL] += sequences
        return dict(begun)


def _check_names(weights: Mapping[str, float], known: tuple[str, ...], stage: str) -> None:
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise RecipeError(
            f"stage {stage} weighs a source {unknown[0]!r} that the data has not; "
            f"{did_you_mean(unknown[0], known, 'there are')} "
            f'(a source is named as in sources = ["{unknown[0]}=FOLDER"])'
        )
