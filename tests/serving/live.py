"""A real server on loopback around a tiny random model, and tokenizers with all that conversations need."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import uvicorn

import fathom
from fathom.data import Tokenizer
from fathom.inference import Delta, Engine, Request
from fathom.inference.choice import Choice, Logprob
from fathom.serving import Settings
from fathom.serving.app import Application, build
from fathom.serving.run import DrainingServer, listening
from tests.speaking import GREETINGS, small_model, talking_tokenizer

NAME = "tiny"
CORPUS = [
    GREETINGS,
    'function look_up\n```json\n{"word": "sea"}\n``` The answer is: because I look up two words.\n'
    * 9,
]


@cache
def tokenizer(tools: bool = True, think: bool = False) -> Tokenizer:
    """400 ids of bytes and some merges, then the control tokens that are asked for."""
    return talking_tokenizer(CORPUS, 400, tools, think)


@cache
def model(context: int = 1024) -> fathom.Transformer:
    """A tiny model whose answers vary."""
    changes = {"max_position_embeddings": context, "num_nextn_predict_layers": 1}
    return small_model(tokenizer().vocab_size, **changes).eval().requires_grad_(False)


class ScriptedEngine(Engine):
    """An engine whose model can be told what to say, and how long to take."""

    script: Sequence[int] = ()
    """Tokens of every answer; behind them, and without them, the model speaks for itself."""
    pause = 0.0
    """Seconds that each step takes at least."""
    failing: Exception | None = None
    """What the next step raises."""

    def step(self) -> list[Any]:
        time.sleep(self.pause)
        if self.failing is not None:
            error, self.failing = self.failing, None
            raise error
        return super().step()

    def _accept(self, request: Request, choice: Choice, logprobs: list[Logprob]) -> Delta:
        said = len(request.ids) - request.prompt_len
        told = self.script[said : said + len(choice.tokens)]
        tokens = [*told, *choice.tokens[len(told) :]]
        return super()._accept(request, Choice(tokens, choice.gaps), logprobs)

    def say(self, text: str, allow_special: bool = True) -> None:
        """Let every answer be this text and the end."""
        assert self.tokenizer is not None
        self.script = [*self.tokenizer.encode(text, allow_special), self.tokenizer.eos_id]


@dataclass
class Live:
    """A server that listens."""

    url: str
    application: Application
    process: DrainingServer

    @property
    def engine(self) -> ScriptedEngine:
        engine = self.application.server.engine
        assert isinstance(engine, ScriptedEngine)
        return engine

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": NAME, **body}, timeout=30)

    def chat(self, text: str = "Hello", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", messages=messages, **body)

    def stream(self, text: str = "Hello", **body: Any) -> AbstractContextManager[httpx.Response]:
        """A conversation as events."""
        talk = {"model": NAME, "messages": [{"role": "user", "content": text}], "stream": True}
        url = self.url + "/v1/chat/completions"
        return httpx.stream("POST", url, json={**talk, **body}, timeout=30)

    def metric(self, name: str) -> float:
        """The sum over all labels of a metric."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == f"fathom:{name}"]
        assert found, name
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def wait_until_idle(self) -> None:
        """Until no request is in the engine and all blocks are free."""
        engine = self.engine
        wait_for(lambda: not engine.busy and engine.pool.free == engine.pool.count)


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    """Until something holds; fails when it takes too long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "this did not come to be"
        time.sleep(0.01)


@contextmanager
def serving(settings: Settings | None = None, **engine: Any) -> Iterator[Live]:
    """A server in a thread of this process; `engine` are settings of the engine."""
    chosen = {
        "max_memory": "256MiB",
        "batch_tokens": 64,
        "block_size": 4,
        "max_requests": 8,
        "speculate": 0,
    } | engine
    mine = ScriptedEngine(model(), tokenizer(), **chosen)
    application = build(mine, settings or Settings(model_name=NAME))
    with listening("127.0.0.1", 0) as place:
        config = uvicorn.Config(
            application.asgi, lifespan="on", log_config=None, timeout_graceful_shutdown=2
        )
        process = DrainingServer(config, application)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            wait_for(lambda: process.started)
            yield Live(f"http://127.0.0.1:{place.getsockname()[1]}", application, process)
        finally:
            process.should_exit = True
            thread.join(20)
        assert not thread.is_alive()
