"""Saving is atomic, replaces exports only, and takes what memory it says; so does loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fathom
from fathom.errors import CheckpointError
from fathom.interop import writing
from tests.interop.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]


class Words:
    """A tokenizer as far as saving it goes."""

    def save(self, directory: Path, model_max_length: int) -> None:
        (directory / "tokenizer.json").write_text("{}")


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_an_export_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    fathom.save(tiny_model(tiny_config()), place, tokenizer=Words(), max_shard_bytes=100_000)
    assert "tokenizer.json" in names(place)
    second = tiny_model(tiny_config(), seed=1)
    fathom.save(second, place)
    assert names(place) == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    assert torch.equal(fathom.load(place).lm_head.weight, second.lm_head.weight)
    assert names(place.parent) == {"model"}


@pytest.mark.parametrize("content", ["notes.txt", "config.json", "sub"])
def test_anything_else_is_not(tmp_path: Path, content: str) -> None:
    place = tmp_path / "work"
    place.mkdir()
    if content == "sub":
        fathom.save(tiny_model(tiny_config()), place)
        (place / "sub").mkdir()
    else:
        (place / content).write_text('{"model_type": "llama"}')
    before = names(place)
    with pytest.raises(CheckpointError, match="not replaced"):
        fathom.save(tiny_model(tiny_config()), place)
    assert names(place) == before
    with pytest.raises(CheckpointError, match="is a file"):
        fathom.save(tiny_model(tiny_config()), Path(__file__))


@pytest.mark.parametrize("step", ["save_file", "_put_in_place"])
def test_a_failed_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = tiny_model(tiny_config())
    fathom.save(first, tmp_path / "model")
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(writing, step, full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            fathom.save(tiny_model(tiny_config(), seed=1), tmp_path / "model")
    assert torch.equal(fathom.load(tmp_path / "model").lm_head.weight, first.lm_head.weight)
    assert names(tmp_path) == {"model"}


MEASURE = """
import json, sys, torch, fathom
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def peak(action):
    open("/proc/self/clear_refs", "w").write("5")  # forget the highest mark so far
    before = status("VmRSS")
    kept = action()
    return status("VmHWM") - before, kept
place, out, shard = sys.argv[1], sys.argv[2], int(sys.argv[3])
fathom.load(place)  # once for all that is imported and allocated the first time only
loading, model = peak(lambda: fathom.load(place, dtype=torch.float32))
size = sum(t.nbytes for t in model.state_dict().values())
saving, _ = peak(lambda: fathom.save(model, out, max_shard_bytes=shard))
print(json.dumps({"size": size, "loading": loading, "saving": saving}))
"""


STATUS = Path("/proc/self/status")
HAS_MARKS = STATUS.exists() and "VmHWM" in STATUS.read_text()


@pytest.mark.skipif(not HAS_MARKS, reason="reads the memory marks of Linux")
def test_memory_is_the_model_and_one_shard(tmp_path: Path) -> None:
    config = tiny_config(
        vocab_size=20000, hidden_size=256, moe_intermediate_size=512, n_routed_experts=32
    )
    shard = 24 * 2**20
    fathom.save(fathom.Transformer(config), tmp_path / "model", max_shard_bytes=shard)
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        str(shard),
    ]
    # so that the C allocator gives freed tensors back at once, and the marks show what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    used = json.loads(done.stdout)
    slack = 8 * 2**20
    assert used["size"] > 6 * shard
    assert used["loading"] <= used["size"] + shard + slack
    assert used["saving"] <= shard + slack
