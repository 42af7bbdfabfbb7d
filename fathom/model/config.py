"""The shape of a model: the released `config.json`'s fields by their names (report §2, §4.2).

The defaults are the 671B model's. Three fields are ours, because the released files leave the
choice unsaid: `mtp_concat_order`, `mtp_hidden` (docs/choices.md) and `initializer_range`,
whose default is the report's 0.006 and not the 0.02 that the released file carries over from its
template.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fathom.errors import ConfigError

_CHOICES = {
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "greedy", "group_limited_greedy"),
    "hidden_act": ("silu",),
    "model_type": ("deepseek_v3", "kimi_k2", "deepseek_v2"),
    "mtp_concat_order": ("embedding_first", "hidden_first"),
    "mtp_hidden": ("post_norm", "pre_norm"),
}
YARN_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)
_MAY_BE_ZERO = {"first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shape and arithmetic; `ConfigError` when it cannot be."""

    vocab_size: int = 129280
    """Rows of the embedding and of the output head."""
    hidden_size: int = 7168
    """Width d of the residual stream."""
    intermediate_size: int = 18432
    """Width of the dense feed-forward blocks."""
    moe_intermediate_size: int = 2048
    """Width of one expert."""
    num_hidden_layers: int = 61
    """Transformer blocks of the main model, MTP modules not counted."""
    num_attention_heads: int = 128
    """Attention heads n_h."""
    q_lora_rank: int | None = 1536
    """Rank d'_c of the query latent (eq 6); None projects queries directly, as in V2-Lite."""
    kv_lora_rank: int = 512
    """Rank d_c of the key-value latent (eq 1), what the cache holds."""
    qk_nope_head_dim: int = 128
    """Dimensions per head without rotation, d_h."""
    qk_rope_head_dim: int = 64
    """Rotated dimensions per head, d_h^R; the key's are shared by all heads (eq 3)."""
    v_head_dim: int = 128
    """Dimensions of a value head."""
    n_routed_experts: int = 256
    """Routed experts N_r."""
    n_shared_experts: int = 1
    """Shared experts N_s; they are one feed-forward block of N_s times the expert width."""
    num_experts_per_tok: int = 8
    """Experts K_r that each token is sent to."""
    n_group: int = 8
    """Groups of experts for node-limited routing (a group stands for a node)."""
    topk_group: int = 4
    """Groups a token may use, M."""
    first_k_dense_replace: int = 3
    """Leading layers with a dense feed-forward block."""
    moe_layer_freq: int = 1
    """Every how many layers after those a layer is MoE."""
    scoring_func: str = "sigmoid"
    """Affinity of eq 15: "sigmoid" (V3) or "softmax" (V2)."""
    topk_method: str = "noaux_tc"
    """How experts are chosen: "noaux_tc" (V3), "greedy" or "group_limited_greedy" (V2).

    The first adds the balancing bias and scores a group by the sum of its best two.
    """
    norm_topk_prob: bool = True
    """Whether the chosen affinities are divided by their sum (eq 13)."""
    routed_scaling_factor: float = 2.5
    """Factor on the routing weights; only in the released files, not in the report."""
    num_nextn_predict_layers: int = 1
    """Depth D of multi-token prediction."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the block and final norms (the latents' norms always use 1e-6)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """YaRN settings as released ({"type": "yarn", "factor": 40, ...}), or None for plain RoPE."""
    rope_interleave: bool = True
    """Rotate adjacent pairs (released weights) or the two halves."""
    max_position_embeddings: int = 4096
    """Longest context."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights (report §4.2)."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    bos_token_id: int = 0
    """Token that begins a sequence."""
    eos_token_id: int = 1
    """Token that ends a document."""
    hidden_act: str = "silu"
    """Activation inside the gated feed-forward blocks."""
    model_type: str = "deepseek_v3"
    """Family name in `config.json`."""
    mtp_concat_order: str = "embedding_first"
    """Input order of `eh_proj`: "embedding_first" (released weights) or "hidden_first" (eq 21)."""
    mtp_hidden: str = "post_norm"
    """State that MTP reads: after the final norm ("post_norm") or before it ("pre_norm")."""

    def __post_init__(self) -> None:
        self._check_types()
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{name}={value!r} is not supported; use one of {', '.join(allowed)}"
                )
        self._check_rope()
        self._check_routing()

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.name == "q_lora_rank" and value is not None):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ConfigError(f"{field.name}={value!r} must be an integer")
                least = 0 if field.name in _MAY_BE_ZERO or field.name.endswith("token_id") else 1
                if value < least:
                    raise ConfigError(f"{field.name}={value} must be at least {least}")
            elif field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r} must be true or false")
            elif field.type == "float" and (
                isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
            ):
                raise ConfigError(f"{field.name}={value!r} must be a positive number")

    def _check_rope(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: dimensions turn in pairs"
            )
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, dict):
            raise ConfigError(
                f"rope_scaling={self.rope_scaling!r} must be a table of YaRN's settings, or None"
            )
        kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
        if kind != "yarn":
            raise ConfigError(
                f"rope_scaling type {kind!r} is not supported; use 'yarn', or None for plain RoPE"
            )
        for key in ("factor", "original_max_position_embeddings"):
            if key not in self.rope_scaling:
                raise ConfigError(f"rope_scaling has no {key!r}, which YaRN needs; add it")
        for key, value in self.rope_scaling.items():
            if key not in (*YARN_NUMBERS, "type", "rope_type", "truncate"):
                raise ConfigError(
                    f"rope_scaling has an unknown key {key!r}; YaRN's are {', '.join(YARN_NUMBERS)}"
                )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in YARN_NUMBERS and value is not None and not (number and value >= 0):
                raise ConfigError(f"rope_scaling {key}={value!r} must be a number, not negative")
        if self.rope_scaling["factor"] < 1:
            raise ConfigError(
                f"rope_scaling factor={self.rope_scaling['factor']} must be at least 1"
            )

    def _check_routing(self) -> None:
        if (
            self.first_k_dense_replace >= self.num_hidden_layers
            and not self.num_nextn_predict_layers
        ):
            return
        experts, groups = self.n_routed_experts, self.n_group
        if self.topk_method != "greedy":
            if experts % groups:
                raise ConfigError(
                    f"n_routed_experts={experts} must be a multiple of n_group={groups}; "
                    f"change one of them (n_group=1 means no groups)"
                )
            if self.topk_group > groups:
                raise ConfigError(
                    f"topk_group={self.topk_group} cannot exceed n_group={groups}; lower it"
                )
            if self.topk_method == "noaux_tc" and experts // groups < 2:
                raise ConfigError(
                    f"n_group={groups} leaves {experts // groups} expert per group, but a group's "
                    f"score is the sum of its best two; use at most {experts // 2} groups"
                )
        reach = experts if self.topk_method == "greedy" else experts // groups * self.topk_group
        if self.num_experts_per_tok > reach:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {reach} experts "
                f"that a token can reach; lower it or raise topk_group"
            )

    @property
    def qk_head_dim(self) -> int:
        """Dimensions of one query or key head, d_h + d_h^R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def has_router_bias(self) -> bool:
        """Whether selection uses the balancing bias of eq 16."""
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` holds experts.

        MTP blocks (index >= num_hidden_layers) follow the same rule.
        """
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)
