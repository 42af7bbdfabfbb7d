"""Lesson 4 — routing (report §2.1.2, eqs 13-16): who computes for a token, and with what weight.

The affinity of a token to an expert is s = sigmoid(u . e) (eq 15). The K largest s + b are chosen
(eq 16), at most M groups (nodes) taking part. The bias b has a say in the choice only: the weights
are the plain s of the chosen, divided by their sum (eq 13) and, in the released model, multiplied
by 2.5.
"""

import torch

import fathom

config = fathom.ModelConfig(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2)
# one token, groups of two experts
logits = torch.tensor([[2.0, 1.5, -1.0, -1.0, 1.8, -3.0, 0.5, 0.0]])
scores = logits.sigmoid()
zero = torch.zeros(8)


def show(name: str, bias: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Route the token and print what came out."""
    indices, weights = fathom.route(logits, bias, config)
    order = indices[0].argsort()
    chosen, weights = indices[0][order], weights[0][order]
    print(f"{name:30} experts {chosen.tolist()}, weights {[round(w, 3) for w in weights.tolist()]}")
    return chosen.tolist(), weights


# 1. Affinities are sigmoids: each by itself, they need not sum to one.
print("affinities s", [round(s, 2) for s in scores[0].tolist()])
groups = scores.view(4, 2).topk(2).values.sum(-1)
print("groups by their best two", [round(g, 2) for g in groups.tolist()], "-> 0 and 3 are kept")

# 2. Expert 4 has the second best score, but its group does not: node-limited routing passes it by.
chosen, weights = show("without bias", zero)
assert scores[0].argsort(descending=True)[:2].tolist() == [0, 4] and chosen == [0, 1]
assert torch.isclose(weights.sum(), torch.tensor(2.5))

# 3. A bias of 0.3 lifts expert 6 into the choice. Its weight is what its own s deserves.
bias = zero.clone()
bias[6] = 0.3
chosen, weights = show("expert 6 lifted by 0.3", bias)
s = scores[0, [0, 6]]
assert chosen == [0, 6] and torch.allclose(weights, s / s.sum() * 2.5)

# 4. With negative biases a group that is out must be at minus infinity: at zero it would win.
chosen, weights = show("all biases -2", zero - 2)
assert chosen == [0, 1]

# 5. At the released size: 256 experts in 8 groups, 8 chosen, from at most 4 groups.
torch.manual_seed(0)
v3 = fathom.ModelConfig()
indices, weights = fathom.route(torch.randn(1000, 256), torch.randn(256) * 0.1, v3)
used = torch.tensor([len(set((row // 32).tolist())) for row in indices])
print(
    f"256 experts: at most {used.max()} groups per token, weights sum to {weights.sum(1).mean():.2f}"
)
assert used.max() <= 4 and torch.allclose(weights.sum(1), torch.tensor(2.5))
