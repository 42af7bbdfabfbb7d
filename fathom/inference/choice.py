"""From logits to tokens: penalties, filters, the draw, and how close the draw was.

The order is vLLM's: penalties and bias on the logits, temperature, then min-p, top-k and top-p, each
on the distribution the temperature gives. What is left is scored, greedy by the logit and otherwise
by p_v / E_v with the noise of `fathom.inference.noise`; the best score is the token.

The *gap* between the best two scores (of logits, or of log p + Gumbel noise) says how far the choice
was from another one. Two ways of computing the same logits agree to about 1e-5 in float32, so
choices whose gap is above `CLOSE` are the same in both; the others are counted.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.errors import GenerationError
from fathom.inference.noise import exponential, key_of
from fathom.inference.sampling import Sampling

CLOSE = 1e-4
"""Gap below which a choice may be another one elsewhere."""

_HUGE = 1e300
"""As far as penalties and biases may carry a logit."""


@dataclass(frozen=True)
class Draw:
    """What the choice of one row depends on besides its logits."""

    sampling: Sampling
    seed: int
    position: int
    """Number of the token in its answer, from 0."""
    prompt: Sequence[int] = ()
    """Tokens before the answer; only repetition_penalty asks."""
    answer: Sequence[int] = ()
    """Tokens of the answer so far; only penalties ask."""
    allowed_V: Tensor | None = None
    """bool [V]: what a grammar permits."""

    @property
    def plainly_greedy(self) -> bool:
        """Whether the likeliest token as the model gives it is asked for."""
        return self.sampling.greedy and not self.sampling.penalised and self.allowed_V is None


@dataclass(frozen=True)
class Choice:
    """Chosen token ids and the gaps to the second best, both on the CPU."""

    tokens: list[int]
    gaps: list[float]


def choose(logits_RV: Tensor, draws: Sequence[Draw]) -> Choice:
    """A token for each row. Raises `GenerationError` when a logit is not finite."""
    if not all(finite(logits_RV)):
        raise GenerationError(
            "the model's logits are not finite; its weights are damaged or overflow in this dtype"
        )
    return choose_of_finite(logits_RV, draws)


def choose_of_finite(logits_RV: Tensor, draws: Sequence[Draw]) -> Choice:
    """The same for rows that are known to be finite."""
    if logits_RV.shape[1] == 1:
        return Choice([0] * len(draws), [float("inf")] * len(draws))
    plain = all(draw.plainly_greedy for draw in draws)  # then float64 would say the same
    values_R2, indices_R = best_two(logits_RV if plain else scores(logits_RV, draws))
    gaps = values_R2[:, 0].double() - values_R2[:, 1].double()
    return Choice(indices_R.tolist(), gaps.tolist())


def finite(logits_RV: Tensor) -> list[bool]:
    """Of each row whether every number is finite; the extremes tell, and are the fastest to have."""
    extremes = torch.stack((logits_RV.amax(-1), logits_RV.amin(-1)), -1).tolist()
    return [math.isfinite(high) and math.isfinite(low) for high, low in extremes]


_CHUNK = 128


def best_two(scores_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The two highest of each row, [R, 2], and where the highest is, [R].

    `topk` looks at one number after the other; the maximum of stretches of 128 is ten times as fast, and
    the two highest are the best of the best stretch and either its second or another stretch's best.
    """
    R, V = scores_RV.shape
    if V % _CHUNK or V < 8 * _CHUNK or scores_RV.device.type != "cpu":
        best = scores_RV.topk(2, dim=-1)
        return best.values, best.indices[:, 0]
    chunks = scores_RV.view(R, V // _CHUNK, _CHUNK)
    tops = chunks.amax(-1).topk(2, dim=-1)
    place_R = tops.indices[:, 0]
    inner = chunks[torch.arange(R), place_R].topk(2, dim=-1)
    second = torch.maximum(inner.values[:, 1], tops.values[:, 1])
    return torch.stack((inner.values[:, 0], second), -1), place_R * _CHUNK + inner.indices[:, 0]


def scores(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What the choice is the largest of: float64 [R, V] of log p + noise, or of logits when greedy."""
    logits_RV = adjusted(logits_RV, draws)
    drawn = [row for row, draw in enumerate(draws) if not draw.sampling.greedy]
    if not drawn:
        return logits_RV
    random = [draws[row] for row in drawn]
    chances = filtered(logits_RV[drawn], [draw.sampling for draw in random])
    keys = [key_of(draw.seed, draw.position) for draw in random]
    noise = exponential(keys, logits_RV.shape[1], logits_RV.device)
    logits_RV[drawn] = (chances / noise).log_()
    return logits_RV


def probabilities(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The distributions that tokens are drawn from, float64 [R, V]; one-hot when greedy."""
    logits_RV = adjusted(logits_RV, draws)
    found = torch.zeros_like(logits_RV)
    for row, draw in enumerate(draws):
        if draw.sampling.greedy:
            found[row, logits_RV[row].argmax()] = 1.0
        else:
            found[row] = filtered(logits_RV[row : row + 1], [draw.sampling])[0]
    return found


def adjusted(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Penalties, bias and grammar applied: float64 [R, V], a copy."""
    if logits_RV.device.type == "mps":  # which has no float64
        logits_RV = logits_RV.cpu()
    logits_RV = logits_RV.to(torch.float64, copy=True)
    for row, draw in enumerate(draws):
        if draw.sampling.penalised:
            _penalise(logits_RV[row], draw)
        if draw.allowed_V is not None:
            logits_RV[row].masked_fill_(~draw.allowed_V.to(logits_RV.device), float("-inf"))
    return logits_RV


def _penalise(logits_V: Tensor, draw: Draw) -> None:
    """One row in place."""
    wish, device = draw.sampling, logits_V.device
    if wish.repetition_penalty != 1:
        seen = torch.tensor([*draw.prompt, *draw.answer], device=device, dtype=torch.int64).unique()
        found = logits_V[seen]
        weaker = found / wish.repetition_penalty
        logits_V[seen] = torch.where(found > 0, weaker, found * wish.repetition_penalty)
    if draw.answer and (wish.presence_penalty or wish.frequency_penalty):
        said = torch.tensor(draw.answer, device=device, dtype=torch.int64)
        count_V = torch.bincount(said, minlength=logits_V.shape[0])
        logits_V -= wish.frequency_penalty * count_V + wish.presence_penalty * (count_V > 0)
    for token, bias in wish.logit_bias.items():
        logits_V[token] += bias
    logits_V.clamp_(-_HUGE, _HUGE)  # the differences of infinite ones would be no numbers


def filtered(logits_RV: Tensor, wishes: Sequence[Sampling]) -> Tensor:
    """softmax at each row's temperature [R, V], without the tokens that min-p, top-k and top-p leave out."""
    device = logits_RV.device
    column = [[wish.temperature] for wish in wishes]
    heat_R1 = torch.tensor(column, device=device, dtype=torch.float64)
    highest_R1 = logits_RV.max(dim=-1, keepdim=True).values
    chances = torch.softmax((logits_RV - highest_R1) / heat_R1, dim=-1)
    if any(wish.min_p for wish in wishes):
        smallest = [[wish.min_p] for wish in wishes]
        least_R1 = torch.tensor(smallest, device=device, dtype=torch.float64)
        too_small = chances < least_R1 * chances.max(dim=-1, keepdim=True).values
        chances = chances.masked_fill(too_small, 0.0)
        chances = chances / chances.sum(-1, keepdim=True)
    if any(wish.top_k or wish.top_p < 1 for wish in wishes):
        chances = _likeliest(chances, wishes)
    return chances


def _likeliest(chances: Tensor, wishes: Sequence[Sampling]) -> Tensor:
    """The top-k tokens, and of those the smallest set of likeliest ones that has top_p together."""
    vocabulary, device = chances.shape[1], chances.device
    most = [[min(wish.top_k or vocabulary, vocabulary)] for wish in wishes]
    descending, order = chances.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocabulary, device=device)
    kept = descending.masked_fill(rank_V >= torch.tensor(most, device=device), 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    share_R1 = torch.tensor([[wish.top_p] for wish in wishes], device=device, dtype=torch.float64)
    before = kept.cumsum(dim=-1) - kept
    kept = kept.masked_fill((before >= share_R1) & (share_R1 < 1), 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(chances).scatter_(-1, order, kept)


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, natural logarithm, as the model gave it (temperature 1, no filter)."""

    token: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, as many as were asked for."""


def logprobs_of(logits_RV: Tensor, tokens: Sequence[int], most: Sequence[int]) -> list[Logprob]:
    """Of one token in each row, with the `most` likeliest beside it."""
    log_RV = logits_RV.float().log_softmax(-1)
    chosen_R1 = torch.tensor(tokens, device=log_RV.device)[:, None]
    of_chosen = log_RV.gather(1, chosen_R1)
    ranks = (log_RV > of_chosen).sum(1) + 1
    best = log_RV.topk(min(max(most), log_RV.shape[1]), dim=-1)
    values, indices = best.values.tolist(), best.indices.tolist()
    rows = zip(tokens, of_chosen[:, 0].tolist(), ranks.tolist(), most, strict=True)
    return [
        Logprob(token, logprob, rank, tuple(zip(indices[r][:k], values[r][:k], strict=True)))
        for r, (token, logprob, rank, k) in enumerate(rows)
    ]
