"""Lesson 9 — where 671 billion parameters are (report §1, §4.2).

On torch's meta device a model has shapes but no memory, so the released one can be built and
counted on any machine. Of its experts a token meets 8 in 256: that is how 671B become 37B active.
"""

import time

import torch

import fathom

config = fathom.ModelConfig()
start = time.perf_counter()
with torch.device("meta"):
    model = fathom.Transformer(config)
print(
    f"built in {time.perf_counter() - start:.1f} s: {model.num_parameters():,} parameters with MTP"
)


def count(module: torch.nn.Module) -> int:
    """Parameters of a part; the router's bias is a buffer and not one of them."""
    return sum(parameter.numel() for parameter in module.parameters())


dense, sparse = model.model.layers[0], model.model.layers[60]
expert = count(sparse.mlp.experts) // config.n_routed_experts
parts = {
    "attention of a layer (MLA)": count(sparse.self_attn),
    "dense feed-forward block": count(dense.mlp),
    "one expert": expert,
    "a whole MoE block": count(sparse.mlp),
    "embedding": count(model.model.embed_tokens),
    "output head": count(model.lm_head),
    "MTP module": count(model.model.mtp),
}
for name, number in parts.items():
    print(f"{name:28} {number:15,}")
assert parts["attention of a layer (MLA)"] == 187_107_328
assert parts["dense feed-forward block"] == 396_361_728
assert expert == 44_040_192
assert count(sparse.mlp) == 11_320_164_352  # 256 + 1 experts and the router

main = count(model) - parts["MTP module"]
idle = config.n_routed_experts - config.num_experts_per_tok
active = main - 58 * idle * expert - parts["embedding"]  # looking a row up is no work
print(
    f"main model {main:,}, of which active {active / 1e9:.2f}B ({active / main:.1%}), head included"
)
assert main == 671_026_404_352
assert round(active / 1e9, 3) == 36.626
assert round(parts["MTP module"] / 1e9, 2) == 11.61
