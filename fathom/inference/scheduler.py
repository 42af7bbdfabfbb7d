"""Who reads how many tokens in the next pass, and who must give up its blocks.

Running requests go on in the order of their arrival: those that decode with one token and their
drafts, those that still read their prompt with a chunk of it. Then waiting ones are let in as long
as there is room for their whole text so far. A request that needs a block when there is none takes
those of the youngest running one, which is put back to the front of the queue and read again later
(its blocks stay known, so often little of it). The oldest can therefore always go on; a request
that would not fit even alone is refused when it comes.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from fathom.inference.blocks import BlockPool, digests
from fathom.inference.request import Request


@dataclass(frozen=True)
class Limits:
    """What one pass may hold."""

    batch_tokens: int
    """Tokens of a pass; decoding ones go first, prompts share what they leave (at least a block)."""
    requests: int
    """Requests that run at a time."""


@dataclass(frozen=True)
class Share:
    """What one request reads in a pass: its next `count` tokens, drafts included."""

    request: Request
    count: int
    checked: int = 0
    """How many of them are drafts."""
    decoding: bool = False

    @property
    def complete(self) -> bool:
        """Whether all its tokens are read then, so that the next one can be chosen."""
        return self.request.computed + self.count == len(self.request.known)


class Scheduler:
    """The queue, the running requests, and the blocks of all."""

    def __init__(self, pool: BlockPool, limits: Limits, prefix_cache: bool = True) -> None:
        self.pool, self.limits, self.prefix_cache = pool, limits, prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """To the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> list[Share]:
        """The shares of the next pass; empty only when there is nothing to do."""
        decoding = sum(1 + len(r.drafts) for r in self.running if r.decoding)
        room = max(self.limits.batch_tokens - decoding, self.pool.size)
        shares = []
        for request in tuple(self.running):
            if request not in self.running:
                continue
            count = request.unread + len(request.drafts)
            if not request.decoding:
                count = min(count, room)
            if count and self._make_room(request, count):
                count = min(count, request.unread + len(request.drafts))
                shares.append(Share(request, count, len(request.drafts), request.decoding))
                room -= 0 if request.decoding else count
        return shares + self._admit(room)

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for the request's next `count` tokens, if need be those of younger ones."""
        while not self.reserve(request, request.computed + count):
            if request.drafts:  # guesses are not worth another's blocks
                count -= len(request.drafts)
                request.drafts = []
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def reserve(self, request: Request, tokens: int) -> bool:
        """Let the request's blocks hold `tokens` tokens; False, and nothing done, if they cannot."""
        missing = self._blocks_for(tokens) - len(request.blocks)
        if missing <= 0:
            return True
        if not self.pool.can_allocate(missing):
            return False
        last = request.blocks[-1] if request.blocks else None
        wanted = self._blocks_for(request.limit) - len(request.blocks)
        request.blocks += self.pool.allocate(request.number, missing, last, wanted)
        return True

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and let it wait at the front."""
        self.running.remove(request)
        self.pool.release(request.number, request.blocks)
        request.put_back()
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """A request that has ended or was aborted, wherever it is."""
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.number, request.blocks)
            request.blocks = []
        elif request in self.waiting:
            self.waiting.remove(request)

    def publish(self, request: Request) -> None:
        """Let later texts find the blocks that the request has filled."""
        full = request.computed // self.pool.size
        if not self.prefix_cache or full <= request.published:
            return
        request.digests = digests(
            request.ids[: full * self.pool.size], self.pool.size, request.digests
        )
        for number in range(request.published, full):
            self.pool.publish(request.blocks[number], request.digests[number])
        request.published = full

    def _admit(self, room: int) -> list[Share]:
        shares: list[Share] = []
        while self.waiting and room > 0 and len(self.running) < self.limits.requests:
            request = self.waiting[0]
            if self._must_wait(request):
                break
            known = self._known_blocks(request)
            needed = self._blocks_for(len(request.ids) + 1) - len(known)
            spare = len(self.running)  # a block for each of those that run already
            if needed + self.pool.unheld(known) + spare > self.pool.free and self.running:
                break
            self._let_in(request, known)
            count = min(request.unread, room)
            if not self.reserve(request, request.computed + count):
                self.preempt(request)
                request.usage.preemptions -= 1
                break
            shares.append(Share(request, count))
            room -= count
        return shares

    def _must_wait(self, request: Request) -> bool:
        """Answers to the same prompt wait until the first has read it, and find it in the cache."""
        first = request.waits_for
        if first is None or not self.prefix_cache:
            return False
        return first.ended is None and first.computed < first.prompt_len

    def _known_blocks(self, request: Request) -> list[int]:
        """Blocks with the text's beginning; its last token is always read, for what comes after it."""
        if not self.prefix_cache or request.sampling.prompt_logprobs is not None:
            return []
        request.digests = digests(request.ids, self.pool.size, request.digests)
        most = (len(request.ids) - 1) // self.pool.size
        return self.pool.known(request.digests[:most])

    def _let_in(self, request: Request, known: list[int]) -> None:
        self.waiting.popleft()
        insort(self.running, request, key=lambda r: r.number)
        self.pool.hold(known)
        request.blocks = list(known)
        request.computed = len(known) * self.pool.size
        request.published = len(known)
        if not request.usage.preemptions:
            request.usage.cached_tokens = request.computed

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.size)
