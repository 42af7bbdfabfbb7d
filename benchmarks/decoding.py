"""The two sides of the decoding comparison: greedy steps of one token on a cache that already
holds a context.

The cache is filled with random latents of unit size, as RMSNorm leaves them: the work does not
depend on their values, and a real prefill of thousands of tokens would take longer than what is
measured. That both sides say the same is checked apart, on a short real prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from shapes import fathom_config, transformers_config
from torch import Tensor


def prompt(fields: dict[str, Any], length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, fields["vocab_size"], (1, length), generator=generator)


class FathomDecoding:
    """Ours: the latent cache with absorbed attention."""

    def __init__(self, fields: dict[str, Any], max_len: int, compiled: bool = False) -> None:
        import fathom
        from fathom.model import LatentCache

        torch.manual_seed(0)
        self.fields, self.config = fields, fathom_config(fields)
        self.compiled = compiled
        self.model = fathom.Transformer(self.config).eval()
        self.cache = LatentCache(self.config, 1, max_len)

    def load(self, path: str) -> None:
        from fathom.inference import Step

        self.model.load_state_dict(torch.load(path, mmap=True), strict=True)
        self.step = Step(self.model, self.compiled)

    def fill(self, context: int) -> None:
        self.cache.truncate(0)
        for entries in self.cache.tensors:
            entries[:, :context].normal_()
        self.cache.advance(context)
        self.context = context

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        """Steps behind the context, which is as it was afterwards."""
        token = 0
        for _ in range(tokens):
            token = int(self.step(token, self.cache).argmax())
        self.cache.truncate(self.context)

    @torch.no_grad()
    def logits(self, length: int, steps: int) -> Tensor:
        """Logits [steps, V] of single steps after a real prompt of `length` tokens."""
        tokens = prompt(self.fields, length + steps)
        self.cache.truncate(0)
        self.model(tokens[:, :length], cache=self.cache, mtp=False)
        steps_on = tokens[0, length:].tolist()
        return torch.cat([self.step(token, self.cache) for token in steps_on])


class TransformersDecoding:
    """Theirs: the forward pass that `generate` makes per token, with a DynamicCache."""

    def __init__(self, fields: dict[str, Any], experts: str) -> None:
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(0)
        self.fields, self.config = fields, transformers_config(fields)
        self.model = DeepseekV3ForCausalLM(self.config).eval()
        self.model.set_experts_implementation(experts)
        self.model.set_attn_implementation("sdpa")

    def save(self, path: str) -> None:
        torch.save(self.model.state_dict(), path)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, mmap=True), strict=True)

    def fill(self, context: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.config)
        for layer in range(self.config.num_hidden_layers):
            latent = torch.randn(1, 1, context, self.config.kv_lora_rank)
            rotary = torch.randn(1, 1, context, self.config.qk_rope_head_dim)
            self.cache.update(latent, rotary, layer)
        self.context = context

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(tokens):
            output = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        self.cache.crop(-tokens)

    @torch.no_grad()
    def logits(self, length: int, steps: int) -> Tensor:
        from transformers import DynamicCache

        tokens, cache = prompt(self.fields, length + steps), DynamicCache(config=self.config)
        self.model(input_ids=tokens[:, :length], past_key_values=cache, use_cache=True)
        rows = [
            self.model(
                input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True
            ).logits[0]
            for i in range(length, length + steps)
        ]
        return torch.cat(rows)
