"""The latent cache (report §2.1.1): one compressed latent and one rotated key per token and layer.

576 numbers at the 671B shape (512 + 64), where keys and values of 128 heads would take 40,960.

`Cache` is the third seam of the model: attention hands what it made of the new tokens to whatever
holds the past, and gets the heads' outputs back. `LatentCache` is one block of memory for one
batch of texts of equal length; the engine's pages (`fathom.inference.pages`) are another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fathom.errors import GenerationError
from fathom.model.config import ModelConfig

if TYPE_CHECKING:
    from fathom.model.attention import Attention
    from fathom.model.context import Context


class Cache(Protocol):
    """What attention needs of the past."""

    def attend(
        self, layer: Attention, q_raw: Tensor, latent: Tensor, k_rope: Tensor, context: Context
    ) -> Tensor:
        """Remember the new tokens; heads side by side [B, T, H*V] over all that they see.

        q_raw [B, T, H*(P+R)] not rotated yet, latent [B, T, C] normed, k_rope [B, T, R] rotated.
        """


class LatentCache:
    """Room for `max_len` tokens of `batch` sequences; one tensor [B, max_len, C + R] per layer."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_len, self.length = max_len, 0
        shape = (batch, max_len, config.cache_dim)
        self.tensors = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]

    def append(self, layer: int, entries_BTX: Tensor) -> Tensor:
        """Write the new tokens' entries behind those held; all of them [B, length + T, C + R].

        `length` itself moves only with `advance`, once every layer has written.
        """
        end = self.length + entries_BTX.shape[1]
        if end > self.max_len:
            raise GenerationError(
                f"the cache has room for {self.max_len} tokens, {end} are needed; make it longer"
            )
        self.tensors[layer][:, self.length : end] = entries_BTX.detach()
        return self.tensors[layer][:, :end]

    def attend(
        self, layer: Attention, q_raw: Tensor, latent: Tensor, k_rope: Tensor, context: Context
    ) -> Tensor:
        """Expanded where a text begins, absorbed behind it; see `Cache`."""
        entries = self.append(layer.layer, torch.cat((latent, k_rope), dim=-1))
        if self.length == 0 and q_raw.shape[1] > 1:
            return layer.expanded(q_raw, latent, k_rope, context)
        return layer.absorbed(q_raw, entries, context)

    def advance(self, tokens: int) -> None:
        """Count the tokens that all layers have written."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise GenerationError(f"cannot keep {length} of the {self.length} cached tokens")
        self.length = length
