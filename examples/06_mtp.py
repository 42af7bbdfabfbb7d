"""Lesson 6 — multi-token prediction (report §2.2, eqs 21-25): one block more, one token further.

At position i the MTP module joins the main model's state with the embedding of token i + 1 (eq 21),
runs one block (eq 22) and predicts token i + 2 (eq 23) through the shared head. What it predicts it
has not seen.
"""

import math

import torch

import fathom

V = 50
config = fathom.ModelConfig(
    vocab_size=V, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1,
    num_experts_per_tok=2, first_k_dense_replace=1, num_nextn_predict_layers=2, initializer_range=0.05,
)  # fmt: skip

# 1. What it sees: change token 6 and look at which predictions move.
torch.manual_seed(0)
model = fathom.Transformer(config).eval()
tokens = torch.randint(V, (1, 12))
changed = tokens.clone()
changed[0, 6] = (changed[0, 6] + 1) % V
with torch.no_grad():
    before, after = model(tokens), model(changed)
for k in (0, 1, 2):  # depth 0 is the main model
    a, b = ([out.logits, *out.mtp_logits][k] for out in (before, after))
    first = int(((a - b).abs() > 1e-4).any(-1)[0].int().argmax())
    print(f"depth {k}: row i predicts token i + {k + 1}; token 6 is first seen by row {first}")
    assert first == 6 - k  # row i of depth k sees tokens up to i + k, one short of its target


# 2. So it cannot copy: on random tokens its loss stays at ln V; a rule it does learn.
def train(rule: bool, steps: int = 40) -> fathom.model.Losses:
    """Losses after a short training, on fresh sequences every step."""
    torch.manual_seed(0)
    model = fathom.Transformer(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        line = torch.randint(V, (16, 1)) + 7 * torch.arange(17)
        tokens = line % V if rule else torch.randint(V, (16, 17))
        optimizer.zero_grad()
        found = fathom.losses(model, tokens)
        found.total.backward()
        optimizer.step()
    return found


for rule in (False, True):
    found = train(rule)
    losses = [round(loss.item(), 2) for loss in (found.main, *found.mtp_by_depth)]
    print(f"{'a rule' if rule else 'random'}: losses by depth {losses}, ln V = {math.log(V):.2f}")
    shares = [(16 - k) / 16 for k in (1, 2)]  # eq 24 sums T - k terms but divides by T
    for loss, share in zip(found.mtp_by_depth, shares, strict=True):
        assert loss < 1.0 if rule else loss > 0.97 * share * math.log(V)
