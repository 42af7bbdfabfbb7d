"""`fathom serve`: what it refuses before it listens. That it serves is shown in tests/serving."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import fathom
from fathom.serving.run import listening
from tests.cli.calling import call
from tests.serving.live import model, tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    fathom.save(model(), folder, tokenizer())
    return folder


def test_one_line_for_what_cannot_be(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, message in [
            (["--port", taken.getsockname()[1]], "cannot be listened on"),
            (["--host", "192.0.2.1"], "cannot be listened on"),
            (["--answer-seconds", 0], "answer_seconds=0"),
            (["--api-key-file", tmp_path / "none"], "cannot be read"),
            (["--api-key-file", tmp_path / "empty"], "holds no key"),
            (["--max-memory", "1KiB"], "max_memory"),
            (["--port", 70000], "--port"),
        ]:
            status, out, error = call(capsys, "serve", directory, "--device", "cpu", *options)
            assert status == 2 and message in error.splitlines()[-1] and out == ""
    status, _, error = call(capsys, "serve", tmp_path / "nowhere")
    assert status == 2 and "does not exist" in error


def test_other_machines_are_not_let_in_unnoticed(
    directory: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "serve", directory, "--host", "192.0.2.1", "--device", "cpu")
    assert "there is no API key" in caplog.text


def test_packets_do_not_wait_for_each_other() -> None:
    with (
        listening("127.0.0.1", 0) as place,
        socket.create_connection(place.getsockname()[:2]),
        place.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
