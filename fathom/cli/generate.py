"""`fathom generate`: continue one prompt."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from fathom.cli.console import show
from fathom.cli.opening import Speaker, open_speaker
from fathom.cli.options import Compiled, Device, Ema, RunOrDir, Temperature, TopP, choose_sampling
from fathom.inference import Sampling

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
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object at the end instead of text as it comes."
        ),
    ] = False,
    device: Device = "auto",
    compiled: Compiled = False,
    ema: Ema = False,
) -> None:
    """Continue a prompt: prints it and, as it comes, what the model adds."""
    sampling = choose_sampling(temperature, top_p, seed)
    speaker = open_speaker(run_or_dir, device, compiled, ema)
    report = speak(speaker, prompt, max_new_tokens, sampling, quiet=as_json)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))


def speak(
    speaker: Speaker, prompt: str, max_new_tokens: int | None, sampling: Sampling, quiet: bool
) -> dict[str, Any]:
    """Generate, print as it comes unless `quiet`, and say what was done."""
    session, tokenizer = speaker.session(), speaker.tokenizer
    prompt_ids = tokenizer.prompt_ids(prompt)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, session.room - len(prompt_ids)))
    arriving = session.stream(prompt_ids, max_new_tokens, sampling, {tokenizer.eos_id})
    say = _nothing if quiet else show
    say(prompt)
    text, ids, started = tokenizer.stream(), [], time.perf_counter()
    for token in arriving:
        ids.append(token)
        say(text.push(token))
    seconds = time.perf_counter() - started
    say(text.flush() + "\n")
    return {
        "prompt": prompt,
        "text": tokenizer.decode(ids),
        "token_ids": ids,
        "prompt_tokens": len(prompt_ids),
        "new_tokens": len(ids),
        "finish_reason": "length" if len(ids) == max_new_tokens else "stop",
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(ids) / seconds, 2),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "model": str(speaker.directory),
    }


def _nothing(text: str) -> None:
    pass
