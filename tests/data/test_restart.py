"""A preparation killed at any moment goes on and ends with the same bytes; so it does for any number of workers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.data import prepare
from fathom.data.pipeline.work import WorkFolder
from fathom.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

# A preparation cut into many small units, that can kill itself when it comes by a function for the n-th time.
SCRIPT = """
import os, signal, sys
from fathom.data import prepare, units
from fathom.data.pipeline import making, packing, result, work
units.units_of.__defaults__ = (2000,)
units.parts_of.__defaults__ = (2000,)
making.STRETCH_BYTES = 1500
packing.buckets.__defaults__ = (1500,)
if __name__ == "__main__":
    out, source, workers, where, times = sys.argv[1:]
    left = int(times)
    def dying(real):
        def function(*given, **named):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)
        return function
    if where == "rename":
        work.synchronise = dying(work.synchronise)
    if where == "move":
        result._move = dying(result._move)
    if where == "manifest":
        result.write_manifest = dying(result.write_manifest)
    prepare(out, [source], "bpe", 300, held_out=0.2, dedup="near", workers=int(workers), say=print,
        filters=["too_short=30"])
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in one file that is read in many parts, with copies and broken lines."""
    path = tmp_path_factory.mktemp("corpus") / "lines.jsonl"
    with path.open("w") as file:
        for i in range(60):
            words = [f"{hashlib.sha256(f'{i} {k}'.encode()).hexdigest()[:6]}" for k in range(40)]
            text = " ".join(words[: 3 if i % 9 == 0 else 40])
            file.write(json.dumps({"text": text}) + "\n")
            if i % 7 == 0:
                file.write(json.dumps({"text": text.replace(words[5], "other")}) + "\n{broken\n")
    return path


def call(
    folder: Path, out: Path, corpus: Path, workers: int = 1, where: str = "", times: int = 0
) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(out), str(corpus), str(workers), where, str(times)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the note of when they were verified."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a preparation without interruption gives."""
    folder = tmp_path_factory.mktemp("whole")
    done = call(folder, folder / "out", corpus)
    assert done.returncode == 0, done.stderr
    return content(folder / "out")


def test_the_corpus_has_everything_that_can_go_wrong(whole: dict[str, bytes]) -> None:
    manifest = json.loads(whole["manifest.json"])
    assert len([name for name in whole if name.endswith(".bin")]) > 6
    assert manifest["rejects"]["counts"] == {"broken JSON": 9}
    assert manifest["filters"] == {"too_short": 8} and manifest["duplicates"]["near"] == 8
    lines = [json.loads(line) for line in whole["rejects.jsonl"].decode().splitlines()]
    broken = [line["place"] for line in lines if line["kind"] == "unreadable"]
    assert broken == [f"lines.jsonl:{3 + 9 * i}" for i in range(9)]  # whatever part they lie in


@pytest.mark.parametrize(
    "deaths", [[("rename", 2), ("rename", 4), ("rename", 9)], [("rename", 30), ("move", 3), ("manifest", 1)]]
)  # fmt: skip
def test_killed_at_several_moments_it_ends_with_the_same_bytes(
    deaths: list[tuple[str, int]], corpus: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for where, times in deaths:
        assert call(tmp_path, out, corpus, 1, where, times).returncode == -signal.SIGKILL
        assert not out.exists()
    done = call(tmp_path, out, corpus)
    assert done.returncode == 0 and done.stdout.startswith("going on where it was stopped")
    assert content(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "script.py"]


def test_workers_change_no_byte_and_leave_with_a_killed_parent(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out), str(corpus), "3", "", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    pieces = tmp_path / ".out.building" / "read"
    while not (pieces.is_dir() and any(pieces.glob("0*"))) and process.poll() is None:
        time.sleep(0.01)
    children = _children(process.pid)
    process.kill()
    process.wait()
    assert children
    deadline = time.monotonic() + 20
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)
    done = call(tmp_path, out, corpus, workers=2)
    assert done.returncode == 0, done.stderr
    assert content(out) == whole


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_what_is_done(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(line: str) -> None:
        if line.startswith("encoding"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(out, [str(corpus)], "bpe", 300, held_out=0.2, say=interrupt)
    assert not out.exists()
    said: list[str] = []
    prepare(out, [str(corpus)], "bpe", 300, held_out=0.2, say=said.append)
    assert said[0] == "going on where it was stopped"
    assert not any(line.startswith("training") for line in said)  # that was done


def test_a_changed_source_or_setting_begins_anew(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "lines.jsonl"
    source.write_bytes(corpus.read_bytes())

    def interrupt(line: str) -> None:
        if line.startswith("encoding"):
            raise KeyboardInterrupt

    for change in ({}, {"seed": 1}, {"filters": ["too_short=30"]}):
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", [str(source)], "bpe", 300, say=interrupt, **change)
    source.write_text(json.dumps({"text": "all new text " * 30}) + "\n")
    said: list[str] = []
    data = prepare(tmp_path / "out", [str(source)], "bpe", 300, say=said.append)
    assert said[0].startswith("reading") and data.manifest["content_documents"] == 1


@pytest.mark.parametrize(
    ("package", "name", "dedup"),
    [
        ("rapidfuzz", "a.txt", "near"),
        ("rensa", "a.txt", "near"),
        ("pyarrow", "b.parquet", "none"),
        ("zstandard", "b.txt.zst", "none"),
    ],
)
def test_a_missing_package_is_told_first_and_costs_no_finished_work(
    package: str, name: str, dedup: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for file in {"a.txt", name}:
        (source / file).write_text("some text to learn from " * 40)

    def interrupt(line: str) -> None:
        if line.startswith("encoding"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(out, [str(source)], "bpe", 300, dedup=dedup, say=interrupt)
    done = content(tmp_path / ".out.building")
    assert any(path.startswith("read/") for path in done)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=rf"{package}.*pip install 'fathom\[data\]'"):
            prepare(out, [str(source)], "bpe", 300, dedup=dedup)
    assert content(tmp_path / ".out.building") == done
    said: list[str] = []
    prepare(out, [str(source)], "bpe", 300, dedup=dedup, say=said.append)
    assert said[0] == "going on where it was stopped"


def test_two_processes_cannot_make_the_same_folder(tmp_path: Path) -> None:
    first, second = WorkFolder(tmp_path / "w"), WorkFolder(tmp_path / "w")
    assert first.claim({"a": 1}) is False
    with pytest.raises(DataError, match="another process is preparing"):
        second.claim({"a": 1})
    second.remove()
    assert (tmp_path / "w").is_dir()
    first.release()
    assert second.claim({"a": 1}) is True
    second.remove()
    assert not (tmp_path / "w").exists()
