"""`fathom generate` and `fathom chat` on a real, if speechless, exported model."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fathom
from fathom.cli.chat import Conversation, Form
from fathom.cli.console import show
from fathom.cli.opening import open_speaker
from fathom.data import Tokenizer
from fathom.data.chat import chat_ids
from fathom.inference import Sampling, generate
from tests.cli.calling import status_of
from tests.speaking import GREETINGS, small_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an exported base model of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = small_model(300, max_position_embeddings=64)
    folder.mkdir()
    fathom.save(model, folder / "model", Tokenizer.train([GREETINGS], 300))
    return folder


def ask(run: Path, *options: object) -> list[object]:
    return [
        "generate",
        run,
        "--prompt",
        "def greet",
        "--max-new-tokens",
        12,
        "--device",
        "cpu",
        *options,
    ]


def test_generate_prints_the_prompt_and_its_continuation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*ask(run, "--seed", 1, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert status_of(*ask(run / "model", "--seed", 1)) == 0
    assert capsys.readouterr().out == f"def greet{report['text']}\n"
    ids, tokenizer = report["token_ids"], Tokenizer.load(run / "model")
    assert report["new_tokens"] == len(ids) <= 12
    ended = ids[-1] == tokenizer.eos_id
    assert report["finish_reason"] == ("stop" if ended else "length") and ended == (len(ids) < 12)
    assert report["text"] == tokenizer.decode(ids[:-1] if ended else ids)
    assert report["tokens_per_second"] > 0 and report["prompt"] == "def greet"


def test_generate_with_its_own_seed_can_be_repeated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_of(*ask(run, "--json"))
    first = json.loads(capsys.readouterr().out)
    status_of(*ask(run, "--json", "--seed", first["seed"]))
    assert json.loads(capsys.readouterr().out)["token_ids"] == first["token_ids"]


def test_greedy_generate_equals_the_library(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status_of(*ask(run, "--json", "--temperature", 0))
    ids = json.loads(capsys.readouterr().out)["token_ids"]
    tokenizer = Tokenizer.load(run / "model")
    expected = generate(
        fathom.load(run / "model", torch.float32), tokenizer.encode("def greet"), 12
    )
    assert ids == expected[: len(ids)] and (len(ids) == 12 or ids[-1] == tokenizer.eos_id)


def test_without_a_length_the_context_is_not_exceeded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--prompt", "x " * 10, "--json", "--seed", 0, "--device", "cpu")
    assert status_of("generate", run, *asked) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt_tokens"] + report["new_tokens"] <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 0], "max_new_tokens=0"),
        (["--max-new-tokens", 100], "exceed the model's context of 64; ask for at most"),
        (["--prompt", "x " * 100], "fills the model's context of 64"),
        (["--temperature", -1], "temperature=-1.0"),
        (["--top-p", 0], "top_p=0.0"),
        (["--device", "abacus"], "device 'abacus'"),
    ],
)
def test_one_line_for_what_cannot_be(
    run: Path, options: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(*ask(run, *options)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_folders_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for place, message in [
        ("nowhere", "does not exist"),
        (".", "neither a run"),
        ("run", "neither a run folder nor an exported directory"),
    ]:
        assert status_of(*ask(tmp_path / place)) == 2
        assert message in capsys.readouterr().err


def test_a_terminal_is_not_steered_by_what_a_model_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show("a\x1b[2J\x07\n\tb\x9b")
    assert capsys.readouterr().out == "a\x1b[2J\x07\n\tb\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("a\x1b[2J\x07\n\tb\x9b")
    assert capsys.readouterr().out == "a␛[2J␇\n\tb\ufffd"


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """An `input` that gives these lines, raises these errors, and then is at its end."""
    rest = iter(lines)

    def read(_: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_chat_with_a_base_model_says_so_and_continues_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = typed(
        "def greet", "", KeyboardInterrupt, "/reset", "", "x " * 200, "/exit", "never read"
    )
    monkeypatch.setattr(builtins, "input", lines)
    assert status_of("chat", run, "--max-new-tokens", 8, "--seed", 0, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "base model" in out and "never taught to chat" in out and "context of 64 tokens" in out
    assert out.count("/exit or Ctrl-D leaves") == 2  # greeting, and Ctrl-C at the prompt
    assert "forgotten." in out and "error: there is no unfinished text" in out
    assert "error: this does not fit the model's context of 64 tokens" in out


def test_end_of_input_leaves(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", typed())
    assert status_of("chat", run, "--device", "cpu") == 0


def test_chat_form_grows_the_released_conversation(run: Path) -> None:
    speaker = open_speaker(run, "cpu")
    tokenizer = speaker.tokenizer
    talk = Conversation(speaker, speaker.engine(), Form.CHAT, Sampling(seed=0, max_new_tokens=5))
    first = "".join(talk.answer("Hello, <｜User｜>"))
    "".join(talk.answer("name"))
    ids = talk.ids
    asked = chat_ids(tokenizer, [{"role": "user", "content": "Hello, <｜User｜>"}])
    second = chat_ids(tokenizer, [{"role": "user", "content": "name"}])[1:]
    assert ids[: len(asked)] == asked
    start = next(i for i in range(len(asked), len(ids)) if ids[i : i + len(second)] == second)
    assert ids[start - 1] == tokenizer.eos_id  # also after an answer that was cut short
    assert tokenizer.decode(ids[len(asked) : start - 1]) == first
    assert talk.last is not None
    assert talk.last.usage.cached_tokens == (start - 2) // 16 * 16 > 0  # only what is new was read
    said = "".join(talk.again())
    assert talk.ids[: start + len(second)] == ids[: start + len(second)] and isinstance(said, str)


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Conversation.answer

    def interrupted(self: Conversation, line: str) -> object:
        yield from [next(iter(answers(self, line)))]
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    monkeypatch.setattr(builtins, "input", typed("def", "/exit"))
    assert status_of("chat", run, "--device", "cpu") == 0
    assert "[stopped]" in capsys.readouterr().out


def test_a_model_that_was_taught_to_chat(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run / "model" / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"fathom_chat": True}))
    monkeypatch.setattr(builtins, "input", typed("hello"))
    assert status_of("chat", run, "--max-new-tokens", 3, "--device", "cpu") == 0
    settings.write_text(before)
    out = capsys.readouterr().out
    assert "base model" not in out and "goes on from there" not in out
