"""`fathom chat`: talk in the terminal; what was said stays in the engine's cache, only new tokens are read.

Whether a model was taught to chat is written in its tokenizer_config.json as `fathom_chat`: false for what our
pre-training makes, for a fine-tuning stage to set. A directory of someone else's counts as taught when it has a
chat template. A model that was not taught gets the plain form: it continues the text that is typed.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from fathom.cli.chat_words import COMMANDS, Answer, changed, faintly, settings_of, summary
from fathom.cli.opening import Speaker, open_speaker
from fathom.cli.options import (
    Device,
    FrequencyPenalty,
    MaxMemory,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    RunOrDir,
    Speculate,
    Stop,
    Temperature,
    TopK,
    TopP,
    Weights,
    choose_sampling,
)
from fathom.data.chat import message_ids
from fathom.errors import FathomError, GenerationError
from fathom.inference import Engine, Request, Sampling


class Form(enum.StrEnum):
    """What is made of a typed line: a message of the released chat form, or a text to continue."""

    AUTO = "auto"
    CHAT = "chat"
    PLAIN = "plain"


class Conversation:
    """One talk with a model, in one form. `ids` is all that was said."""

    def __init__(self, speaker: Speaker, engine: Engine, form: Form, sampling: Sampling) -> None:
        self.speaker, self.engine, self.form, self.sampling = speaker, engine, form, sampling
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.ids: list[int] = []
        self._asked: list[int] | None = None
        self.last: Request | None = None
        self.seconds = 0.0

    def answer(self, line: str) -> Iterator[str]:
        """Text as it comes. Raises `GenerationError` when the context is full or there is nothing to go on from."""
        return self._say(self._chat_ids(line) if self.form == Form.CHAT else self._plain_ids(line))

    def again(self) -> Iterator[str]:
        """Another answer to the last line."""
        if self._asked is None:
            raise GenerationError("there is no answer to make anew; type a line")
        return self._say(self._asked)

    def _say(self, prompt: list[int]) -> Iterator[str]:
        room = self.engine.room(prompt)
        if room < 1:
            limit = self.speaker.model.config.max_position_embeddings
            raise GenerationError(
                f"this does not fit the model's context of {limit} tokens; /reset"
            )
        self.turns += 1
        longest = min(self.sampling.max_new_tokens or room, room)
        seed = (self.sampling.seed or 0) + self.turns
        asked = replace(self.sampling, max_new_tokens=longest, seed=seed)
        (request,) = self.engine.add(prompt, asked)
        self._asked, self.last, started = prompt, request, time.perf_counter()
        try:
            while request.ended is None:
                yield from (delta.text for delta in self.engine.step())
        finally:
            self.engine.abort(request)  # interrupted: what was said until then stays
            self.ids, self.seconds = list(request.ids), time.perf_counter() - started

    def _chat_ids(self, line: str) -> list[int]:
        """All that was said and the message in the released form; an answer that was cut short is ended first."""
        tokenizer, said = self.speaker.tokenizer, self.ids
        if not said:
            said = [tokenizer.bos_id]
        elif said[-1] != tokenizer.eos_id:
            said = [*said, tokenizer.eos_id]
        return said + message_ids(tokenizer, line)

    def _plain_ids(self, line: str) -> list[int]:
        """A text of its own; an empty line goes on with the one before."""
        if line:
            return self.speaker.tokenizer.prompt_ids(line)
        if not self.ids or self.ids[-1] == self.speaker.tokenizer.eos_id:
            raise GenerationError("there is no unfinished text to go on with; type one")
        return self.ids


def chat(
    run_or_dir: RunOrDir,
    form: Annotated[
        Form,
        typer.Option(
            help="chat: the released chat form; plain: continue the typed text; auto: what was taught."
        ),
    ] = Form.AUTO,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed and lines give the same answers.")
    ] = None,
    stop: Stop = None,
    speculate: Speculate = None,
    weights: Weights = "float32",
    max_memory: MaxMemory = "4GiB",
    device: Device = "auto",
) -> None:
    """Talk with a model in the terminal."""
    sampling = choose_sampling(
        seed,
        stop,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_new_tokens=max_new_tokens,
    )
    speaker = open_speaker(
        run_or_dir, device, mtp=False if speculate == 0 else None, weights=weights
    )
    taught = speaker.tokenizer.taught_to_chat
    if form == Form.AUTO:
        form = Form.CHAT if taught else Form.PLAIN
    print(_greeting(speaker, form, taught))
    converse(Conversation(speaker, speaker.engine(speculate, max_memory), form, sampling))


def _greeting(speaker: Speaker, form: Form, taught: bool) -> str:
    config = speaker.model.config
    size, context = speaker.model.num_parameters(), config.max_position_embeddings
    lines = [f"{speaker.directory}: {size:,} parameters, context of {context:,} tokens."]
    if not taught:
        lines.append("This is a base model: it continues text and was never taught to chat.")
    if form == Form.PLAIN:
        lines.append("Type a text and it goes on from there; an empty line lets it go on further.")
    elif not taught:
        lines.append("In the chat form, as you asked, its answers will hardly be answers.")
    return "\n".join([*lines, COMMANDS])


def converse(conversation: Conversation) -> None:
    """Read lines and answer them until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (its presence gives `input` editing and a history)
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}")
            continue
        if line.strip() in ("/exit", "/quit"):
            return
        _obey(conversation, line)


def _obey(conversation: Conversation, line: str) -> None:
    """A command, or a line to be answered; an error is said and the talk goes on."""
    word, _, rest = line.strip().partition(" ")
    try:
        if word == "/reset":
            conversation.reset()
            print("forgotten.")
        elif word == "/again":
            _answer(conversation, conversation.again())
        elif word == "/set":
            conversation.sampling = changed(conversation.sampling, rest)
            print(settings_of(conversation.sampling))
        else:
            _answer(conversation, conversation.answer(line))
    except FathomError as error:
        print(f"error: {error}")


def _answer(conversation: Conversation, arriving: Iterator[str]) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    answer = Answer()
    try:
        for text in arriving:
            answer.show(text)
        answer.end()
    except KeyboardInterrupt:
        arriving.close()  # type: ignore[attr-defined]
        answer.end(" [stopped]")
    if conversation.last is not None and conversation.last.usage.completion_tokens:
        faintly(summary(conversation.last, conversation.seconds))
