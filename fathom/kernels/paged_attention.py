"""Attention over a latent cache that lies in pieces (report eqs 4-10), for texts of any lengths.

A text's cache is a list of *runs*, stretches of memory that follow one another in the text. Scores
are taken run by run and joined, the weighted sum is taken run by run and added up, so that nothing
of the cache is ever copied: at a context of thousands, reading it once is most of the work.

    scores = [q . run_1 | q . run_2 | ...]    weights = softmax(scores)    out = sum_r weights_r run_r

The expanded form is the same as `expanded_attention`, for queries that are the last T of S tokens.

Shapes: T queries, S keys, H heads, P nope dims, R rotary dims, V value dims, C latent rank,
X = C + R, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fathom.kernels.expansion import Expansion

SCORES = 1 << 24
"""Scores that exist at a time: 64 MiB in float32."""

LONG = 1024
"""Keys from which the product with the cache on the left is the faster one (1.4 times)."""


def latent_attention_reference(query_THX: Tensor, cache_SX: Tensor) -> Tensor:
    """Causal softmax(q . c) c over the whole cache, word for word: [T, H, X]."""
    T, S = query_THX.shape[0], cache_SX.shape[0]
    scores = torch.einsum("thx,sx->ths", query_THX, cache_SX).float()
    seen_TS = torch.arange(S)[None] <= torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(~seen_TS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("ths,sx->thx", weights.to(cache_SX.dtype), cache_SX)


def latent_attention(query_THX: Tensor, runs: Sequence[Tensor]) -> Tensor:
    """The same over runs [S_r, X]; queries (scaled, absorbed, rotated) are the last T tokens."""
    T, H, _ = query_THX.shape
    S = sum(run.shape[0] for run in runs)
    at_once = max(1, SCORES // (H * S))
    parts = []
    for lo in range(0, T, at_once):
        part = query_THX[lo : lo + at_once]
        parts.append(_attend(part, runs, S - T + lo))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(query_THX: Tensor, runs: Sequence[Tensor], first: int) -> Tensor:
    """`latent_attention` of queries from position `first` on, all at once."""
    T, H, X = query_THX.shape
    query = query_THX.reshape(T * H, X)
    scores = _joined([_scores(query, run) for run in runs]).float()
    S = scores.shape[1]
    if first + T < S or T > 1:
        key, place = torch.arange(S, device=query.device), torch.arange(T, device=query.device)
        hidden_TS = key > (first + place)[:, None]
        scores.view(T, H, S).masked_fill_(hidden_TS[:, None], float("-inf"))
    weights = scores.softmax(-1).to(query.dtype)
    parts = weights.split([run.shape[0] for run in runs], dim=1)
    out = parts[0] @ runs[0]
    for part, run in zip(parts[1:], runs[1:], strict=True):
        out.addmm_(part, run)
    return out.view(T, H, X)


def _scores(query: Tensor, run: Tensor) -> Tensor:
    if query.device.type == "cpu" and run.shape[0] >= LONG:
        return (run @ query.T).T
    return query @ run.T


def _joined(parts: list[Tensor]) -> Tensor:
    """Side by side, as a tensor that may be written to."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)


def padded_latent_attention(query_BTHX: Tensor, cache_BSX: Tensor, seen_BTS: Tensor) -> Tensor:
    """The same of many texts at once, in few calls: padded queries, padded copies of their caches.

    `seen_BTS` (bool) says which keys a query sees; each must see one. [B, T, H, X].
    """
    B, T, H, X = query_BTHX.shape
    scores = torch.bmm(query_BTHX.reshape(B, T * H, X), cache_BSX.transpose(1, 2)).float()
    scores = scores.view(B, T, H, -1).masked_fill_(~seen_BTS[:, :, None], float("-inf"))
    weights = scores.softmax(-1).to(query_BTHX.dtype)
    return torch.bmm(weights.view(B, T * H, -1), cache_BSX).view(B, T, H, X)


def absorb(q_nope_NHP: Tensor, up_HUC: Tensor) -> Tensor:
    """W_UK^T q of each head: [N, H, C]; `up_HUC` holds W_UK in its first P rows, then W_UV."""
    P = q_nope_NHP.shape[2]
    return torch.bmm(q_nope_NHP.transpose(0, 1), up_HUC[:, :P]).transpose(0, 1)


def expand(latent_NHC: Tensor, up_HUC: Tensor, nope: int) -> Tensor:
    """W_UV c of each head, side by side: [N, H*V]."""
    values = torch.bmm(latent_NHC.transpose(0, 1), up_HUC[:, nope:].transpose(1, 2))
    return values.transpose(0, 1).flatten(1)


def expanded_attention_behind(
    q_raw_1T: Tensor, kv_raw_1S: Tensor, k_rope_1SR: Tensor, layout: Expansion
) -> Tensor:
    """Expanded attention of the last T of S tokens -> heads side by side [1, T, H*V].

    `layout`'s angles are the queries'; keys are rotated already. No gradient is meant.
    """
    q = layout.queries(q_raw_1T).transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in layout.keys_values(kv_raw_1S, k_rope_1SR))
    T, S = q.shape[2], k.shape[2]
    key, place = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)
    seen_TS = key <= place[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen_TS, scale=layout.scale)
    return layout.values(out.transpose(1, 2)).flatten(2)
