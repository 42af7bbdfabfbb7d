"""`fathom export` on directories and run folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fathom
from fathom.data import Tokenizer
from fathom.runs.execute import run
from tests.cli.calling import call
from tests.runs.tiny import MODEL, STAGE, tiny_recipe
from tests.speaking import small_config

CONFIG = small_config(300)


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, out, err = call(capsys, "export", *arguments)
    assert status == 0, err
    return out


def test_a_run_folder_becomes_a_directory_in_another_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run, out = fathom.Transformer(CONFIG), tmp_path / "run", tmp_path / "out"
    fathom.save(model, run / "model", Tokenizer.train(["def f(x): return x"] * 9, 300))
    said = export(capsys, str(run), str(out), "--dtype", "bfloat16")
    again = fathom.load(out)
    assert f"{model.num_parameters():,} parameters" in said
    assert again.config == CONFIG
    for name, tensor in model.state_dict().items():
        expected = tensor if "bias" in name else tensor.bfloat16()
        assert torch.equal(again.state_dict()[name], expected), name
    assert Tokenizer.load(out).fingerprint == Tokenizer.load(run / "model").fingerprint


def test_a_directory_without_tokenizer_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom.save(fathom.Transformer(CONFIG), tmp_path / "model")
    said = export(capsys, str(tmp_path / "model"), str(tmp_path / "out"))
    assert "without a tokenizer" in said
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert fathom.load(tmp_path / "out").config == CONFIG


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of three steps, `run` in the present folder."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(200)))
    model, stage = {**MODEL, "tie_word_embeddings": True}, {**STAGE, "steps": 3}
    return run(tiny_recipe("text.txt", model=model, stages=[stage]), "run")


def test_a_run_without_an_export_gives_its_newest_checkpoint(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = fathom.load(run_folder / "model").state_dict()
    shutil.rmtree(run_folder / "model")
    said = export(capsys, "run", "out")
    assert "step-3" in said
    again = fathom.load("out")
    assert again.config.tie_word_embeddings
    assert all(torch.equal(again.state_dict()[name], t) for name, t in exported.items())
    assert Tokenizer.load("out").vocab_size == 300


def test_an_export_of_an_earlier_stage_is_not_taken_for_the_last_word(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "step-3" not in export(capsys, "run", "out")
    recipe_file = run_folder / "recipe.toml"  # as if more steps were to come
    recipe_file.write_text(recipe_file.read_text().replace("steps = 3", "steps = 9"))
    assert "step-3" in export(capsys, "run", "further")


def test_a_file_for_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = Tokenizer.train(["def f(x): return x"] * 9, 300)
    fathom.save(fathom.Transformer(CONFIG), tmp_path / "model", tokenizer)
    place = tmp_path / "model.gguf"
    said = export(capsys, str(tmp_path / "model"), str(place), "--format", "gguf", "--type", "q8_0")
    assert f"{place}: 0.1 MB" in said and "without 1 of its MTP modules" in said
    reader = gguf.GGUFReader(place)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q8_0" and "blk.2.attn_norm.weight" not in types
    assert reader.fields["tokenizer.ggml.pre"].contents() == "deepseek-v3"


def test_options_of_the_other_format_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom.save(fathom.Transformer(CONFIG), tmp_path / "model")
    source, out = str(tmp_path / "model"), str(tmp_path / "out")
    for options, remedy in (
        (("--format", "gguf", "--dtype", "float16"), "use --type"),
        (("--type", "f16"), "use --dtype"),
        (("--mtp",), "is for --format gguf"),
        (("--format", "gguf", "--mtp"), "q_lora_rank=None"),
        (("--format", "gguf", "--type", "float32"), "'float32' is not one of"),
    ):
        status, _, err = call(capsys, "export", source, out, *options)
        assert status == 2 and remedy in err
    assert not (tmp_path / "out").exists()
