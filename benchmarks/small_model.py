"""The model of scripts that look at runs and not at learning, as a table of a recipe."""

from __future__ import annotations

MODEL = """\
[model]
vocab_size = 512
hidden_size = 64
intermediate_size = 96
moe_intermediate_size = 32
num_hidden_layers = {layers}
num_attention_heads = 2
q_lora_rank = 32
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_group = 2
topk_group = 1
first_k_dense_replace = 1
max_position_embeddings = 128
"""
