"""Checkpoints: whole or not there, every altered byte found, a failing disk told and survived."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import CheckpointError
from fathom.train import checkpoint
from fathom.train.checkpoint import (
    checkpoints,
    newest_good,
    problem_with,
    read_state,
    read_tensors,
    remove_unfinished,
    save_checkpoint,
)


def tensors(step: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {
        "model.weight": torch.randn(40, 30),
        "model.bias": torch.randn(7).bfloat16(),
        "optimizer.step.weight": torch.tensor(float(step)),
        "random.cpu": torch.get_rng_state(),
    }


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(
        directory, step, tensors(step), {"step": step, "tokens": 10 * step}, keep
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


FILES = ("manifest.json", "state.json", "model-00001-of-00001.safetensors")


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 1)
    save(directory, 2)
    return directory


@pytest.fixture
def two(two_saved: Path, tmp_path: Path) -> Path:
    """Good checkpoints of steps 1 and 2, to be spoiled."""
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def test_what_goes_in_comes_out_bit_for_bit(two: Path) -> None:
    assert set(FILES) <= set(names(two / "step-2"))
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    read_tensors(two / "step-2", into)
    for name, tensor in tensors(2).items():
        assert torch.equal(into[name], tensor), name
    assert read_state(two / "step-2") == {"step": 2, "tokens": 20}


def test_the_last_k_are_kept_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    assert names(tmp_path) == sorted(["step-9", "step-10", "step-100"])


def test_one_made_again_takes_the_place_of_the_damaged(two: Path) -> None:
    (two / "step-2" / "state.json").write_text("{}")
    save(two, 2)
    assert problem_with(two / "step-2") is None
    assert names(two) == ["step-1", "step-2"]


def test_damaged_later_ones_never_push_out_a_good_one(two: Path) -> None:
    """Both were passed over and the run began anew: what it saves now must stay."""
    for step in (1, 2):
        save(two, 10 * step)
        (two / f"step-{10 * step}" / "state.json").write_text("{}")
    shutil.rmtree(two / "step-10")
    save(two, 5, keep=1)
    good = newest_good(two, lambda line: None)
    assert good is not None and good.name == "step-5"


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
def test_a_flipped_byte_is_found_named_and_the_one_before_used(
    name: str, where: float, two: Path
) -> None:
    path = two / "step-2" / name
    content = bytearray(path.read_bytes())
    content[round(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    good = newest_good(two, said.append)
    assert good is not None and good.name == "step-1"
    assert len(said) == 1 and "step-2 is damaged" in said[0]
    if name != "manifest.json":  # where the hash itself is altered, its file is what differs
        assert name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_a_torn_file_is_found(name: str, two: Path) -> None:
    path = two / "step-2" / name
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    good = newest_good(two, said.append)
    assert good is not None and good.name == "step-1" and name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, two: Path) -> None:
    (two / "step-2" / name).unlink()
    problem = problem_with(two / "step-2")
    assert problem is not None and name in problem


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"state.json": 3}', "", "\xff"])
def test_a_manifest_of_another_kind_is_found(manifest: str, two: Path) -> None:
    (two / "step-2" / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert problem_with(two / "step-2") is not None


def test_an_empty_folder_is_no_checkpoint_to_use(two: Path) -> None:
    (two / "step-3").mkdir()
    good = newest_good(two, lambda line: None)
    assert good is not None and good.name == "step-2"


def test_none_good_is_none(two: Path) -> None:
    for step in (1, 2):
        (two / f"step-{step}" / "state.json").unlink()
    said: list[str] = []
    assert newest_good(two, said.append) is None
    assert len(said) == 2
    assert newest_good(two / "nowhere", said.append) is None


def test_another_models_checkpoint_is_an_error_of_ours(two: Path) -> None:
    for into in ({"model.weight": torch.zeros(3, 3)}, {"model.other": torch.zeros(3)}):
        with pytest.raises(CheckpointError, match="step-2 does not fit this model"):
            read_tensors(two / "step-2", into)


def test_leftovers_of_a_killed_writer_are_removed(two: Path) -> None:
    (two / ".writing-3").mkdir()
    (two / ".writing-3" / "model-00001-of-00001.safetensors").write_bytes(b"half")
    remove_unfinished(two)
    assert names(two) == ["step-1", "step-2"]


# --- a disk that fails ---------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes: a real failing write, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses(two: Path) -> None:
    with pytest.raises(CheckpointError) as failed, files_up_to(2000):
        save(two, 3)
    message = str(failed.value)
    assert "step-3" in message and "File too large" in message
    assert "step-2" in message and "Make room" in message
    assert names(two) == ["step-1", "step-2"]
    assert save(two, 3).name == "step-3", "it must go on once there is room"
    assert problem_with(two / "step-3") is None


@pytest.mark.parametrize("place", ["_write_tensors", "sha256_of", "flush"])
def test_a_full_disk_wherever_it_is_met(
    place: str, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, place, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step-2"):
        save(two, 3)
    assert names(two) == ["step-1", "step-2"]


def test_the_first_one_that_fails_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no earlier one"), files_up_to(2000):
        save(tmp_path / "new", 1)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(tmp_path / "file", 1)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 64 KiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    try:
        save(place, 1)
        (place / "filler").write_bytes(bytes(30_000))
        with pytest.raises(CheckpointError, match=r"No space left on device.*step-1"):
            save(place, 2)
        assert names(place) == ["filler", "step-1"]
        assert problem_with(place / "step-1") is None
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_state_is_json_that_a_person_can_read(two: Path) -> None:
    assert json.loads((two / "step-1" / "state.json").read_text()) == {"step": 1, "tokens": 10}


def test_large_states_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is checked, and all together give back what was saved, whatever the sizes."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 3000)
    wanted = {f"part.{n}": torch.randn(20, 20) for n in range(8)}
    wanted |= {"scalar": torch.tensor(3.0), "big": torch.randn(100, 100), "last": torch.ones(1)}
    folder = save_checkpoint(tmp_path, 1, wanted, {"step": 1}, keep=1)
    files = sorted(folder.glob("*.safetensors"))
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    read_tensors(folder, found)
    assert len(files) > 3 and all(torch.equal(found[name], wanted[name]) for name in wanted)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    assert files[2].name in (problem_with(folder) or "")
