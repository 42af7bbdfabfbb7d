"""One transformer block, pre-norm (report Figure 2): h += MLA(RMSNorm(h)); h += FFN(RMSNorm(h))."""

from __future__ import annotations

from torch import Tensor, nn

from fathom.model.attention import Attention
from fathom.model.config import ModelConfig
from fathom.model.context import Context
from fathom.model.layers import MLP, RMSNorm
from fathom.model.moe import MoE


class Block(nn.Module):
    """Layer `layer`: attention, then a dense or a mixture-of-experts feed-forward block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | MLP = (
            MoE(config) if config.is_moe_layer(layer) else MLP(config, config.intermediate_size)
        )

    def attend(self, h_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The states behind the attention, and normed what the feed-forward block reads; both [B, T, D]."""
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), context)
        return h_BTD, self.post_attention_layernorm(h_BTD)

    def forward(self, h_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h_BTD, x = self.attend(h_BTD, context)
        return h_BTD + (self.mlp(x, context) if isinstance(self.mlp, MoE) else self.mlp(x))
