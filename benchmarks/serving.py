"""The two sides of the serving comparison: batches of texts that already hold a context, and prompts.

Caches are filled with random latents of unit size, as RMSNorm leaves them: the work does not depend on
their values, and a real prefill of thousands of tokens would take longer than what is measured. That both
sides say the same is checked apart, on short real prompts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from shapes import fathom_config, transformers_config


def prompts(fields: dict[str, Any], batch: int, length: int, seed: int = 2) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, fields["vocab_size"], (batch, length), generator=generator).tolist()


class EngineServing:
    """Ours: the engine, with pages, scheduler, sampling and all."""

    def __init__(self, fields: dict[str, Any], memory: str, weights: str = "float32") -> None:
        self.fields, self.memory, self.weights = fields, memory, weights
        self.requests: list[Any] = []

    @cached_property
    def model(self) -> Any:
        """Made when first asked for: one contender after the other, since all at once may not fit."""
        import fathom

        torch.manual_seed(0)
        return fathom.Transformer(fathom_config(self.fields)).eval()

    def load(self, path: str) -> None:
        from fathom.inference import Engine
        from fathom.precision.storage import store_weights

        self.model.load_state_dict(torch.load(path, mmap=True), strict=True)
        store_weights(self.model, self.weights)
        settings = {"max_memory": self.memory, "max_requests": 64, "prefix_cache": False}
        self.engine = Engine(self.model, **settings)

    def save(self, path: str) -> None:
        torch.save(self.model.state_dict(), path)

    def fill(self, batch: int, context: int) -> None:
        """`batch` texts whose first `context` tokens are in the cache, one more behind them."""
        engine = self.engine
        for request in self.requests:
            engine.abort(request)
        self.requests = []
        for ids in prompts(self.fields, batch, context + 1):
            (request,) = engine.add(ids, greedy(None))
            engine.scheduler.waiting.remove(request)
            engine.scheduler.running.append(request)
            assert engine.scheduler.reserve(request, context + ROOM)
            request.computed = context
            self.requests.append(request)
        for entries in engine.pages.layers:
            for request in self.requests:
                lo = request.blocks[0] * engine.pool.size
                entries[lo : lo + context].normal_()
        self.context = context

    def decode(self, tokens: int) -> None:
        """Steps behind the context, which is as it was afterwards."""
        for _ in range(tokens):
            self.engine.step()
        for request in self.requests:
            assert request.ended is None and len(request.ids) == self.context + 1 + tokens
            del request.ids[self.context + 1 :]
            request.computed = self.context

    def prefill(self, length: int) -> None:
        """A prompt up to its first token."""
        self.drop()
        (ids,) = prompts(self.fields, 1, length)
        list(self.engine.generate([ids], greedy(1)))

    def drop(self) -> None:
        for request in self.requests:
            self.engine.abort(request)
        self.requests = []

    def says(self, batch: int, length: int, tokens: int) -> list[list[int]]:
        """Greedy answers to real prompts."""
        self.drop()
        asked = prompts(self.fields, batch, length, seed=3)
        return [output.token_ids for output in self.engine.generate(asked, greedy(tokens))]

    def margins(self, batch: int, length: int, tokens: int) -> list[list[float]]:
        """By how much the likeliest token of each of those answers was ahead of the next, in nats."""
        asked = prompts(self.fields, batch, length, seed=3)
        answers = self.engine.generate(asked, greedy(tokens, logprobs=2))
        tops = [
            [[value for _, value in said.top] for said in answer.logprobs] for answer in answers
        ]
        return [[first - second for first, second in answer] for answer in tops]

    def bytes_per_token(self) -> int:
        """Of the cache."""
        from fathom.inference.pages import Pages

        return Pages.bytes_per_token(self.model.config, torch.float32)


ROOM = 64
"""Tokens that may be decoded behind a context."""


def greedy(tokens: int | None, logprobs: int | None = None) -> Any:
    from fathom.inference import Sampling

    return Sampling(0.0, max_new_tokens=tokens, ignore_eos=True, logprobs=logprobs)


class TransformersServing:
    """Theirs: forward passes over a DynamicCache, as `generate` makes them, for batches of equal lengths."""

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

    def fill(self, batch: int, context: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.config)
        for layer in range(self.config.num_hidden_layers):
            latent = torch.randn(batch, 1, context, self.config.kv_lora_rank)
            rotary = torch.randn(batch, 1, context, self.config.qk_rope_head_dim)
            self.cache.update(latent, rotary, layer)
        self.batch = batch

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        token = torch.zeros(self.batch, 1, dtype=torch.int64)
        for _ in range(tokens):
            output = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        self.cache.crop(-tokens)

    @torch.no_grad()
    def prefill(self, length: int) -> None:
        from transformers import DynamicCache

        tokens, cache = (
            torch.tensor(prompts(self.fields, 1, length)),
            DynamicCache(config=self.config),
        )
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def says(self, batch: int, length: int, tokens: int) -> list[list[int]]:
        asked = torch.tensor(prompts(self.fields, batch, length, seed=3))
        answers = self.model.generate(
            asked, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return answers[:, length:].tolist()

    def bytes_per_token(self) -> int:
        """Of what the cache holds of the last context."""
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return held // (self.batch * self.cache.get_seq_length())
