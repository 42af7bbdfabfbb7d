"""Lesson 5 — balance without an auxiliary loss (report §2.1.2, eqs 16-20).

A router that likes some experts overloads them. After every step each expert's bias moves by gamma:
up if it got less than the mean of the whole batch, down if more. No gradient is involved, so
nothing pulls against the language loss. A very small loss per sequence guards against extremes
inside one sequence.
"""

import torch

import fathom
from fathom.model.router import sequence_balance_loss

config = fathom.ModelConfig(
    vocab_size=200, hidden_size=32, intermediate_size=32, moe_intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=16, n_group=4, topk_group=2,
    num_experts_per_tok=4, first_k_dense_replace=0, num_nextn_predict_layers=0, initializer_range=0.02,
)  # fmt: skip


def overload(gamma: float, steps: int = 400) -> float:
    """Max / mean load of a skewed router at the end of some steps of bias updates and nothing else."""
    torch.manual_seed(0)
    model = fathom.Transformer(config).train()
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        # Every token has something in common, which the later experts like.
        model.model.embed_tokens.weight += 0.02
        router.weight += torch.linspace(-0.02, 0.02, 16)[:, None]
    load = torch.zeros(16)
    for step in range(steps):
        with torch.no_grad():
            counted = model(torch.randint(200, (4, 64))).expert_load[0]
        fathom.update_bias(model, gamma)
        load += counted / 50 if step >= steps - 50 else 0  # the mean of the last 50 steps
    bias = router.e_score_correction_bias
    print(f"gamma {gamma}: load {load.int().tolist()}")
    print(
        f"             max/mean {load.max() / load.mean():.2f}, biases {bias.min():+.3f} to {bias.max():+.3f}"
    )
    return float(load.max() / load.mean())


skewed, balanced = overload(0.0), overload(1e-3)
assert skewed > 2 and balanced < 1.3

# Eqs 17-20: per sequence alpha * sum_i f_i P_i, which is alpha when the load is even, and more when not.
alpha = 1e-4
even = torch.eye(16).repeat(8, 1)[None] + 0.5  # token t likes expert t mod 16
loss_even = sequence_balance_loss(even, top_k=1, alpha=alpha).item()
one = torch.full((1, 128, 16), 0.5)
one[..., 3] = 1.5  # every token likes expert 3
loss_one = sequence_balance_loss(one, top_k=1, alpha=alpha).item()
print(
    f"sequence-wise loss with alpha {alpha}: {loss_even:.2e} when even, {loss_one:.2e} when all choose one"
)
assert abs(loss_even / alpha - 1) < 1e-5 and loss_one > 2 * alpha
