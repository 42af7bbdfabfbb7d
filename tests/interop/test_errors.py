"""Directories that are not a model, or not the one they say: every message names what is wrong and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fathom
from fathom.errors import CheckpointError, ConfigError
from tests.interop.tiny import tiny_config, tiny_model

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The content of a small export, one file."""
    place = tmp_path_factory.mktemp("export")
    fathom.save(tiny_model(tiny_config()), place)
    (file,) = place.glob("*.safetensors")
    return {"config": (place / "config.json").read_text()} | load_file(file)  # type: ignore[dict-item]


def refused(
    place: Path, tensors: dict[str, Any], change: Callable[[dict[str, Any]], None], **load: Any
) -> str:
    """The message for an export whose tensors were changed."""
    changed = dict(tensors)
    (place / "config.json").write_text(changed.pop("config"))
    change(changed)
    save_file(changed, place / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        fathom.load(place, **load)
    return str(error.value)


def test_missing_extra_and_misshapen_together(tmp_path: Path, tensors: dict[str, Any]) -> None:
    def change(t: dict[str, Any]) -> None:
        del t[GATE]
        t["model.layers.0.extra.weight"] = torch.ones(1)
        t[NORM] = torch.ones(63)
        t["lm_head.weight"] = t["lm_head.weight"].to(torch.int8)

    said = refused(tmp_path, tensors, change)
    assert f"1 missing: {GATE}" in said
    assert "1 not part of the model: model.layers.0.extra.weight" in said
    assert f"{NORM} is [63] instead of [64]" in said
    assert "lm_head.weight has a dtype that is neither" in said
    assert str(tmp_path) in said and "Fetch or export it again" in said


def test_many_are_counted(tmp_path: Path, tensors: dict[str, Any]) -> None:
    def change(t: dict[str, Any]) -> None:
        for expert in range(8):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                del t[f"model.layers.2.mlp.experts.{expert}.{kind}.weight"]

    said = refused(tmp_path, tensors, change)
    assert "24 missing: " in said and "and 16 more" in said and said.count("experts.") == 8


def test_half_an_mtp_module(tmp_path: Path, tensors: dict[str, Any]) -> None:
    said = refused(tmp_path, tensors, lambda t: t.pop("model.layers.3.eh_proj.weight"))
    assert "1 missing: model.layers.3.eh_proj.weight" in said


def test_mtp_asked_for_and_not_there(tmp_path: Path, tensors: dict[str, Any]) -> None:
    def change(t: dict[str, Any]) -> None:
        for name in [n for n in t if "layers.3." in n]:
            del t[name]

    assert "no MTP module" in refused(tmp_path, tensors, change, mtp=True)


def test_unannounced_mtp(tmp_path: Path, tensors: dict[str, Any]) -> None:
    config = json.loads(tensors["config"]) | {"num_nextn_predict_layers": 0}
    changed = tensors | {"config": json.dumps(config)}
    said = refused(tmp_path, changed, lambda t: None)
    assert "not part of the model: model.layers.3." in said and "mtp=False" in said
    assert fathom.load(tmp_path, mtp=False).config.num_nextn_predict_layers == 0


def test_lost_and_damaged_shards(tmp_path: Path) -> None:
    fathom.save(tiny_model(tiny_config()), tmp_path, max_shard_bytes=200_000)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=second.name):
        fathom.load(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {second.name} of its"):
        fathom.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../b.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="outside"):
        fathom.load(tmp_path)


def test_two_files_with_one_tensor(tmp_path: Path, tensors: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(tensors["config"])
    for name in ("a", "b"):
        save_file({NORM: tensors[NORM]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=NORM):
        fathom.load(tmp_path)


def test_pickles_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(tensors["config"])
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        fathom.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="can run code"):
        fathom.load(tmp_path)


def test_places_that_are_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        fathom.load(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="needs the package huggingface_hub"):
        fathom.load("someone/something")


def test_hub(tmp_path: Path, tensors: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, allow_patterns: list[str]) -> str:
        if name != "deepseek-ai/tiny":
            raise RuntimeError("offline")
        assert not any("py" in pattern or "bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    fathom.save(tiny_model(tiny_config()), tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetch))
    assert fathom.load("deepseek-ai/tiny").config == tiny_config()
    with pytest.raises(CheckpointError, match="RuntimeError: offline"):
        fathom.load("deepseek-ai/other")


def test_foreign_quantisation(tmp_path: Path, tensors: dict[str, Any]) -> None:
    config = json.loads(tensors["config"]) | {"quantization_config": {"quant_method": "gptq"}}
    fathom.save(tiny_model(tiny_config()), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'gptq'"):
        fathom.load(tmp_path)
