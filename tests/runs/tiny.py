"""A recipe and a corpus so small that a whole run takes a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fathom.runs.recipe import Recipe, recipe_from_dict

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
}
STAGE: dict[str, Any] = {
    "name": "pretrain",
    "steps": 12,
    "seq_len": 32,
    "batch": 4,
    "micro_batch": 2,
    "lr": 3e-3,
    "warmup_steps": 3,
}
SECOND_STAGE = {**STAGE, "name": "anneal", "steps": 4, "mtp_weight": 0.1, "gamma": 0.0}
MONITOR = {"eval_every": 5, "eval_tokens": 40, "sample_every": 6, "sample_tokens": 8}
MONITOR |= {"load_every": 3}


def tiny_dict(corpus: Path | str = "stdlib", **changes: Any) -> dict[str, Any]:
    """The recipe as nested tables; keyword arguments replace whole tables."""
    content = {
        "name": "tiny",
        "seed": 3,
        "model": dict(MODEL),
        "data": {"sources": [str(corpus)]},
        "checkpoint": {"every": 4, "keep": 2},
        "monitor": dict(MONITOR),
        "stages": [dict(STAGE)],
    }
    return {**content, **changes}


def tiny_recipe(corpus: Path | str = "stdlib", **changes: Any) -> Recipe:
    """The same, checked."""
    return recipe_from_dict(tiny_dict(corpus, **changes))


def write_corpus(path: Path, lines: int = 400) -> Path:
    """A text file with something to learn in it."""
    words = ["def", "return", "value", "index", "if", "else", "while", "total", "print", "name"]
    text = [
        f"{words[i % 10]} {words[i * i % 7]}({i % 13}) = {words[i % 3]}\n" for i in range(lines)
    ]
    path.write_text("".join(text))
    return path


LOGS = ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "load.jsonl", "positions.jsonl")
OF_THE_CLOCK = {"seconds", "tokens_per_second", "mfu"}


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All that a run's logs hold, but for what a clock decides."""
    return {
        log: [
            {key: value for key, value in json.loads(line).items() if key not in OF_THE_CLOCK}
            for line in (folder / log).read_text().splitlines()
        ]
        for log in LOGS
    }


def weights(folder: Path) -> dict[str, bytes]:
    """The exported model's tensors, bit for bit."""
    return {
        path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))
    }
