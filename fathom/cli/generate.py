"""`fathom generate`: continue one prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from fathom.cli.console import show
from fathom.cli.opening import Speaker, open_speaker
from fathom.cli.options import (
    Device,
    Ema,
    FrequencyPenalty,
    MaxMemory,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    RunOrDir,
    Seed,
    Speculate,
    Stop,
    Temperature,
    TopK,
    TopP,
    Weights,
    choose_sampling,
)
from fathom.inference import Delta, Engine, Output, Sampling
from fathom.inference.choice import Logprob

DEFAULT_NEW_TOKENS = 200


def generate(
    run_or_dir: RunOrDir,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens to add (default: {DEFAULT_NEW_TOKENS}, or what the context has room for)."
        ),
    ] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, typer.Option(help="So many continuations, with seeds in a row.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities and so many alternatives.")
    ] = None,
    speculate: Speculate = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object at the end instead of text as it comes."
        ),
    ] = False,
    weights: Weights = "float32",
    max_memory: MaxMemory = "4GiB",
    device: Device = "auto",
    ema: Ema = False,
) -> None:
    """Continue a prompt: prints it and, as it comes, what the model adds."""
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
        n=n,
        logprobs=logprobs,
    )
    speaker = open_speaker(
        run_or_dir, device, ema=ema, mtp=False if speculate == 0 else None, weights=weights
    )
    engine = speaker.engine(speculate, max_memory, max_requests=n)
    report = speak(speaker, engine, prompt, sampling, quiet=as_json)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))


def speak(
    speaker: Speaker, engine: Engine, prompt: str, sampling: Sampling, quiet: bool
) -> dict[str, Any]:
    """Generate, print as it comes unless `quiet`, and say what was done."""
    requests = engine.add(prompt, _with_room(engine, prompt, sampling))
    say = _nothing if quiet else show
    started = time.perf_counter()
    page = Page(prompt, say)
    while engine.busy:
        for delta in engine.step():
            page.add(delta)
    seconds = time.perf_counter() - started
    outputs = [engine.output(request) for request in requests]
    page.close()
    return report_of(speaker, prompt, sampling, outputs, seconds)


def _with_room(engine: Engine, prompt: str, sampling: Sampling) -> Sampling:
    """With the usual length where none was asked for, if the context has room for it."""
    if sampling.max_new_tokens is not None:
        return sampling
    return replace(sampling, max_new_tokens=max(1, min(DEFAULT_NEW_TOKENS, engine.room(prompt))))


class Page:
    """Continuations one below the other: the first as it comes, the others when those before are complete."""

    def __init__(self, prompt: str, say: Callable[[str], None]) -> None:
        self.prompt, self.say, self.texts, self.ended = prompt, say, {0: ""}, set[int]()
        self.shown = 0
        say(prompt)

    def add(self, delta: Delta) -> None:
        """Show what can be shown."""
        choice = delta.request.choice
        self.texts[choice] = self.texts.get(choice, "") + delta.text
        if delta.ended is not None:
            self.ended.add(choice)
        if choice == self.shown:
            self.say(delta.text)
        while self.shown in self.ended and self.shown + 1 in self.texts:
            self.shown += 1
            self.say(f"\n\n{self.prompt}{self.texts[self.shown]}")

    def close(self) -> None:
        """All has come."""
        self.say("\n")


def report_of(
    speaker: Speaker, prompt: str, sampling: Sampling, outputs: list[Output], seconds: float
) -> dict[str, Any]:
    """What `--json` prints; of several continuations the first stands for itself, all are in `choices`."""
    first, tokens = outputs[0], sum(len(output.token_ids) for output in outputs)
    choices = [_choice(output) for output in outputs]
    return {
        "prompt": prompt,
        **choices[0],
        "prompt_tokens": first.usage.prompt_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2),
        "forwards": sum(output.usage.forwards for output in outputs),
        "drafted": [sum(counts) for counts in _columns([o.usage.drafted for o in outputs])],
        "accepted": [sum(counts) for counts in _columns([o.usage.accepted for o in outputs])],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "model": str(speaker.directory),
        **({"choices": choices} if len(choices) > 1 else {}),
    }


def _choice(output: Output) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "new_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        found["logprobs"] = [_logprob(logprob) for logprob in output.logprobs]
    return found


def _logprob(logprob: Logprob) -> dict[str, Any]:
    return {"token_id": logprob.token, "logprob": logprob.logprob, "top": dict(logprob.top)}


def _columns(rows: list[list[int]]) -> list[list[int]]:
    """Counts by place, whatever the rows' lengths."""
    longest = max(map(len, rows))
    return [[row[place] for row in rows if place < len(row)] for place in range(longest)]


def _nothing(text: str) -> None:
    pass
