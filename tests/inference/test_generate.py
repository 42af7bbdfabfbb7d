"""Generation on the latent cache says what a full forward pass would, whatever way the text came in."""

from __future__ import annotations

import pytest
import torch

import fathom
from fathom.errors import GenerationError
from fathom.inference import Sampling, generate


@pytest.fixture(scope="module")
def model() -> fathom.Transformer:
    torch.manual_seed(0)
    return fathom.Transformer(
        fathom.ModelConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            moe_intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=3,
            q_lora_rank=20,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=12,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            max_position_embeddings=600,
            initializer_range=0.3,
        )
    ).eval()


def naive_greedy(model: fathom.Transformer, ids: list[int], count: int) -> list[int]:
    """The whole text through the whole model for each token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), mtp=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(60))])
def test_greedy_equals_the_naive_loop(model: fathom.Transformer, prompt: list[int]) -> None:
    assert generate(model, prompt, 24) == naive_greedy(model, prompt, 24)


def test_a_cache_that_grows_says_the_same(model: fathom.Transformer) -> None:
    prompt = [i * 7 % 97 for i in range(250)]
    assert generate(model, prompt, 20) == naive_greedy(model, prompt, 20)


def test_seeded_sampling_repeats(model: fathom.Transformer) -> None:
    runs = [generate(model, [1, 2], 30, Sampling(1.0, 0.95, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_token_ends_and_is_left_out(model: fathom.Transformer) -> None:
    free = generate(model, [1, 2, 3], 20)
    stop = free[4]
    assert generate(model, [1, 2, 3], 20, stop_ids={stop}) == free[: free.index(stop)]


def test_a_sample_in_the_middle_of_training_leaves_no_trace(model: fathom.Transformer) -> None:
    model.train()
    for router in model.routers():
        router.expert_load.zero_()
    generate(model, [1, 2, 3], 3)
    assert model.training and not any(r.expert_load.any() for r in model.routers())
    model.eval()


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([1], 0, "max_new_tokens=0 must be at least 1"),
        ([], 5, "prompt is empty"),
        ([1] * 600, 1, "600 tokens fills the model's context of 600"),
        ([1] * 601, 1, "601 tokens fills"),
        ([1] * 590, 11, "ask for at most 10 new tokens"),
        ([1, 97], 1, "token id 97 is outside the model's vocabulary of 97"),
        ([-1], 1, "token id -1"),
    ],
)
def test_requests_that_cannot_be_answered(
    model: fathom.Transformer, prompt: list[int], count: int, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        generate(model, prompt, count)


def test_the_context_can_be_used_up(model: fathom.Transformer) -> None:
    assert len(generate(model, [1] * 590, 10)) == 10
