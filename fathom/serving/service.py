"""The engine's thread and its asynchronous face.

    event loop:     answers() --add--> queue of calls --> engine thread: calls, then one step, again
                    async for <-- queue of deltas <-- call_soon_threadsafe ---'

One thread owns the engine: it does what was asked since the last step, then takes a step, and sleeps when there is
nothing to do. Whoever leaves `answers` early, by an error or because its client went away, has its requests aborted
before the next step, so their blocks are free at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from fathom.inference import Delta, Ended, Engine, Request, Sampling
from fathom.serving.errors import ApiError
from fathom.serving.meters import Meters
from fathom.serving.settings import Settings

T = TypeVar("T")
log = logging.getLogger("fathom.serving")

LONGEST_RETRY = 60
"""Seconds that a client is asked to wait at most."""


class Answers:
    """What the engine says to one or several prompts; iterate for (number of the answer, delta).

    Answers are numbered prompt by prompt, `n` to each. The iteration ends when all have ended.
    """

    def __init__(self, deadline: float) -> None:
        self.requests: list[Request] = []
        self._deadline = deadline
        self._arriving: asyncio.Queue[Delta | ApiError] = asyncio.Queue()

    def put(self, arrived: Delta | ApiError) -> None:
        """Called by the service, in the event loop."""
        self._arriving.put_nowait(arrived)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        going = {request: number for number, request in enumerate(self.requests)}
        spoken = False
        while going:
            delta = await self._next()
            if delta is None:
                for late in self._cut(going, spoken):
                    yield late
                return
            if delta.ended is Ended.ERROR and delta.request.guided is None:
                raise ApiError(str(delta.request.stopped_by), 500)
            if delta.ended is Ended.ERROR:
                raise ApiError(
                    f"response_format: the answer cannot go on in this form: {delta.request.stopped_by}",
                    param="response_format",
                )
            spoken = True
            number = going.pop(delta.request) if delta.ended else going[delta.request]
            yield number, delta

    async def _next(self) -> Delta | None:
        """The next delta; None when time is up."""
        try:
            async with asyncio.timeout_at(self._deadline):
                arrived = await self._arriving.get()
        except TimeoutError:
            return None
        if isinstance(arrived, ApiError):
            raise arrived
        return arrived

    def _cut(self, going: dict[Request, int], spoken: bool) -> list[tuple[int, Delta]]:
        """Time is up: what is running ends with what there is, if there is anything."""
        if not spoken:
            raise ApiError(
                "no answer came within the time limit: the server is busy; try again later",
                503,
                code="time_limit",
                headers={"Retry-After": str(LONGEST_RETRY)},
            )
        return [(number, Delta(r, [], "", [], Ended.LENGTH)) for r, number in going.items()]


class Service:
    """An engine that answers many clients of one event loop; `start` and `close` belong together."""

    def __init__(self, engine: Engine, settings: Settings, meters: Meters) -> None:
        self.engine, self.settings, self.meters = engine, settings, meters
        self.live = 0
        """Answers that were accepted and have not been let go."""
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._answers_of: dict[Request, Answers] = {}
        self._closed = False
        self._seconds_each = 0.1  # between two answers' ends, lately
        self._last_end = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- in the event loop ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work, for clients of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Abort what is left and end the thread."""
        self._calls.put(self._close)
        await asyncio.to_thread(self._thread.join)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is there to answer."""
        return self._thread.is_alive() and not self._closed

    @asynccontextmanager
    async def answers(
        self, prompts: Sequence[Sequence[int]], wish: Sampling
    ) -> AsyncIterator[Answers]:
        """Answers to these prompts (token ids), `wish.n` to each; leaving aborts those that have not ended.

        Raises `ApiError` with 429 when too many wait, `GenerationError` for what the engine refuses.
        """
        count = len(prompts) * wish.n
        self._check(count)
        answers = Answers(self._loop.time() + self.settings.answer_seconds)
        self.live += count
        try:
            await self._ask(partial(self._add, answers, prompts, wish))
            yield answers
        finally:
            self.live -= count
            self._calls.put(partial(self._drop, answers))
            if self.settings.log_requests:
                self._tell(answers)

    def _tell(self, answers: Answers) -> None:
        """What was asked and answered, for a log that may hold it."""
        tokenizer = self.engine.tokenizer
        for request in answers.requests:
            if tokenizer is not None and request.spoken is not None:
                asked = tokenizer.decode(request.ids[: request.prompt_len])
                log.info("asked %r, answered %r", asked, request.spoken.shown)

    def _check(self, count: int) -> None:
        if not self.healthy:
            raise ApiError("the engine has stopped; the server's log says why", 503)
        if count > self.settings.max_choices:
            raise ApiError(
                f"n: {count} answers in one request exceed this server's limit of {self.settings.max_choices}",
                param="n",
            )
        excess = (
            self.live + count - self.engine.scheduler.limits.requests - self.settings.max_waiting
        )
        if excess > 0:
            wait = min(max(1, math.ceil(excess * self._seconds_each)), LONGEST_RETRY)
            raise ApiError(
                f"{self.live} answers are running or waiting, which is all this server takes; try again later",
                429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )

    async def _ask(self, call: Callable[[], T]) -> T:
        """Let the engine's thread do something between two steps."""
        future: Future[T] = Future()
        self._calls.put(partial(_fulfil, future, call))
        return await asyncio.wrap_future(future)

    def _deliver(self, arrived: list[tuple[Answers, Delta | ApiError]]) -> None:
        for answers, delta in arrived:
            answers.put(delta)
            if isinstance(delta, Delta) and delta.ended:
                now = time.monotonic()
                self._seconds_each += 0.1 * (now - self._last_end - self._seconds_each)
                self._last_end = now

    # --- in the engine's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closed:
                self._take(wait=not self.engine.busy)
                if self.engine.busy and not self._closed:
                    self._step()
        except Exception:
            log.exception("the engine has stopped")
        finally:
            self._close()
            self._take(wait=False)

    def _take(self, wait: bool) -> None:
        """Do what was asked since the last step; with `wait`, sleep until something is."""
        with suppress(queue.Empty):
            while True:
                self._calls.get(block=wait)()
                wait = False

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except Exception:
            log.exception("a step failed; its requests are given up")
            self._give_up("the engine failed; the server's log says why")
            return
        self.meters.stepped(deltas)
        arrived: list[tuple[Answers, Delta | ApiError]] = []
        for delta in deltas:
            arrived.append((self._answers_of[delta.request], delta))
            if delta.ended:
                del self._answers_of[delta.request]
        self._send(arrived)

    def _send(self, arrived: list[tuple[Answers, Delta | ApiError]]) -> None:
        if arrived:
            with suppress(RuntimeError):  # the event loop is gone, and everybody who could listen
                self._loop.call_soon_threadsafe(self._deliver, arrived)

    def _add(self, answers: Answers, prompts: Sequence[Sequence[int]], wish: Sampling) -> None:
        if self._closed:
            raise ApiError("the server is stopping", 503)
        try:
            for prompt in prompts:
                for request in self.engine.add(list(prompt), wish):
                    answers.requests.append(request)
                    self._answers_of[request] = answers
                    self.meters.arrived(request)
        except Exception:
            self._drop(answers)
            raise

    def _drop(self, answers: Answers) -> None:
        for request in answers.requests:
            self._answers_of.pop(request, None)
            if request.ended is None:
                self.engine.abort(request)
                self.meters.left(request)

    def _give_up(self, reason: str) -> None:
        """Tell everybody who waits for an answer that none will come, and free the engine."""
        waiting = list(dict.fromkeys(self._answers_of.values()))
        self._send([(answers, ApiError(reason, 500)) for answers in waiting])
        for answers in waiting:
            self._drop(answers)

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._give_up("the server stopped")


def _fulfil(future: Future[T], call: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)
