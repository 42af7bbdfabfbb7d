"""What `fathom chat` says besides the answers: its commands, settings, figures, and faint reasoning."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

from fathom.cli.console import show
from fathom.errors import GenerationError
from fathom.inference import Request, Sampling

COMMANDS = (
    "/again makes the last answer anew, /set temperature 0.5 changes a setting (/set alone shows them),\n"
    "/reset forgets everything, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
)
SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "seed",
)
OPENING, CLOSING = "<think>", "</think>"
_FAINT, _NORMAL = "\x1b[2m", "\x1b[22m"


def settings_of(sampling: Sampling) -> str:
    """All that can be set, on one line."""
    return "  ".join(f"{name} {getattr(sampling, name)}" for name in SETTINGS)


def changed(sampling: Sampling, words: str) -> Sampling:
    """`sampling` with "NAME VALUE" set; as it is for no words. Raises `GenerationError` for what cannot be."""
    if not words.strip():
        return sampling
    name, _, value = words.strip().replace("=", " ").partition(" ")
    if name not in SETTINGS or not value.strip():
        raise GenerationError(
            f"/set {words.strip()}: write /set NAME VALUE, NAME one of {', '.join(SETTINGS)}"
        )
    whole = {field.name for field in fields(Sampling) if "int" in str(field.type)}
    try:
        number = int(value) if name in whole else float(value)
    except ValueError as error:
        raise GenerationError(f"/set {name}: {value.strip()!r} is not a number") from error
    wanted: dict[str, Any] = {name: number}
    return replace(sampling, **wanted)


def summary(request: Request, seconds: float) -> str:
    """Tokens, their rate and how many drafts were right."""
    usage = request.usage
    words = [f"{usage.completion_tokens} tokens, {usage.completion_tokens / seconds:.0f}/s"]
    drafted, right = sum(usage.drafted), sum(usage.accepted)
    if drafted:
        words.append(f"{right / drafted:.0%} of {drafted} drafts right")
    return " · ".join(words)


def faintly(text: str) -> None:
    """A line in a faint colour; nothing where no terminal is looking."""
    if sys.stdout.isatty():
        print(f"{_FAINT}{text}{_NORMAL}")


class Answer:
    """An answer on the screen as it comes, what stands between <think> and </think> faint on a terminal."""

    def __init__(self) -> None:
        self.on_terminal, self.thinking = sys.stdout.isatty(), False
        self._held = ""

    def show(self, text: str) -> None:
        """More of it."""
        if not self.on_terminal:
            show(text)
            return
        text, self._held = self._held + text, ""
        while text:
            tag = CLOSING if self.thinking else OPENING
            before, found, text = text.partition(tag)
            if not found:
                keep = next((n for n in range(len(tag) - 1, 0, -1) if before.endswith(tag[:n])), 0)
                before, self._held = before[: len(before) - keep], before[len(before) - keep :]
            show(before)
            if found:
                self._turn(not self.thinking)

    def end(self, remark: str = "") -> None:
        """All of it has come."""
        show(self._held)
        if self.thinking:
            self._turn(False)
        print(remark)

    def _turn(self, thinking: bool) -> None:
        self.thinking = thinking
        sys.stdout.write(_FAINT if thinking else _NORMAL)
