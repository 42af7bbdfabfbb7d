"""The GPU benchmarks run end to end at toy size on a CPU, and their figures follow from one
another.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.parallel.processes import run

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/gpu as a module; what it does to the import path is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for shared in ("device", "harness"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(module: ModuleType, folder: Path) -> dict[str, Any]:
    path = folder / "figures.json"
    module.main(["--toy", "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def test_training_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = _run(_module("train", monkeypatch), tmp_path)
    tokens = figures["batch"] * figures["seq_len"]
    median = statistics.median(figures["step_seconds"])
    assert figures["tokens_per_second"] == pytest.approx(tokens / median)
    # 6 per parameter and token is what a dense model would need; attention adds less than that
    assert 0 < figures["flops_per_second"] < 12 * figures["parameters"] * tokens / median
    expected = figures["flops_per_second"] / figures["matmul_flops_per_second"]
    assert figures["mfu_of_measured"] == pytest.approx(expected)
    assert "tokens per second" in capsys.readouterr().out


def test_decoding_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _module("decode", monkeypatch)
    figures = _run(module, tmp_path)
    assert [(row["batch"], row["context"]) for row in figures["rows"]] == [(1, 16), (2, 16)]
    config = module.configuration("", toy=True)
    per_token = 2 * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    for row in figures["rows"]:
        assert row["bytes"]["cache"] == row["batch"] * row["context"] * per_token
    assert "of copy rate" in capsys.readouterr().out


def test_weights_touched_are_those_of_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token uses K experts; very many use all, which is every parameter but the embedding."""
    module = _module("decode", monkeypatch)
    config = module.configuration("", toy=True)
    model = module.fathom.Transformer(config)
    whole = model.num_parameters() - model.model.embed_tokens.weight.numel()
    assert module.bytes_touched(config, 10_000, 0)["weights"] == pytest.approx(2 * whole)
    unused = (config.n_routed_experts - config.num_experts_per_tok) * 3
    unused *= config.hidden_size * config.moe_intermediate_size
    assert module.bytes_touched(config, 1, 0)["weights"] == pytest.approx(2 * (whole - unused))


def of_a_pair(module: ModuleType) -> tuple[dict[str, float], dict[str, list[float]]]:
    config = module.ModelConfig(**module.TOY).replace(num_hidden_layers=2)
    layers = module.Layers(config, (2, 24), torch.device("cpu"))
    return module.equal(layers), module.timed(layers, rounds=1)


def test_pairs_that_send_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("parallel", monkeypatch)
    [(difference, seconds)] = run(of_a_pair, 1, module)
    assert difference.keys() == seconds.keys() and len(difference) == 2 * len(module.ORDERS)
    assert max(difference.values()) <= module.CLOSE
    assert all(one > 0 for times in seconds.values() for one in times)


def test_refuses_a_machine_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("train", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main(["--steps", "1"])


def test_streams_beside_the_busiest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computation 0–10 and 12–20 ms on stream 7; transfers 2–4 (over each other) and 9–13 ms on two others."""
    spans = [(7, 0, 10), (7, 12, 20), (8, 2, 4), (9, 3, 4), (9, 9, 13)]
    events = [
        {"cat": "kernel", "ph": "X", "ts": 1000 * a, "dur": 1000 * (b - a), "args": {"stream": s}}
        for s, a, b in spans
    ]
    found = _module("streams", monkeypatch).beside([*events, {"cat": "cpu_op", "ph": "X"}])
    assert found == {"network_ms": 6.0, "both_ms": 4.0, "share": pytest.approx(4 / 6)}
