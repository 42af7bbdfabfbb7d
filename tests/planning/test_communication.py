"""Bytes between devices against counting, and the report's arithmetic of links (§3.2.2)."""

from __future__ import annotations

import pytest
import torch

from fathom.planning.cluster import DEVICES
from fathom.planning.communication import (
    combine,
    copies,
    dispatch,
    expected_distinct,
    experts_at_the_same_cost,
    free_experts_per_node,
    reduce_bytes,
)
from fathom.planning.published import V2_LITE, V3

H800 = DEVICES["h800"]


def test_experts_for_free() -> None:
    """Report §3.2.2: 3.2 experts per node, up to 13 for four nodes, at the cost of one transfer to each."""
    assert free_experts_per_node(H800) == 3.2
    assert round(experts_at_the_same_cost(H800, V3.topk_group)) == 13


def test_distinct_pools_against_drawing() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(20_000, 4 * 32, generator=generator).topk(8).indices // 32
    seen = torch.zeros(20_000, 4).scatter_(1, draws, 1.0).sum(1).mean().item()
    assert expected_distinct(4, 32, 8) == pytest.approx(seen, rel=0.01)
    assert expected_distinct(4, 1, 8) == 4


def test_node_limited_routing_keeps_the_nodes_at_m() -> None:
    """64 devices in 8 nodes: at most 4 nodes, one in eight of them its own; experts of one node need no network."""
    way = copies(V3, H800, 64)
    assert 3 < way.nodes <= 4 and way.inter == pytest.approx(way.nodes * 7 / 8)
    free = copies(V3.replace(n_group=1, topk_group=1), H800, 64)
    assert free.nodes > 5 > way.nodes
    inside = copies(V2_LITE, DEVICES["h100"], 8)
    assert inside.inter == 0 and 0 < inside.intra <= 6
    assert copies(V3, H800, 1).intra == 0


def test_a_token_by_simulation() -> None:
    """Copies over the network and inside nodes, counted token by token for EP 64 with groups as nodes."""
    generator = torch.Generator().manual_seed(1)
    tokens = 4000
    groups = torch.rand(tokens, 8, generator=generator).topk(4).indices
    mask = torch.full((tokens, 8), float("-inf")).scatter_(1, groups, 0.0)
    scores = torch.rand(tokens, 256, generator=generator) + mask.repeat_interleave(32, 1)
    experts = scores.topk(8).indices
    devices = torch.zeros(tokens, 64).scatter_(1, experts // 4, 1.0)
    nodes = devices.view(tokens, 8, 8).amax(2)
    own = torch.randint(0, 64, (tokens,), generator=generator)
    sent = nodes.sum(1) - nodes.gather(1, (own // 8)[:, None])[:, 0]
    landed = devices.view(tokens, 8, 8)[torch.arange(tokens), :, own % 8].sum(1)
    inside = devices.sum(1) - landed
    way = copies(V3, H800, 64)
    assert way.inter == pytest.approx(sent.mean().item(), rel=0.02)
    assert way.intra == pytest.approx(inside.mean().item(), rel=0.02)


def test_fp8_halves_the_dispatch_and_leaves_the_combine() -> None:
    full, half = dispatch(V3, H800, 64, False), dispatch(V3, H800, 64, True)
    assert half.inter_bytes / full.inter_bytes == pytest.approx((1 + 4 / 128) / 2)
    assert combine(V3, H800, 64) == full


def test_rings() -> None:
    assert reduce_bytes(1e9, 1, True) == (0, 0)
    assert reduce_bytes(1e9, 4, True) == (3e9, 1.5e9)
    assert reduce_bytes(1e9, 4, False) == (6e9, 0)
