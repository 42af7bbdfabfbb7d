"""The needle test with readers whose sight is known: what must be found is found, and nothing else."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from fathom.data import Tokenizer, needles
from fathom.errors import DataError, FathomError
from fathom.evaluation import Pairs, PassKey, even_depths, needle_grid
from fathom.evaluation.haystack import Haystack, build
from fathom.evaluation.needle import TOKENS_AT_A_TIME
from tests.evaluation.stubs import Reader, characters

EVERYTHING = 10**6
NEEDLE, KEY = 1, 1
LONGEST_ITEM = 4
"""Characters of filler between two borders at most: a word of three letters and a blank."""


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs(characters())


def haystack(form: Pairs | PassKey, length: int, depth: float, seed: int = 0) -> Haystack:
    return build(form.puzzle(Random(seed)), length, depth)


def test_who_sees_everything_finds_everything(pairs: Pairs) -> None:
    model = Reader(pairs.tokenizer, EVERYTHING).train()
    grid = needle_grid(model, pairs, (64, 512), even_depths(5), 6)
    assert grid.found == ((1.0,) * 5,) * 2
    assert grid.share() == 1.0
    assert model.training


def test_who_sees_nothing_finds_what_chance_gives(pairs: Pairs) -> None:
    grid = needle_grid(Reader(pairs.tokenizer, 1), pairs, (64,), even_depths(11), 40)
    assert 0.005 < grid.share() < 0.09  # one of 21, four deviations of 440 draws on both sides


def test_sight_shows_where_needles_lie(pairs: Pairs) -> None:
    sight, length = 100, 256
    depths = even_depths(9)
    grid = needle_grid(Reader(pairs.tokenizer, sight), pairs, (length,), depths, 30)
    room = length - NEEDLE - KEY - 1
    for depth, share in zip(depths, grid.found[0], strict=True):
        back = (
            KEY + NEEDLE + room - depth * room
        )  # from the end of the prompt to the needle's beginning
        if back + LONGEST_ITEM <= sight:
            assert share == 1.0, depth
        elif back - 1 > sight:
            assert share <= 0.3, depth


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("length", [40, 257, 2048])
def test_a_needle_lies_where_it_was_asked_for(pairs: Pairs, length: int, depth: float) -> None:
    for seed in range(5):
        text = haystack(pairs, length, depth, seed)
        room = length - NEEDLE - KEY - 1
        assert len(text.ids) + text.answer_tokens == length
        assert 0 <= round(depth * room) - text.needle_at < LONGEST_ITEM
        said = pairs.tokenizer.decode(text.ids)
        needle, key = said[text.needle_at : text.needle_at + NEEDLE], said[-1]
        assert needle == text.answer
        assert ord(needle) - ord(needles.syllable(key, 0)) in range(0, 21 * 28, 28)
        assert said.count(key) == said.count(needle) == 1
    assert haystack(pairs, length, 1.0).needle_at == length - NEEDLE - KEY - 1


def test_haystacks_name_other_keys_too(pairs: Pairs) -> None:
    texts = [pairs.tokenizer.decode(haystack(pairs, 2048, 0.5, seed).ids) for seed in range(20)]
    named = [len(set(text) & set(needles.KEYS)) for text in texts]
    assert min(named) >= 3 and max(named) > 12


def test_the_same_seed_hides_the_same_needles(pairs: Pairs) -> None:
    def found(seed: int, lengths: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
        model = Reader(pairs.tokenizer, 60)
        return needle_grid(model, pairs, lengths, (0.4, 0.6), 20, seed).found

    assert found(3, (100, 128)) == found(3, (100, 128))
    assert found(3, (128,))[0] == found(3, (100, 128))[1]
    assert found(3, (100,)) != found(4, (100,))


def test_long_texts_are_read_a_few_at_a_time(pairs: Pairs) -> None:
    model = Reader(pairs.tokenizer, EVERYTHING)
    told: list[tuple[int, int]] = []
    needle_grid(model, pairs, (256, 4096), (0.5,), 5, progress=lambda *at: told.append(at))
    assert model.read == [(5, 255), (2, 4095), (2, 4095), (1, 4095)]
    assert all(rows * length <= TOKENS_AT_A_TIME for rows, length in model.read)
    assert told[-1] == (5 * 256 + 5 * 4096,) * 2
    assert [read for read, _ in told] == sorted(read for read, _ in told)


def test_what_cannot_be_asked_is_refused(pairs: Pairs) -> None:
    model = Reader(pairs.tokenizer, 1, limit=512)
    with pytest.raises(FathomError, match="1024 exceeds the model's max_position_embeddings = 512"):
        needle_grid(model, pairs, (256, 1024), (0.5,), 1)
    with pytest.raises(FathomError, match="must lie between 0 and 1"):
        needle_grid(model, pairs, (256,), (50.0,), 1)
    with pytest.raises(FathomError, match="make no grid"):
        needle_grid(model, pairs, (), (0.5,), 1)
    with pytest.raises(FathomError, match="ask for at least 4"):
        haystack(pairs, 3, 0.5)
    with pytest.raises(FathomError, match="a length of 0 has no room"):
        needle_grid(model, pairs, (256, 0), (0.5,), 1)
    assert not model.read, "refused before a long text was read"
    with pytest.raises(FathomError, match="0 depths"):
        even_depths(0)
    with pytest.raises(DataError, match="does not know"):
        Pairs(Tokenizer.train(["plain letters"], None, "char"))


BOOK = "\n".join(
    f"Line {i} says that the {i % 7} winds blew over hill and dale." for i in range(99)
)


@pytest.fixture(scope="module")
def pass_key() -> PassKey:
    tokenizer = Tokenizer.train([BOOK], 320)
    return PassKey(tokenizer, np.array(tokenizer.encode(BOOK), np.uint16))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_pass_key_lies_between_words(pass_key: PassKey, depth: float) -> None:
    for seed in range(5):
        text = haystack(pass_key, 400, depth, seed)
        said = pass_key.tokenizer.decode(text.ids)
        assert len(text.ids) + text.answer_tokens == 400
        assert said.endswith("\nWhat is the pass key? The pass key is")
        assert said.count(f"\nThe pass key is {text.answer}. Remember it: {text.answer} is") == 1
        before = pass_key.tokenizer.decode(text.ids[: text.needle_at])
        after = said[len(before) :].split("pass key.\n", 1)[1]
        assert not before or before[-1] == "." or before[-1].isalnum()
        assert after[:1].isspace() or depth == 0.0
        assert before in BOOK + BOOK and len(text.answer) == 5


def test_only_the_whole_number_counts(pass_key: PassKey) -> None:
    text = haystack(pass_key, 400, 0.5)
    assert text.is_answer(f" {text.answer}.")
    assert text.is_answer(f"\n{text.answer}\nand more")
    for wrong in (f" {text.answer}7", f" {text.answer[:4]}", f" not {text.answer}", "", " ."):
        assert not text.is_answer(wrong)
    assert pass_key.tokenizer.decode(pass_key.tokenizer.encode(f" {text.answer}.")[-1:]) == "."


def test_an_empty_filler_is_refused(pass_key: PassKey) -> None:
    with pytest.raises(DataError, match="filler text is empty"):
        PassKey(pass_key.tokenizer, [])
