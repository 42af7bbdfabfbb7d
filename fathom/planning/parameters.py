"""Parameters of a model by part, total and per token (report §4.2; the released shapes give the same figures).

Counted are trained parameters; the router biases are buffers (`router_biases`). "Active" are the parameters that one
token's forward pass touches: everything but the experts it is not sent to. Whether embedding and head belong to it
is a matter of taste, which is why published figures differ, so all three sums are given.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.model import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `main` is the model without MTP; `mtp` leaves out what it shares, `on_disk` repeats it."""

    embedding: int
    """Token embedding, as large as an untied head."""
    head: int
    """Output head; 0 when tied to the embedding."""
    attention: int
    """All MLA blocks of the main model."""
    feed_forward: int
    """All dense and MoE blocks of the main model, routers included."""
    norms: int
    """Block norms and the final norm of the main model (the latents' norms are in `attention`)."""
    mtp: int
    """MTP modules without the shared embedding and head."""
    inactive: int
    """Experts of the main model that a token is not sent to."""
    mtp_inactive: int
    """The same in the MTP modules."""
    mtp_depth: int
    """MTP modules."""
    router_biases: int
    """Balancing biases (eq 16), buffers of the main model."""
    vocabulary: int
    """Parameters of one embedding or head matrix."""

    @property
    def main(self) -> int:
        """The main model, as "671B" counts."""
        return self.embedding + self.head + self.attention + self.feed_forward + self.norms

    @property
    def trained(self) -> int:
        """What an optimiser sees: main model and MTP, shared parts once."""
        return self.main + self.mtp

    @property
    def on_disk(self) -> int:
        """Main and MTP with the embedding and head that released files repeat for every MTP module."""
        return self.main + self.mtp_with_duplicates

    @property
    def mtp_with_duplicates(self) -> int:
        """MTP modules, each with its own copy of embedding and head."""
        return self.mtp + 2 * self.mtp_depth * self.vocabulary

    @property
    def active_blocks(self) -> int:
        """Active per token without embedding and head."""
        return self.attention + self.feed_forward + self.norms - self.inactive

    @property
    def active_with_head(self) -> int:
        """Active per token with the output head."""
        return self.active_blocks + self.vocabulary

    @property
    def active(self) -> int:
        """Active per token with embedding and head, the "37B" of the report."""
        return self.active_blocks + 2 * self.vocabulary


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model with this configuration."""
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    matrix = config.vocab_size * config.hidden_size
    moe_layers = sum(config.is_moe_layer(i) for i in range(layers))
    return Parameters(
        embedding=matrix,
        head=0 if config.tie_word_embeddings else matrix,
        attention=layers * attention(config),
        feed_forward=sum(feed_forward(config, i) for i in range(layers)),
        norms=(2 * layers + 1) * config.hidden_size,
        mtp=sum(mtp_module(config, k) for k in range(depth)),
        inactive=sum(inactive_experts(config, i) for i in range(layers)),
        mtp_inactive=sum(inactive_experts(config, layers + k) for k in range(depth)),
        mtp_depth=depth,
        router_biases=moe_layers * config.n_routed_experts if config.has_router_bias else 0,
        vocabulary=matrix,
    )


def attention_matrices(config: ModelConfig) -> int:
    """Matrices of one MLA block (eqs 1-11): query, key-value down, key-value up, output."""
    c, H, D = config, config.num_attention_heads, config.hidden_size
    rank = c.q_lora_rank
    query = D * H * c.qk_head_dim if rank is None else D * rank + rank * H * c.qk_head_dim
    down = D * (c.kv_lora_rank + c.qk_rope_head_dim)
    up = c.kv_lora_rank * H * (c.qk_nope_head_dim + c.v_head_dim)
    return query + down + up + H * c.v_head_dim * D


def attention(config: ModelConfig) -> int:
    """One MLA block with its latent norms."""
    return attention_matrices(config) + (config.q_lora_rank or 0) + config.kv_lora_rank


def expert(config: ModelConfig) -> int:
    """One expert: gate, up and down projection."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def feed_forward(config: ModelConfig, layer: int) -> int:
    """The feed-forward block of a layer: dense, or router, routed and shared experts (eq 12)."""
    if not config.is_moe_layer(layer):
        return 3 * config.hidden_size * config.intermediate_size
    experts = config.n_routed_experts + config.n_shared_experts
    return experts * expert(config) + config.n_routed_experts * config.hidden_size


def inactive_experts(config: ModelConfig, layer: int) -> int:
    """Parameters of the routed experts that a token does not use in this layer, none in a dense one."""
    if not config.is_moe_layer(layer):
        return 0
    return (config.n_routed_experts - config.num_experts_per_tok) * expert(config)


def mtp_module(config: ModelConfig, depth: int) -> int:
    """One MTP module without embedding and head: three norms, eh_proj and a block (eqs 21-22)."""
    D = config.hidden_size
    block = attention(config) + feed_forward(config, config.num_hidden_layers + depth) + 2 * D
    return 3 * D + 2 * D * D + block


def block_parameters(config: ModelConfig, layer: int) -> tuple[int, int]:
    """(all but routed experts, routed experts) of one block, MTP modules' without what is no block in them."""
    routed = config.n_routed_experts * expert(config) if config.is_moe_layer(layer) else 0
    block = attention(config) + feed_forward(config, layer) + 2 * config.hidden_size
    return block - routed, routed


def around_mtp_block(config: ModelConfig) -> int:
    """What is no block in an MTP module: two norms, the matrix that joins, its last norm (eq 21)."""
    return 3 * config.hidden_size + 2 * config.hidden_size**2


def outside_blocks(config: ModelConfig, mtp: bool = True) -> int:
    """Embedding, head, last norm, and what is no block in MTP modules."""
    matrices = 1 if config.tie_word_embeddings else 2
    total = matrices * config.vocab_size * config.hidden_size + config.hidden_size
    depth = config.num_nextn_predict_layers if mtp else 0
    return total + depth * around_mtp_block(config)
