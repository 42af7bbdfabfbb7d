"""What stages read: one stream goes on through stages of one length, no window twice before its epoch is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fathom.errors import RecipeError
from fathom.runs.recipe import Recipe
from fathom.runs.streams import stage_loader
from tests.runs.tiny import STAGE, tiny_recipe


class Tokens(np.ndarray):
    """Numbers that tell their source and place; a document every ten."""

    documents: np.ndarray


def tokens(base: int, count: int) -> Tokens:
    made = (np.arange(count, dtype=np.uint32) + base).view(Tokens)
    made.documents = np.arange(0, count + 1, 10)
    return made


SOURCES = {"en": tokens(0, 5000), "zh": tokens(10_000, 3000), "code": tokens(20_000, 2000)}


def data(weights: dict[str, float] | None = None) -> Any:
    everything = np.concatenate(list(SOURCES.values())).view(Tokens)
    everything.documents = np.arange(0, len(everything) + 1, 10)
    return SimpleNamespace(
        names=tuple(SOURCES),
        manifest={"weights": weights or {}},
        tokens=lambda side, source=None: everything if source is None else SOURCES[source],
    )


def recipe(*stages: dict[str, Any], **changes: Any) -> Recipe:
    named = [{**STAGE, "name": f"s{i}", "warmup_steps": 0, **s} for i, s in enumerate(stages)]
    return tiny_recipe(stages=named, **changes)


def starts(recipe: Recipe, index: int) -> list[int]:
    """First token of every window that a stage reads, step by step."""
    loader, span = stage_loader(recipe, index, data()), recipe.spans[index]
    found = []
    for step in range(span.first_step + 1, span.last_step + 1):
        batch = loader.batch(span.sequences_before(step), recipe.at(step=step).batch)
        found += batch.tokens[:, 0].tolist()
    return found


def test_stages_of_one_length_read_one_stream() -> None:
    cut = recipe({"steps": 10}, {"steps": 6, "batch": 8}, {"steps": 4})
    whole = recipe({"steps": 26})
    parts = [starts(cut, i) for i in range(3)]
    assert [*parts[0], *parts[1], *parts[2]] == starts(whole, 0)
    assert len(set(parts[0] + parts[1])) == 88, "nothing twice"


def test_another_length_is_another_stream_and_does_not_disturb_the_first() -> None:
    mixed = recipe({"steps": 10}, {"steps": 3, "seq_len": 64}, {"steps": 16})
    whole = recipe({"steps": 26})
    assert starts(mixed, 0) + starts(mixed, 2) == starts(whole, 0)
    assert len(set(starts(mixed, 1))) == 12


def test_a_stage_may_weigh_sources_anew_and_goes_on_in_each() -> None:
    weights = {"en": 0.5, "zh": 0.25, "code": 0.25}
    changed = {**weights, "code": 1.0}
    both = recipe({"steps": 20}, {"steps": 20, "weights": changed}, data={"weights": weights})
    first, second = starts(both, 0), starts(both, 1)
    assert len(set(first + second)) == 160, "nothing twice, though the weights changed"
    share = [sum(start >= 20_000 for start in part) / 80 for part in (first, second)]
    assert share[0] < 0.4 < share[1]


def test_what_a_stage_passed_over_the_next_neither_reads_nor_skips_more() -> None:
    weights = {"en": 0.8, "zh": 0.1, "code": 0.1}
    turned = {"en": 0.1, "zh": 0.1, "code": 0.8}
    both = recipe(
        {"steps": 4},
        {"steps": 4, "weights": turned},
        {"steps": 4, "seq_len": 64},
        data={"weights": weights},
    )
    passed_over = {"s0": 48}
    first = stage_loader(both, 0, data(), passed_over).batch(48, 16).sources
    before = stage_loader(both, 0, data()).batch(0, 48).sources
    second = stage_loader(both, 1, data(), passed_over)
    assert second.begun == {n: first.get(n, 0) + before.get(n, 0) for n in weights}
    assert not stage_loader(both, 2, data(), passed_over).begun, "another stream"


def test_a_source_of_no_weight_is_left_out() -> None:
    only = recipe({"steps": 20, "weights": {"en": 1.0, "zh": 0.0}})
    assert max(starts(only, 0)) < 5000


def test_without_weights_sources_are_as_large_as_they_are() -> None:
    found = starts(recipe({"steps": 60}), 0)
    assert sum(start < 5000 for start in found) / len(found) == pytest.approx(0.5, abs=0.1)


def test_what_the_text_was_prepared_with_counts_where_the_recipe_says_nothing() -> None:
    noted = data({"code": 1.0})
    batch = stage_loader(recipe({"steps": 3}), 0, noted).batch(0, 20)
    assert batch.sources == {"code": 20}
    asked = recipe({"steps": 3}, data={"weights": {"en": 1.0}})
    assert stage_loader(asked, 0, noted).batch(0, 20).sources == {"en": 20}


def test_documents_are_told_apart_on_request() -> None:
    one = recipe({"steps": 3}, data={"isolate": True})
    batch = stage_loader(one, 0, data()).batch(0, 4)
    assert batch.document_ids is not None
    assert stage_loader(recipe({"steps": 3}), 0, data()).batch(0, 4).document_ids is None


def test_a_source_may_be_called_all() -> None:
    known = SOURCES["en"]
    named = SimpleNamespace(
        names=("all", "zh"),
        manifest={"weights": {"all": 1.0, "zh": 1.0}},
        tokens=lambda side, source=None: {"all": known, "zh": SOURCES["zh"]}[source],
    )
    assert stage_loader(recipe({"steps": 3}), 0, named).rings["all"].tokens is known


def test_a_source_that_is_not_there() -> None:
    wrong = recipe({"steps": 3, "weights": {"fr": 1.0}})
    with pytest.raises(RecipeError, match=r"stage s0 weighs a source 'fr'.*there are en, zh, code"):
        stage_loader(wrong, 0, data())
