"""`fathom chat`: talk in the terminal; what was said stays in the latent cache, only new tokens are read.

Whether a model was taught to chat is written in its tokenizer_config.json as `fathom_chat`: false for what our
pre-training makes, for a fine-tuning stage to set. A directory of someone else's counts as taught when it has a
chat template. A model that was not taught gets the plain form: it continues the text that is typed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from fathom.cli.console import show
from fathom.cli.opening import Speaker, open_speaker
from fathom.cli.options import Compiled, Device, RunOrDir, Temperature, TopP, choose_sampling
from fathom.data.chat import message_ids
from fathom.errors import FathomError, GenerationError
from fathom.inference import Sampling

COMMANDS = "/reset forgets everything, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Form(enum.StrEnum):
    """What is made of a typed line: a message of the released chat form, or a text to continue."""

    AUTO = "auto"
    CHAT = "chat"
    PLAIN = "plain"


class Conversation:
    """One session with a model, in one form."""

    def __init__(
        self, speaker: Speaker, form: Form, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.speaker, self.form = speaker, form
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.session = self.speaker.session()

    def answer(self, line: str) -> Iterator[str]:
        """Text as it comes. Raises `GenerationError` when the context is full or there is nothing to go on from."""
        new_ids = self._chat_ids(line) if self.form == Form.CHAT else self._plain_ids(line)
        room = self.session.room - len(new_ids)
        if room < 1:
            limit = self.speaker.model.config.max_position_embeddings
            raise GenerationError(
                f"this does not fit the model's context of {limit} tokens; /reset"
            )
        self.turns += 1
        sampling = replace(self.sampling, seed=(self.sampling.seed or 0) + self.turns)
        stop = {self.speaker.tokenizer.eos_id}
        text = self.speaker.tokenizer.stream()
        for token in self.session.stream(new_ids, min(self.max_new_tokens, room), sampling, stop):
            yield text.push(token)
        yield text.flush()

    def _chat_ids(self, line: str) -> list[int]:
        """The message in the released form; an answer that was cut short is ended first."""
        tokenizer, said = self.speaker.tokenizer, self.session.ids
        if not said:
            before = [tokenizer.bos_id]
        else:
            before = [] if said[-1] == tokenizer.eos_id else [tokenizer.eos_id]
        return before + message_ids(tokenizer, line)

    def _plain_ids(self, line: str) -> list[int]:
        """A text of its own; an empty line goes on with the one before."""
        if line:
            self.reset()
            return self.speaker.tokenizer.prompt_ids(line)
        if not self.session.ids or self.session.ids[-1] == self.speaker.tokenizer.eos_id:
            raise GenerationError("there is no unfinished text to go on with; type one")
        return []


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
    seed: Annotated[
        int | None, typer.Option(help="The same seed and lines give the same answers.")
    ] = None,
    device: Device = "auto",
    compiled: Compiled = False,
) -> None:
    """Talk with a model in the terminal."""
    sampling = choose_sampling(temperature, top_p, seed)
    speaker = open_speaker(run_or_dir, device, compiled)
    taught = speaker.tokenizer.taught_to_chat
    if form == Form.AUTO:
        form = Form.CHAT if taught else Form.PLAIN
    print(_greeting(speaker, form, taught))
    converse(Conversation(speaker, form, max_new_tokens, sampling))


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
        if line.strip() == "/reset":
            conversation.reset()
            print("forgotten.")
            continue
        _answer(conversation, line)


def _answer(conversation: Conversation, line: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it, an error is said and the talk goes on."""
    try:
        for text in conversation.answer(line):
            show(text)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except FathomError as error:
        print(f"error: {error}")
