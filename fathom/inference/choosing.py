"""What follows from one pass of the model: the choices behind tokens and drafts, and what is kept of them.

Shapes: N rows of the pass, R rows behind which a token is chosen, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.inference.choice import Choice, Logprob, choose_of_finite, finite, logprobs_of
from fathom.inference.outputs import Delta
from fathom.inference.request import Ended, Request, count_places
from fathom.inference.scheduler import Share
from fathom.model import Transformer

_LOGIT_ROWS = 128
"""Rows of a prompt whose logits exist at a time."""


@dataclass(frozen=True)
class Reading:
    """What a pass gave: states before the head and before MTP, [N, D]."""

    hidden_ND: Tensor
    states_ND: Tensor


def choices_of(
    model: Transformer, shares: Sequence[Share], read: Reading
) -> dict[Request, tuple[Choice, list[Logprob]]]:
    """For each request read to its end: choices behind its last token and behind each draft.

    A request with logits that are no numbers is left out: damaged weights or an overflow in its path are
    nothing to the others.
    """
    rows: list[int] = []
    draws, requests, at = [], [], 0
    for share in shares:
        at += share.count
        if share.complete:
            request, drafts = share.request, len(share.request.drafts)
            rows += range(at - drafts - 1, at)
            draws += [request.draw(number) for number in range(drafts + 1)]
            requests.append(request)
    if not rows:
        return {}
    hidden_RD = read.hidden_ND
    if len(rows) < len(hidden_RD):
        hidden_RD = hidden_RD[torch.tensor(rows, device=hidden_RD.device)]
    logits_RV = model.lm_head(hidden_RD)
    sound = finite(logits_RV)
    if not all(sound):
        sound_R1 = torch.tensor(sound, device=logits_RV.device)[:, None]
        logits_RV = logits_RV.where(sound_R1, torch.zeros_like(logits_RV))
    choice = choose_of_finite(logits_RV, draws)
    found, at = {}, 0
    for request in requests:
        part = slice(at, at + len(request.drafts) + 1)
        at = part.stop
        if not all(sound[part]):
            continue
        mine = Choice(choice.tokens[part], choice.gaps[part])
        asked = request.sampling.logprobs
        logprobs = (
            []
            if asked is None
            else logprobs_of(logits_RV[part], mine.tokens, [asked] * len(mine.tokens))
        )
        found[request] = (mine, logprobs)
    return found


def fail(request: Request) -> Delta:
    """End a request that `choices_of` left out, though it had no drafts that could be the cause."""
    request.ended = Ended.ERROR
    request.stopped_by = (
        "the model's logits are not finite; its weights are damaged or overflow in this dtype"
    )
    text = "" if request.spoken is None else request.spoken.end()
    return Delta(request, [], text, [], request.ended)


def accept(request: Request, choice: Choice, logprobs: list[Logprob]) -> tuple[Delta, int, int]:
    """Append the choices as long as the drafts before them were right and the answer goes on.

    What that added, how many drafts there were, and how many of them were right.
    """
    before, text, right = len(request.ids), "", 0
    drafts, request.drafts = request.drafts, []
    for number, token in enumerate(choice.tokens):
        text += request.append(token, choice.gaps[number])
        if request.ended is not None or number == len(drafts) or token != drafts[number]:
            break
        right += 1
    request.computed = before + right
    request.usage.forwards += 1
    count_places(request.usage.drafted, len(drafts))
    count_places(request.usage.accepted, right)
    new = request.ids[before:]
    said = logprobs[: len(new)]
    request.logprobs += said
    return Delta(request, new, text, said, request.ended), len(drafts), right


def log_prompt(model: Transformer, share: Share, hidden_ND: Tensor) -> None:
    """Log-probabilities of the prompt tokens that the rows predict, if they are asked for."""
    request, most = share.request, share.request.sampling.prompt_logprobs
    first = max(request.computed + 1, len(request.prompt_logprobs))
    end = min(request.computed + share.count + 1, request.prompt_len)
    if most is None or first >= end:
        return
    for lo in range(first, end, _LOGIT_ROWS):
        part = request.ids[lo : min(lo + _LOGIT_ROWS, end)]
        row = lo - 1 - request.computed
        logits = model.lm_head(hidden_ND[row : row + len(part)])
        request.prompt_logprobs += logprobs_of(logits, part, [most] * len(part))
