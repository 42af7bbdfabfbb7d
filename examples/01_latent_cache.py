"""Lesson 1 — the latent cache (report §2.1.1, eqs 1-5): what a token leaves behind for later ones.

Ordinary attention caches a key and a value per head. MLA caches one compressed latent c (eq 1),
from which the keys and values of all heads can be made (eqs 2 and 5), and one rotated key that all
heads share (eq 3).
"""

import torch

import fathom

# 1. The arithmetic at the size of the released model, 2 bytes per number (BF16).
v3 = fathom.ModelConfig()
# a key and a value for each head
per_head = v3.num_attention_heads * (v3.qk_head_dim + v3.v_head_dim)
latent = v3.kv_lora_rank + v3.qk_rope_head_dim  # c (512) and the shared rotated key (64)
for name, numbers in (("keys and values", per_head), ("latent", latent)):
    size = numbers * v3.num_hidden_layers * 2
    long = size * 131072 / 1e9
    print(
        f"{name:15} {numbers:5} numbers per layer, {size:9,} bytes per token, {long:.0f} GB at 128K"
    )
print(f"the latent is {per_head / latent:.0f} times smaller")
assert latent == 576 and latent * 61 * 2 == 70_272 and per_head == 40_960

# 2. The same in a small model that runs: what is in its cache?
torch.manual_seed(0)
config = fathom.ModelConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
    n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, initializer_range=0.1,
)  # fmt: skip
model = fathom.Transformer(config).eval()
tokens = torch.randint(100, (1, 12))
cache = fathom.LatentCache(config, batch=1, max_len=12)
with torch.no_grad():
    whole = model(tokens, cache=cache).logits
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
    compressed = layer.self_attn.kv_a_proj_with_mqa(hidden)  # W_DKV h and W_KR h in one product
    c = layer.self_attn.kv_a_layernorm(compressed[..., :32])
held = cache.tensors[0]
print(f"layer 0 of the small model holds {list(held.shape)}: 12 tokens of 32 + 8 numbers")
assert torch.allclose(held[..., :32], c, atol=1e-6)  # the normed latent, eq 1
assert not torch.allclose(held[:, 1:, 32:], compressed[:, 1:, 32:])  # the key is rotated ...
assert torch.allclose(
    held[..., 32:].norm(dim=-1), compressed[..., 32:].norm(dim=-1)
)  # ... by an angle

# 3. It is enough: fed one token at a time, the model says the same.
cache.truncate(0)
with torch.no_grad():
    steps = [model(tokens[:, i : i + 1], cache=cache).logits for i in range(12)]
difference = (torch.cat(steps, dim=1) - whole).abs().max().item()
print(f"one token at a time against all at once: logits differ by at most {difference:.1e}")
assert difference < 1e-5
