"""Lesson 8 — files that others read (tensor names of the released model; report §2 for what they
are).

In memory a layer's experts are one stack, for grouped products. On disk every expert has its
released name, MTP modules are the layers after the last, and config.json is in the released style.
`transformers` and the converters of other projects read such a directory as if it came from
DeepSeek.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

import fathom

torch.manual_seed(0)
config = fathom.ModelConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_group=4, topk_group=2,
    num_experts_per_tok=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip
model = fathom.Transformer(config).eval()

with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / "tiny-v3"
    fathom.save(model, place)
    for file in sorted(place.iterdir()):
        print(f"{file.stat().st_size:9,} bytes  {file.name}")
    written = json.loads((place / "config.json").read_text())
    print({key: written[key] for key in ("model_type", "topk_method", "scoring_func")})
    weight_map = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(place / weight_map["lm_head.weight"], framework="pt") as shard:
        one = shard.get_tensor("model.layers.1.mlp.experts.5.up_proj.weight")
    again = fathom.load(place)
    without = fathom.load(place, dtype=torch.bfloat16, mtp=False)

# Expert 5's up-projection is the lower half of row 5 of the stack.
stack = model.model.layers[1].mlp.experts.gate_up_proj
print(
    f"{len(weight_map)} tensors on disk, {len(model.state_dict())} in memory, stack {[*stack.shape]}"
)
assert torch.equal(one, stack[5, 32:])

# The MTP module follows layers 0 and 1; embedding and head are stored again with it, as released.
for name in ("eh_proj", "embed_tokens", "shared_head.head"):
    assert f"model.layers.2.{name}.weight" in weight_map

# What comes back is the same model, bit for bit.
tokens = torch.randint(300, (1, 20))
assert again.config == config
for name, tensor in again.state_dict().items():
    assert torch.equal(tensor, model.state_dict()[name])
assert torch.equal(model(tokens).logits, again(tokens).logits)
print("the loaded model gives the same logits, bit for bit")
assert len(without.model.mtp) == 0 and without.lm_head.weight.dtype == torch.bfloat16
