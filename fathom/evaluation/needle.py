"""Needle in a haystack over length and depth (report §4.3, Figure 8): does the context that a model takes reach it?

Each cell of the grid is a share of trials in which the model's likeliest words are the answer, exactly. A trial's text
depends on seed, length, depth and its number alone, so that two models read the same texts and a cell is the same in
any grid. Prompts of one length are read together, as many as make up `TOKENS_AT_A_TIME`; only the last position's
logits are ever computed, so that memory grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from fathom.errors import FathomError
from fathom.evaluation.haystack import Form, Haystack, build
from fathom.model import LatentCache, Transformer

TOKENS_AT_A_TIME = 8192
Progress = Callable[[int, int], None]
"""Told tokens read and tokens in all, which is what time goes by."""


@dataclass(frozen=True)
class Grid:
    """Shares found, `found[i][j]` for `lengths[i]` and `depths[j]`, each of so many trials."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    found: tuple[tuple[float, ...], ...]
    trials: int

    def share(self, beyond: int = 0) -> float:
        """Mean over the cells of all lengths greater than `beyond`; nan when there is none."""
        cells = [
            cell
            for length, row in zip(self.lengths, self.found, strict=True)
            for cell in row
            if length > beyond
        ]
        return sum(cells) / len(cells) if cells else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as needle.jsonl has them."""
        return asdict(self)


def even_depths(count: int) -> tuple[float, ...]:
    """So many depths from 0 to 1 at equal distances; one alone is the middle.

    Raises `FathomError` for fewer than one.
    """
    if count < 1:
        raise FathomError(f"{count} depths make no grid; ask for at least 1")
    if count == 1:
        return (0.5,)
    return tuple(round(place / (count - 1), 4) for place in range(count))


def needle_grid(
    model: Transformer,
    form: Form,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Grid:
    """Let `model` look for needles of `form` in texts of each length at each depth.

    lengths in tokens, answer included; depths between 0 and 1. The model is left in the mode in which it came.
    Raises `FathomError` for what it cannot read.
    """
    check(model, form, lengths, depths, trials)
    was_training = model.training
    model.eval()
    total, read, found = sum(lengths) * len(depths) * trials, 0, []
    try:
        for length in lengths:
            hits: list[bool] = []
            for texts in _batches(form, length, depths, trials, seed):
                hits += _answered(model, form, texts)
                read += length * len(texts)
                if progress:
                    progress(read, total)
            found.append(_shares(hits, trials))
    finally:
        model.train(was_training)
    return Grid(tuple(lengths), tuple(depths), tuple(found), trials)


def check(
    model: Transformer,
    form: Form,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
) -> None:
    """Raise `FathomError` for a grid without cells, one that does not fit the model, or one without room."""
    limit = model.config.max_position_embeddings
    if not lengths or not depths or trials < 1:
        raise FathomError(
            f"lengths={list(lengths)}, depths={list(depths)} and trials={trials} make no grid; give one of each or more"
        )
    if max(lengths) > limit:
        raise FathomError(
            f"a length of {max(lengths)} exceeds the model's max_position_embeddings = {limit}; leave it out"
        )
    if not all(0 <= depth <= 1 for depth in depths):
        raise FathomError(f"depths {list(depths)} must lie between 0 and 1; 0 is the beginning")
    build(form.puzzle(Random(0)), min(lengths), depths[0])


def _batches(
    form: Form, length: int, depths: Sequence[float], trials: int, seed: int
) -> Iterator[list[Haystack]]:
    """The texts of one row of the grid, depth after depth, a few at a time."""
    together = max(1, TOKENS_AT_A_TIME // length)
    cells = [(depth, trial) for depth in depths for trial in range(trials)]
    for first in range(0, len(cells), together):
        yield [
            build(form.puzzle(Random(f"{seed}/{length}/{depth}/{trial}")), length, depth)
            for depth, trial in cells[first : first + together]
        ]


def _answered(model: Transformer, form: Form, texts: list[Haystack]) -> list[bool]:
    """Whether each text is answered rightly; they are read together where prompts are equally long."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, text in enumerate(texts):
        by_size.setdefault((len(text.ids), text.answer_tokens), []).append(row)
    right = [False] * len(texts)
    for (_, count), rows in by_size.items():
        ids = torch.tensor([texts[row].ids for row in rows], device=model.lm_head.weight.device)
        for row, answer in zip(rows, greedy(model, ids, count).tolist(), strict=True):
            right[row] = texts[row].is_answer(form.tokenizer.decode(answer))
    return right


@torch.no_grad()
def greedy(model: Transformer, prompts_BT: Tensor, count: int) -> Tensor:
    """The likeliest `count` tokens after each of equally long prompts, int64 [B, count]."""
    rows, length = prompts_BT.shape
    weight = model.lm_head.weight
    dtype = model.compute_dtype or weight.dtype
    cache = LatentCache(model.config, rows, length + count, dtype, weight.device)
    unread, said = prompts_BT, []
    for _ in range(count):
        hidden = model.trunk(unread, cache=cache, mtp=False).hidden[:, -1]
        unread = model.lm_head(hidden).argmax(-1, keepdim=True)
        said.append(unread)
    return torch.cat(said, dim=1)


def _shares(hits: list[bool], trials: int) -> tuple[float, ...]:
    return tuple(sum(hits[i : i + trials]) / trials for i in range(0, len(hits), trials))
