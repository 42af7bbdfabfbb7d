"""The latent cache (report §2.1.1): one compressed latent and one rotated key per token and layer.

576 numbers at the 671B shape (512 + 64), where keys and values of 128 heads would take 40,960.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.errors import GenerationError
from fathom.model.config import ModelConfig


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

    def advance(self, tokens: int) -> None:
        """Count the tokens that all layers have written."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise GenerationError(f"cannot keep {length} of the {self.length} cached tokens")
        self.length = length
