"""What llama.cpp computes from a GGUF file of architecture deepseek2, said once more in torch.

It follows llama.cpp's src/models/deepseek2.cpp and knows nothing of our model: only the file's keys and tensors. That
it says the same as llama.cpp itself is shown by benchmarks/gguf_vs_llama_cpp.py, which needs llama.cpp.

Shapes: T tokens, H heads, P and R dimensions without and with rotation, C latent rank, E experts, K chosen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from torch.nn.functional import silu

PREFIX = "deepseek2."


class File:
    """Keys (without `deepseek2.`) and tensors (as float32) of a GGUF file."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        self.keys: dict[str, Any] = {k.removeprefix(PREFIX): v for k, v in fields.items()}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
            for t in reader.tensors
        }

    def logits(self, tokens: Tensor) -> Tensor:
        """[T, V] of int64 tokens [T]."""
        return self._state(tokens) @ self._head().T

    def mtp_logits(self, tokens: Tensor) -> Tensor:
        """[T - 1, V]: row i joins the state at i with token i + 1 in the block behind the others."""
        layer, h = self.keys["block_count"] - 1, self._state(tokens)[:-1]
        nextn, embedded = f"blk.{layer}.nextn.", self.tensors["token_embd.weight"][tokens[1:]]
        joined = (self._norm(embedded, nextn + "enorm"), self._norm(h, nextn + "hnorm"))
        h = self._block(layer, torch.cat(joined, -1) @ self._weight(layer, "nextn.eh_proj").T)
        return self._norm(h, nextn + "shared_head_norm") @ self._head().T

    def _state(self, tokens: Tensor) -> Tensor:
        h = self.tensors["token_embd.weight"][tokens]
        for layer in range(self.keys["block_count"] - self.keys.get("nextn_predict_layers", 0)):
            h = self._block(layer, h)
        return self._norm(h, "output_norm")

    def _block(self, layer: int, h: Tensor) -> Tensor:
        h = h + self._attention(layer, self._norm(h, f"blk.{layer}.attn_norm"))
        return h + self._feed_forward(layer, self._norm(h, f"blk.{layer}.ffn_norm"))

    def _head(self) -> Tensor:
        return self.tensors.get("output.weight", self.tensors["token_embd.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.keys["attention.layer_norm_rms_epsilon"]
        return (
            x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.tensors[name + ".weight"]
        )

    def _weight(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"blk.{layer}.{name}.weight"]

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """Absorbed: one key head of C + R numbers."""
        H, C = self.keys["attention.head_count"], self.keys["attention.kv_lora_rank"]
        R, length = self.keys["rope.dimension_count"], self.keys["attention.key_length_mla"]
        if self.keys["attention.q_lora_rank"]:
            latent = self._norm(x @ self._weight(layer, "attn_q_a").T, f"blk.{layer}.attn_q_a_norm")
            q = latent @ self._weight(layer, "attn_q_b").T
        else:
            q = x @ self._weight(layer, "attn_q").T
        nope, rope = q.unflatten(-1, (H, length)).split((length - R, R), dim=-1)
        kv = x @ self._weight(layer, "attn_kv_a_mqa").T
        latent, k_rope = self._norm(kv[:, :C], f"blk.{layer}.attn_kv_a_norm"), kv[:, None, C:]
        absorbed = torch.einsum("thp,hcp->thc", nope, self._weight(layer, "attn_k_b"))
        scores = torch.einsum("thc,sc->hts", absorbed, latent)
        scores += torch.einsum("thr,sr->hts", self._turn(rope), self._turn(k_rope)[:, 0])
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = (scores * self._scale()).masked_fill(future, -math.inf).softmax(-1)
        heads = torch.einsum("hts,sc,hvc->thv", weights, latent, self._weight(layer, "attn_v_b"))
        return heads.flatten(1) @ self._weight(layer, "attn_output").T

    def _stretch(self) -> float:
        return self.keys.get("rope.scaling.factor", 1.0)

    def _log_multiplier(self) -> float:
        return self.keys.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1

    def _magnitude(self) -> float:
        """Of cos and sin: attn_factor as the context sets it; the kernel undoes what the context divides by."""
        usual = 1.0 if self._log_multiplier() else 1 + 0.1 * math.log(self._stretch())
        return usual * self.keys.get("rope.scaling.attn_factor", 1.0)

    def _scale(self) -> float:
        multiplier = 1 + 0.1 * self._log_multiplier() * math.log(self._stretch())
        return (self._magnitude() * multiplier) ** 2 / math.sqrt(
            self.keys["attention.key_length_mla"]
        )

    def _turn(self, x_THR: Tensor) -> Tensor:
        """Adjacent pairs by the angles of their positions."""
        angles = torch.arange(len(x_THR))[:, None, None] * self._frequencies()
        cos, sin = angles.cos() * self._magnitude(), angles.sin() * self._magnitude()
        a, b = x_THR[..., 0::2], x_THR[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def _frequencies(self) -> Tensor:
        R, base = self.keys["rope.dimension_count"], self.keys["rope.freq_base"]
        pair = torch.arange(R // 2)
        theta = base ** (-2 * pair / R)
        if self.keys.get("rope.scaling.type") != "yarn":
            return theta
        original = self.keys["rope.scaling.original_context_length"]

        def pair_of(turns: float) -> float:
            return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(0, math.floor(pair_of(32)))
        high = min(R - 1, math.ceil(pair_of(1)))
        slow = ((pair - low) / max(0.001, high - low)).clamp(0, 1)
        return theta / self._stretch() * slow + theta * (1 - slow)

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        if layer < self.keys["leading_dense_block_count"]:
            return self._gated(layer, x, "")
        return self._experts(layer, x) + self._gated(layer, x, "_shexp")

    def _gated(self, layer: int, x: Tensor, kind: str) -> Tensor:
        gate, up, down = (
            self._weight(layer, f"ffn_{name}{kind}") for name in ("gate", "up", "down")
        )
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _experts(self, layer: int, x: Tensor) -> Tensor:
        gate, up, down = (self._weight(layer, f"ffn_{n}_exps") for n in ("gate", "up", "down"))
        chosen, weights = self._choice(layer, x)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for e, weight in zip(chosen[token], weights[token], strict=True):
                hidden = silu(gate[e] @ x[token]) * (up[e] @ x[token])
                out[token] += weight * (down[e] @ hidden)
        return out

    def _choice(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, both [T, K]."""
        logits = x @ self._weight(layer, "ffn_gate_inp").T
        sigmoid = self.keys.get("expert_gating_func", 1) == 2
        probabilities = logits.sigmoid() if sigmoid else logits.softmax(-1)
        choice = probabilities + self.tensors.get(f"blk.{layer}.exp_probs_b.bias", 0.0)
        groups = self.keys.get("expert_group_count", 0)
        if groups > 1:
            assert self.keys["expert_group_used_count"] < groups  # as it does on loading
            choice = self._only_best_groups(choice.unflatten(-1, (groups, -1)))
        chosen = choice.topk(self.keys["expert_used_count"]).indices
        weights = probabilities.gather(-1, chosen)
        if self.keys.get("expert_weights_norm", False):
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=6.103515625e-5)
        return chosen, weights * (self.keys.get("expert_weights_scale", 0.0) or 1.0)

    def _only_best_groups(self, grouped: Tensor) -> Tensor:
        """A group counts as the sum of its best two."""
        score = grouped.topk(2).values.sum(-1)
        kept = score.topk(self.keys["expert_group_used_count"]).indices
        dropped = torch.ones_like(score, dtype=torch.bool).scatter_(-1, kept, False)
        return grouped.masked_fill(dropped[..., None], -math.inf).flatten(-2)
