"""`fathom run` as a user mistypes it: one line that says what to do, and nothing in the way of the right command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fathom.cli import dry_run
from fathom.runs import execute
from fathom.runs.recipe import load_recipe
from fathom.runs.tables import to_toml
from tests.cli.calling import call
from tests.runs.tiny import tiny_dict, write_corpus


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, a corpus, and things that are neither."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.txt")
    (tmp_path / "tiny.toml").write_text(to_toml(tiny_dict("text.txt")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "junk.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "torn.toml").write_text("[model")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    (tmp_path / "short.txt").write_text("too short\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nanno"], "no recipe 'nanno': there is no such file; did you mean 'nano'?"),
        (["recipes/nano-ful.toml"], "did you mean 'nano-full'?"),
        (["empty"], "fathom's own recipes are gpu-1b, mini, nano"),
        (["torn.toml"], "torn.toml is not TOML"),
        (["junk.bin"], "junk.bin is not TOML"),
        ([], "Missing argument"),
        (["tiny.toml", "--data", "nowhere.txt"], "'nowhere.txt' is neither a file nor a folder"),
        (["tiny.toml", "--data", "it's not there"], "is neither a file nor a folder"),
        (["tiny.toml", "--data", "empty"], "nothing to train on in empty"),
        (["tiny.toml", "--data", "empty.txt"], "nothing to train on in empty.txt"),
        (["tiny.toml", "--data", "junk.bin"], "nothing to train on in junk.bin: 1 rejected"),
        (["tiny.toml", "--data", "short.txt"], "give more text"),
        (["tiny.toml", "--set", "stages.pretrain.warmup=1"], "did you mean 'warmup_steps'"),
        (["tiny.toml", "--set", "modle.hidden_size=8"], "did you mean 'model'"),
        (["tiny.toml", "--set", "stages.pretrain.lr"], "must look like stages.pretrain.lr=3e-4"),
        (["tiny.toml", "--set", "stages.sft.lr=1"], "no stage is called 'sft'"),
        (["tiny.toml", "--set", "stages.pretrian.lr=1"], "did you mean 'pretrain'?"),
        (["tiny.toml", "--set", "data.weights.txet=1"], "did you mean 'text'?"),
        (["tiny.toml", "--set", "stages.pretrain.lr=fast"], "must be a number"),
        (["tiny.toml", "--set", "stages.pretrain.seq_len=65"], "max_position_embeddings = 64"),
        (["tiny.toml", "--set", "model.n_group=3"], "n_group"),
        (["tiny.toml", "--set", "model.vocab_size=200"], "vocab_size=200 is too small"),
        (["tiny.toml", "--set", "data.tokenizer=nowhere"], "nowhere"),
        (["tiny.toml", "--device", "cuda:63"], "device 'cuda:63' cannot be used here"),
        (["tiny.toml", "--device", "toaster"], "device 'toaster' cannot be used here"),
        (["tiny.toml", "--device", "meta"], "device 'meta' cannot be used here"),
        (["tiny.toml", "--out", "foreign"], "foreign exists and is not a run folder"),
        (["tiny.toml", "--out", "text.txt"], "text.txt exists and is not a run folder"),
        (["tiny.toml", "--out", "text.txt/below"], "could not be written: Not a directory"),
        (["tiny.toml", "--steps", "3"], "No such option: --steps"),
        (["tiny.toml", "--dry-run", "--device", "toaster"], "device 'toaster' cannot be used here"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    arguments: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "run", *arguments)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert said in err


def test_after_a_mistake_the_right_command_works(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the default folder, with a name that asks for care in quoting."""
    monkeypatch.setattr(execute, "_report", lambda job: None)
    (place / 'it\'s "fine".txt').write_text((place / "text.txt").read_text())
    short = ["tiny.toml", "--set", "stages.pretrain.steps=3"]
    assert call(capsys, "run", *short, "--data", 'it\'s "fine"')[0] == 2
    status, out, err = call(capsys, "run", *short, "--data", 'it\'s "fine".txt')
    assert (status, err) == (0, "")
    assert "step 3/3  loss" in out and "fathom generate runs/tiny" in out
    assert (place / "runs" / "tiny" / "model" / "config.json").exists()


def test_dry_run_says_what_it_would_cost_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    status, out, err = call(
        capsys, "run", "tiny.toml", "--dry-run", "--set", "stages.pretrain.lr=0.5"
    )
    assert (status, err) == (0, "")
    assert "lr = 0.5\n" in out and "weight_decay = 0.1\n" in out, "the resolved recipe"
    for what in ("parameters", "active per token", "work per token", "memory", "time"):
        assert f"\n  {what}" in out, what
    row = next(line for line in out.splitlines() if line.startswith("pretrain "))
    assert " ".join(row.split()) == "pretrain 0 – 1.536K 12 32 4 0 → 0.5 0.001 0.3 0.0001 plain"
    work = [
        re.search(r"([\d.e+]+) operations", line)
        for line in out.splitlines()
        if "work in all" in line
    ]
    assert f"in all {work[0][1] if work[0] else None} operations" in out, "of the one stage"
    assert sorted(place.rglob("*")) == before


def test_the_table_of_the_reports_own_run(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.print_stages(load_recipe("v3-671b"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [
        "constant", "cosine", "low", "lowest", "extend-32k", "extend-128k",
    ]  # fmt: skip
    assert "0 – 10T " in lines[1] and "3,072 → 15,360 " in lines[1] and "0 → 0.00022 " in lines[1]
    assert "14.3T – 14.633T " in lines[3] and lines[6].endswith("YaRN 40")


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "run", "v3-671b", "--data", "text.txt", "--device", "cpu")
    assert status == 2 and err.count("\n") == 1
    assert "10,172 GiB" in err and "--dry-run" in err
    assert not (place / "runs").exists()
