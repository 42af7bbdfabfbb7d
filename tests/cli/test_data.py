"""`fathom data prepare` and `fathom data inspect` as a user meets them, and a run on what they made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.cli.main import GROUPS
from tests.cli.calling import call
from tests.runs.tiny import tiny_recipe


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two sources with a copy, a broken line and a short document in them."""
    lines = [json.dumps({"text": f"def f{i}(): return {i * i}\n" * 9}) for i in range(80)]
    (tmp_path / "code.jsonl").write_text("\n".join([*lines, lines[3], "{broken"]))
    zh = [f"第{i}条河从山中流出，长{i * 7}里。" * 8 for i in range(80)]
    (tmp_path / "zh.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*zh, "短"]))
    return [f"code={tmp_path / 'code.jsonl'}", str(tmp_path / "zh.jsonl")]


@pytest.fixture
def made(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """Prepared data and what was printed."""
    status, out, err = call(
        capsys, "data", "prepare", *texts, "--out", str(tmp_path / "d"), "--vocab-size", "300", "--held-out", "0.2",
        "--filter", "too_short=20", "--dedup", "exact", "--weights", "code=3,zh=1", "--workers", "1",
    )  # fmt: skip
    assert (status, err) == (0, "")
    return tmp_path / "d", out


def test_prepare_tells_what_was_made_and_what_left_out(made: tuple[Path, str]) -> None:
    folder, out = made
    assert "left out: 1 broken JSON, 1 too_short, 1 exact duplicate; each is in" in out
    assert "to train on: " in out and f"fathom run RECIPE --data {folder}" in out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights"] == {"code": 3, "zh": 1}
    assert manifest["settings"]["normalise"] == ["mark", "zeros"]
    assert len((folder / "rejects.jsonl").read_text().splitlines()) == 3


def test_inspect_shows_everything(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call(capsys, "data", "inspect", str(made[0]), "--documents", "2")
    assert (status, err) == (0, "")
    for part in (
        "sources",
        "lengths in tokens",
        "tokens: ",
        "left out",
        "too_short",
        "broken JSON",
    ):
        assert part in out
    assert (
        out.count("▣") + out.count("…\n") >= 4
        and "code/code.jsonl:" in out
        and "zh/zh.jsonl:" in out
    )
    _, one, _ = call(capsys, "data", "inspect", str(made[0]), "--source", "zh", "--held-out")
    assert "code/code.jsonl" not in one and "zh/zh.jsonl:" in one


def test_inspect_fits_into_80_columns(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is cut, no row of a table goes over two lines."""
    manifest = json.loads((made[0] / "manifest.json").read_text())
    source = manifest["sources"]["code"]
    source["tokens"]["train"], source["documents"]["train"] = 1_234_567_890, 12_345_678
    source["path"] = "/a/long/way/down" * 6
    (made[0] / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call(capsys, "data", "inspect", str(made[0]), "--documents", "1")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("code  "))
    held_out = f"{source['tokens']['held_out']:,}"
    assert row.split()[1:4] == ["3", "12,345,678", "1,234,567,890"]
    assert row.split()[5:] == [held_out, source["held_out_kind"]]
    assert "".join(lines).count("/a/long/way/down") == 6
    at = next(i for i, line in enumerate(lines) if "code: unreadable, broken JSON" in line)
    assert lines[at].split()[0] == "1" and "code.jsonl:82: '{broken'" in lines[at + 1]


def test_a_run_trains_on_it(
    made: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "fathom.runs.execute._report", lambda job: None
    )  # takes longer than the run
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe().to_toml())
    arguments = ["run", str(recipe), "--data", str(made[0]), "--out", str(tmp_path / "run")]
    status, _, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    data = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert data["opened_from"] == str(made[0])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12
    assert call(capsys, *arguments)[0] == 0
    manifest = json.loads((made[0] / "manifest.json").read_text())
    (made[0] / "manifest.json").write_text(json.dumps(manifest | {"weights": {"zh": 1}}))
    status, _, err = call(capsys, *arguments)
    assert status == 2 and "was trained on another mixture than" in err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rejects.jsonl", None, "rejects.jsonl is missing or damaged"),
        ("files.json", "{", "files.json is missing or damaged"),
        ("manifest.json", '{"settings": {"format": 2}}', "no sound manifest.json"),
    ],
)
def test_a_damaged_folder_is_named(
    file: str, content: str | None, message: str, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (made[0] / file).write_text(content) if content else (made[0] / file).unlink()
    status, _, err = call(capsys, "data", "inspect", str(made[0]))
    assert status == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data", "prepare", "stdlib", "--out", "x", "--seed", "9" * 70],
            "has more than 50 digits",
        ),
        (["data", "prepare"], "Missing argument"),
        (["data", "prepare", "nowhere", "--out", "x"], "neither a file nor a folder"),
        (["data", "prepare", "stdlib", "--out", "x", "--weights", "a"], "'a' is not understood"),
        (["data", "prepare", "stdlib", "--out", "x", "--dedup", "all"], "dedup='all' is not known"),
        (
            ["data", "prepare", "stdlib", "--out", "x", "--workers", "0"],
            "workers=0 must be 1 or more",
        ),
        (["data", "inspect", "nowhere"], "is not prepared data"),
        (["data", "frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, (_, ns) in GROUPS.items() for n in ns])
def test_commands_of_groups_explain_themselves(
    group: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, group, name, "--help")
    assert (status, err) == (0, "") and f"fathom {group} {name}" in out
    assert name in call(capsys, group, "--help")[1]
