"""The run folder: whose it is, logs that hold each step once, and disks that fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.errors import FathomError, RecipeError
from fathom.runs.folder import RunFolder
from fathom.runs.recipe import Recipe
from tests.runs.tiny import STAGE, tiny_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    found = RunFolder(tmp_path / "runs" / "tiny")
    yield found
    found.close()


def again(folder: RunFolder, recipe: Recipe) -> None:
    """Claim the folder as a later process would."""
    folder.close()
    later = RunFolder(folder.path)
    try:
        later.claim(recipe)
    finally:
        later.close()


def begun(folder: RunFolder) -> RunFolder:
    """A run that made a step."""
    folder.claim(tiny_recipe())
    folder.append("metrics.jsonl", {"step": 1})
    return folder


# --- whose it is ---------------------------------------------------------------------------------


def test_a_new_folder_gets_the_resolved_recipe(folder: RunFolder) -> None:
    folder.claim(tiny_recipe())
    assert folder.read_recipe() == tiny_recipe()
    assert "weight_decay = 0.1\n" in folder.recipe_file.read_text(), "defaults are written out"


def test_the_same_recipe_may_come_again(folder: RunFolder) -> None:
    again(begun(folder), tiny_recipe())


def test_another_recipe_is_refused_with_the_difference(folder: RunFolder) -> None:
    other = tiny_recipe(seed=9, stages=[{**STAGE, "lr": 1.0}])
    with pytest.raises(RecipeError) as refused:
        again(begun(folder), other)
    assert "seed: 3 → 9; stages.pretrain.lr: 0.003 → 1.0" in str(refused.value)
    assert "--out" in str(refused.value)
    assert folder.read_recipe() == tiny_recipe()


def test_a_command_that_came_to_nothing_can_be_corrected(folder: RunFolder) -> None:
    """A mistyped --data is found after the folder was made."""
    folder.claim(tiny_recipe("mistyped.txt"))
    again(folder, tiny_recipe("right.txt"))
    assert folder.read_recipe().data.sources == ("right.txt",)


def test_data_of_a_recipe_that_could_not_begin_makes_way(folder: RunFolder) -> None:
    """A corpus that is too short is found after it was prepared."""
    folder.claim(tiny_recipe("short.txt"))
    folder.data.mkdir()
    again(folder, tiny_recipe("short.txt"))
    assert folder.data.exists()
    again(folder, tiny_recipe("long.txt"))
    assert not folder.data.exists()


def test_a_kill_in_the_very_first_moment_leaves_nothing_in_the_way(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / ".recipe.toml.writing").write_text('name = "ti')
    (folder.path / ".lock").touch()
    folder.claim(tiny_recipe())
    assert folder.read_recipe() == tiny_recipe()


def test_somebodys_folder_is_left_alone(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(FathomError, match=r"is not a run folder.*--out"):
        folder.claim(tiny_recipe())
    assert os.listdir(folder.path) == ["thesis.tex"]


def test_somebodys_recipe_is_left_as_it_is(folder: RunFolder) -> None:
    """`fathom run recipe.toml --out .` beside a recipe that a person wrote."""
    own = "# my notes\n" + tiny_recipe().to_toml()
    folder.path.mkdir(parents=True)
    folder.recipe_file.write_text(own)
    with pytest.raises(RecipeError, match="holds another run"):
        folder.claim(tiny_recipe(seed=9))
    folder.claim(tiny_recipe())
    assert folder.recipe_file.read_text() == own


def test_what_decides_no_number_may_change_later(folder: RunFolder) -> None:
    begun(folder)
    other = tiny_recipe(checkpoint={"every": 2, "keep": 5}, monitor={"sample_tokens": 3})
    again(folder, other)
    assert folder.read_recipe() == other
    with pytest.raises(RecipeError, match=r"holds another run \(seed: 3 → 9\)"):
        again(folder, tiny_recipe(seed=9))
    assert folder.read_recipe() == other


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(FathomError, match="is not a run folder"):
        RunFolder(tmp_path / "file").claim(tiny_recipe())
    with pytest.raises(FathomError, match="could not be written"):
        RunFolder(tmp_path / "file" / "below").claim(tiny_recipe())


@pytest.mark.parametrize("content", [b"[model", b"\xff\xfe\x00"])
def test_a_broken_recipe_in_the_folder_is_told(content: bytes, folder: RunFolder) -> None:
    begun(folder).recipe_file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        again(folder, tiny_recipe())


def test_two_at_once_are_refused(folder: RunFolder) -> None:
    begun(folder)
    second = RunFolder(folder.path)
    with pytest.raises(FathomError, match="in use by another process"):
        second.claim(tiny_recipe())
    second.close()


# --- logs ----------------------------------------------------------------------------------------


def steps(folder: RunFolder, log: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (folder.path / log).read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_forgotten_in_every_log(folder: RunFolder) -> None:
    folder.claim(tiny_recipe())
    for step in range(1, 8):
        folder.append("metrics.jsonl", {"step": step, "loss": 1.5})
    folder.append("samples.jsonl", {"step": 4, "text": "mehr Licht\u2028\n"})
    folder.append("evals.jsonl", {"step": 7})
    folder.close()
    folder.forget_after(4)
    assert steps(folder) == [1, 2, 3, 4]
    sample = json.loads((folder.path / "samples.jsonl").read_text())
    assert sample == {"step": 4, "text": "mehr Licht\u2028\n"}
    assert (folder.path / "evals.jsonl").read_text() == ""
    assert not (folder.path / "load.jsonl").exists()


def test_a_line_is_found_by_some_of_its_values(folder: RunFolder) -> None:
    folder.claim(tiny_recipe())
    assert folder.line_with("positions.jsonl", {"step": 1}) is None
    line = {"step": 1, "stage": "a", "edges": [0, 1]}
    folder.append("positions.jsonl", line)
    assert folder.line_with("positions.jsonl", {"stage": "a", "edges": [0, 1]}) == line
    assert folder.line_with("positions.jsonl", {"stage": "a", "step": 2}) is None
    assert folder.line_with("positions.jsonl", {"stage": "a", "when": "before"}) is None


WHOLE = json.dumps({"step": 3, "text": "é", "loss": 12.5}, ensure_ascii=False).encode()


@pytest.mark.parametrize("length", range(len(WHOLE) + 2))
def test_a_last_line_cut_short_anywhere_leaves_each_step_once(
    length: int, folder: RunFolder
) -> None:
    """Step 3 is complete as soon as its last brace stands there, and is not doubled when it comes again."""
    folder.claim(tiny_recipe())
    lines = b'{"step": 1}\n{"step": 2}\n' + (WHOLE + b"\n")[:length]
    (folder.path / "metrics.jsonl").write_bytes(lines)
    folder.forget_after(2)
    for step in (3, 4):
        folder.append("metrics.jsonl", {"step": step})
    assert steps(folder) == [1, 2, 3, 4]
    folder.close()
    folder.forget_after(3)
    assert steps(folder) == [1, 2, 3]


def test_lines_are_there_at_once(folder: RunFolder) -> None:
    begun(folder)
    assert steps(folder) == [1], "a kill after this moment must not lose it"


# --- a disk that fails ---------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_while_logging_is_one_clear_error(folder: RunFolder) -> None:
    folder.claim(tiny_recipe())
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(FathomError, match=r"metrics\.jsonl could not be written: No space left"):
        folder.append("metrics.jsonl", {"step": 1})
    folder.close()  # tries to write what is left once more, and must not hide the error above


def test_a_small_file_is_replaced_whole_or_not_at_all(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(folder).write("environment.json", '{"torch": "1"}')

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FathomError, match="No space left on device"):
        folder.write("environment.json", '{"torch": "2"}')
    assert folder.read_environment() == {"torch": "1"}
