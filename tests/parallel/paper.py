"""Worlds on paper: a rank's mesh without any other process, for what is laid out and never spoken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fathom.parallel import Layout, Mesh, mesh


def on_paper(layout: Layout, rank: int) -> Mesh:
    """The mesh of one rank; its groups are of the right ranks, and of none that would answer."""
    nobody = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: layout.world,
        get_rank=lambda: rank,
        new_group=lambda *_, **__: None,
        group=SimpleNamespace(WORLD=None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "dist", nobody)
        return Silent(layout)


class Silent(Mesh):
    """Makes further groups silently too."""

    def _handle(self, ranks: list[int]) -> None:
        return None
