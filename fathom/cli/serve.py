"""`fathom serve`: an OpenAI-compatible server and a chat page for a model."""

from __future__ import annotations

import logging
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.opening import open_speaker
from fathom.cli.options import Device, MaxMemory, RunOrDir, Speculate, Weights
from fathom.errors import ServingError

KEYS_VARIABLE = "FATHOM_API_KEYS"


def serve(
    run_or_dir: RunOrDir,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    name: Annotated[
        str | None,
        typer.Option(
            "--model-name", help="Id of the model for clients (default: the folder's name)."
        ),
    ] = None,
    max_memory: MaxMemory = "4GiB",
    max_requests: Annotated[int, typer.Option(min=1, help="Answers that run at a time.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass.")] = 512,
    speculate: Speculate = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Answers that may wait; more get status 429.")
    ] = 256,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt (default: the model's context).")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body of a request.")] = 4
    << 20,
    max_choices: Annotated[int, typer.Option(min=1, help="Answers to one request.")] = 16,
    body_seconds: Annotated[
        float, typer.Option(help="How long a client may take to send a request.")
    ] = 30.0,
    answer_seconds: Annotated[
        float, typer.Option(help="How long an answer may take, the queue included.")
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(help="How long accepted requests may go on after SIGTERM.")
    ] = 600.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with one API key a line; {KEYS_VARIABLE} holds them too, separated by commas."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may call the server; may be given several times."),
    ] = None,
    thinking: Annotated[
        bool,
        typer.Option("--thinking", help="Conversations think when the request does not say."),
    ] = False,
    log_requests: Annotated[
        bool,
        typer.Option("--log-requests", help="Write what is asked and answered to the log."),
    ] = False,
    weights: Weights = "float32",
    device: Device = "auto",
) -> None:
    """Serve a model over HTTP: OpenAI's interface, metrics, and a chat page at /."""
    from fathom.serving import Settings
    from fathom.serving import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # oneDNN keeps the code of the last 1,024 shapes of products, and the passes of a server have ever
    # new ones: 1.15 GB after 500 random passes of a small model, 0.84 GB so, in the same time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    settings = Settings(
        model_name=name or _name_of(run_or_dir),
        api_keys=_keys(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        max_waiting=max_waiting,
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_choices=max_choices,
        body_seconds=body_seconds,
        answer_seconds=answer_seconds,
        drain_seconds=drain_seconds,
        thinking=thinking,
        log_requests=log_requests,
    )
    if not settings.api_keys and not _is_loopback(host):
        logging.warning("host=%s lets other machines in, and there is no API key", host)
    mtp = False if speculate == 0 else None
    speaker = open_speaker(run_or_dir, device, mtp=mtp, weights=weights)
    engine = speaker.engine(speculate, max_memory, max_requests, batch_tokens)
    run(engine, settings, host, port)


def _name_of(run_or_dir: str) -> str:
    """The folder's name; that of the run for its `model`."""
    path = Path(run_or_dir).resolve()
    return path.parent.name if path.name == "model" else path.name


def _keys(file: Path | None) -> tuple[str, ...]:
    keys = os.environ.get(KEYS_VARIABLE, "").split(",")
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ServingError(
                f"--api-key-file {file} cannot be read ({error.strerror})"
            ) from error
    found = tuple(key.strip() for key in keys if key.strip())
    if file is not None and not found:
        raise ServingError(f"--api-key-file {file} holds no key; write one a line")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
