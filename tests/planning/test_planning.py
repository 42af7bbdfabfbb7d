"""The arithmetic of `fathom.planning` against published figures, the real module and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch

import fathom
from fathom.model import ModelConfig
from fathom.planning import (
    cache_bytes_per_token,
    count_parameters,
    describe,
    flops_per_token,
    forward_flops_per_token,
    training_memory,
)
from fathom.planning.describe import duration, gib, human

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=128,
)
VARIANTS = [
    {},
    {"q_lora_rank": None},
    {"tie_word_embeddings": True},
    {"num_nextn_predict_layers": 0},
    {"num_nextn_predict_layers": 3},
    {"n_shared_experts": 0, "first_k_dense_replace": 0},
    {"n_shared_experts": 2, "first_k_dense_replace": 3},
    {"moe_layer_freq": 2},
]


def test_published_sizes_of_the_671b_model() -> None:
    """Report §4.2 and the released files."""
    p = count_parameters(ModelConfig())
    assert p.main == 671_026_404_352
    assert p.main + p.router_biases == 671_026_419_200
    billions = [p.active_blocks, p.active_with_head, p.active, p.mtp, p.mtp_with_duplicates]
    assert [round(n / 1e9, 3) for n in billions] == [35.699, 36.626, 37.552, 11.610, 13.463]
    assert round(p.on_disk / 1e9, 2) == 684.49
    active_mtp = p.mtp - p.mtp_inactive
    sums = [active_mtp, active_mtp + p.vocabulary, active_mtp + 2 * p.vocabulary]
    assert [round(n / 1e9, 3) for n in sums] == [0.688, 1.615, 2.541]


def test_cache_of_the_671b_model() -> None:
    assert cache_bytes_per_token(ModelConfig()) == 70_272


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_equal_the_module(changes: dict) -> None:
    config = TINY.replace(**changes)
    with torch.device("meta"):
        model = fathom.Transformer(config)
    p = count_parameters(config)
    assert p.trained == model.num_parameters()
    assert p.main == sum(t.numel() for n, t in model.named_parameters() if ".mtp." not in n)
    main_routers = model.routers()[: len(model.routers()) - config.num_nextn_predict_layers]
    assert p.router_biases == sum(r.e_score_correction_bias.numel() for r in main_routers)


def test_flops_equal_products_counted_one_by_one() -> None:
    """torch's own counter over one forward pass; naive causal attention multiplies T keys where T/2 count."""
    from torch.utils.flop_counter import FlopCounterMode

    T = 16
    config = TINY.replace(num_nextn_predict_layers=0, num_experts_per_tok=8, topk_group=2)
    x = torch.randn(T, config.hidden_size)
    with FlopCounterMode(display=False) as counter:
        for layer in range(config.num_hidden_layers):
            for matrix in _matrices(config, layer):
                x.new_empty(T, matrix[1]) @ x.new_empty(matrix[1], matrix[0])
        x @ x.new_empty(config.hidden_size, config.vocab_size)
    per_pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = config.num_hidden_layers * per_pair * T * (T + 1) / 2
    expected = (counter.get_total_flops() + attention) / T
    assert forward_flops_per_token(config, T) == pytest.approx(expected)


def _matrices(config: ModelConfig, layer: int) -> list[tuple[int, int]]:
    """[out, in] of every matrix of a layer, read off a real module (all experts active)."""
    with torch.device("meta"):
        block = fathom.Transformer(config).model.layers[layer]
    shapes: list[tuple[int, int]] = []
    for parameter in block.parameters():
        if parameter.dim() == 2:
            shapes.append((parameter.shape[0], parameter.shape[1]))
        elif parameter.dim() == 3:
            shapes += [(parameter.shape[1], parameter.shape[2])] * parameter.shape[0]
    return shapes


def test_flops_grow_as_they_should() -> None:
    short, long = flops_per_token(TINY, 64), flops_per_token(TINY, 128)
    assert short < long < 2 * short
    assert flops_per_token(TINY, 64, mtp=False) < short
    assert flops_per_token(TINY, 64) == 3 * forward_flops_per_token(TINY, 64)
    # report §1 and Table 1: about 250 GFLOPs a token at 4K with 37B active parameters
    assert flops_per_token(ModelConfig(), 4096, mtp=False) == pytest.approx(2.46e11, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(recompute: bool) -> None:
    """Bytes of every tensor saved for backward, parameters aside, within a tenth of the formula."""
    config = TINY.replace(hidden_size=128, vocab_size=64)
    model = fathom.Transformer(config)
    model.set_recompute(recompute)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fathom.losses(model, torch.randint(0, 64, (2, 129)))
    assert loss.total.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values())
    heads = 4 * 2 * count_parameters(config).vocabulary
    expected = training_memory(config, 128, 2, recompute=recompute).activations
    assert measured - heads == pytest.approx(expected, rel=0.1)


def test_memory_classes() -> None:
    memory = training_memory(TINY, 64, 2)
    assert memory.weights == 4 * count_parameters(TINY).trained
    assert memory.moments == 2 * memory.gradients == 2 * memory.weights
    assert memory.total > memory.weights + memory.gradients + memory.moments + memory.activations
    assert training_memory(TINY, 64, 2, recompute=True).activations < memory.activations
    assert training_memory(TINY, 64, 2, compute_bytes=2).activations == memory.activations / 2


def test_logits_are_those_of_one_chunk_of_the_kernel() -> None:
    """At least 256 rows at a time, however large the vocabulary; never more than there are."""
    large = TINY.replace(vocab_size=129_280, num_nextn_predict_layers=0)

    def rows(seq_len: int, on_cpu: bool) -> float:
        memory = training_memory(large, seq_len, 1, on_cpu=on_cpu)
        head = count_parameters(large).vocabulary
        return (memory.logits / 4 - head) / large.vocab_size

    assert [rows(n, on_cpu=True) for n in (64, 4096)] == [64, 256]
    assert [rows(n, on_cpu=False) for n in (64, 4096)] == [64, 2**28 // 129_280]


def test_describe_says_what_it_costs() -> None:
    rows = dict(describe(TINY, seq_len=64, micro_batch=2, tokens=10**6, flops_per_second=1e9))
    assert f"{count_parameters(TINY).main:,}" in rows["parameters"]
    expected = flops_per_token(TINY, 64) * 1e6 / 1e9
    assert rows["time"].startswith(f"about {duration(expected)}")
    assert "time" not in dict(describe(TINY, seq_len=64, micro_batch=2, tokens=10**6))


def test_numbers_read_well() -> None:
    assert [human(n) for n in (7, 999.6, 1536, 999_600, 37.552e9, 671.03e9, 14.8e12)] == [
        "7", "1K", "1.54K", "1M", "37.6B", "671B", "14.8T",
    ]  # fmt: skip
    assert [gib(n) for n in (3 << 20, 5 << 30)] == ["3 MiB", "5.0 GiB"]
    assert [duration(s) for s in (5, 516, 9000, 86400 * 3)] == ["5 s", "8.6 min", "2.5 h", "3 days"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (512, "512"),
        (2048, "2.048K"),
        (999.92e9, "999.9B"),
        (14.633e12, "14.63T"),
        (469e9, "469B"),
        (12345e12, "12345T"),
    ],
)
def test_numbers_with_four_digits(number: float, text: str) -> None:
    assert human(number, 4) == text
