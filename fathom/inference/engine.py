"""The engine (report §3.4): many requests on one latent cache, continuously batched, with drafts.

    waiting --admitted when blocks are free--> running --end, limit, abort--> done
                 ^------ preempted: blocks taken, read again later ------|

One step reads a pass of the model: a chunk of each prompt, the last token of each answer and the
drafts behind it. Then every request that has been read to its end gets the model's choice of its
next token, drafts that are equal to the choices are kept, MTP modules make new ones. The loop is
`step`; everything else puts requests in and carries what they said out.

What is promised: a greedy answer is the one that reading the whole text anew for each token gives,
a drawn one has the model's distribution, and both are the same in any batch, with any chunking,
preemption, prefix cache or speculation, wherever the choice was not closer than `choice.CLOSE`
(1e-4): products of other sizes round otherwise in the last digits. Closer choices are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fathom.data import Tokenizer
from fathom.data.tokenizer import TOKENIZER_FILE
from fathom.errors import GenerationError
from fathom.inference.blocks import BlockPool
from fathom.inference.choice import Choice, Logprob
from fathom.inference.choosing import Reading, accept, choices_of, fail, log_prompt
from fathom.inference.few import FewRows
from fathom.inference.generate import evaluating
from fathom.inference.layout import Span, lay_out
from fathom.inference.making import RequestMaker, wishes_for
from fathom.inference.memory import blocks_for, bytes_of
from fathom.inference.outputs import Counts, Delta, Output, output_of
from fathom.inference.pages import Pages
from fathom.inference.payoff import Payoff
from fathom.inference.prompts import Prompt
from fathom.inference.request import Ended, Request, count_places
from fathom.inference.sampling import Sampling
from fathom.inference.scheduler import Limits, Scheduler, Share
from fathom.inference.speculation import Drafter, Fresh
from fathom.interop import load
from fathom.model import Transformer
from fathom.precision.storage import Storage, store_weights


class Engine:
    """Answers any number of requests on one model; one thread at a time may use it."""

    def __init__(
        self,
        model: Transformer | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        max_memory: int | str = "4GiB",
        speculate: int | None = None,
        always_speculate: bool = False,
        batch_tokens: int = 512,
        max_requests: int = 64,
        block_size: int = 16,
        prefix_cache: bool = True,
        weights: Storage = "float32",
    ) -> None:
        """A model with its tokenizer (None: token ids only), or an exported directory that holds both.

        max_memory: for the cache and the work of a pass, beside the weights. speculate: drafts behind each
        token, by default as many as the model has MTP modules, and 0 for none; `always_speculate` makes them even
        where they are slower. batch_tokens: tokens of a pass. weights: how a directory's are stored on a
        CPU ("bfloat16" and "int8" are read faster).

        Raises `GenerationError` for what cannot be.
        """
        if not isinstance(model, Transformer):
            model, tokenizer = _opened(model, tokenizer, weights)
        elif weights != "float32":
            raise GenerationError(
                f"weights={weights!r} is for a directory; store those of a model with store_weights beforehand"
            )
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config
        self.speculate = self._checked_drafts(speculate)
        dtype = model.compute_dtype or model.lm_head.weight.dtype
        blocks = blocks_for(
            self.config,
            bytes_of(max_memory),
            block_size,
            batch_tokens,
            max_requests,
            self.speculate,
            dtype,
        )
        self.pool = BlockPool(blocks, block_size)
        self.pages = Pages(self.config, blocks * block_size, dtype, model.lm_head.weight.device)
        self.few = self._few_rows()
        self.scheduler = Scheduler(self.pool, Limits(batch_tokens, max_requests), prefix_cache)
        self.drafter = (
            Drafter(model, self.pages, block_size, self.speculate, self.few)
            if self.speculate
            else None
        )
        promising = model.lm_head.weight.device.type != "cpu"  # there a second row costs little
        self.payoff = None if always_speculate else Payoff(self.speculate, promising)
        self.counts = Counts()
        self.maker = RequestMaker(self.config, tokenizer, blocks * block_size)

    # --- what users call ---------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Output]:
        """Answers in the prompts' order, `n` to each; every one is yielded as soon as it and those before are done.

        A prompt is a text, a list of token ids, or a list of messages. `sampling` is for all, or one for each.
        Leaving the loop early aborts what is still running.
        """
        wishes = wishes_for(prompts, sampling)
        requests = [
            request
            for index, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
            for request in self.maker.make(prompt, wish, index)
        ]
        for request in requests:
            self.scheduler.add(request)
        try:
            for request in requests:
                while request.ended is None:
                    self.step()
                yield self.output(request)
        finally:
            self._abort_all(requests)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Delta]:
        """What each step adds to the answers to one prompt."""
        requests = self.add(prompt, sampling)
        try:
            while any(request.ended is None for request in requests):
                yield from (delta for delta in self.step() if delta.request in requests)
        finally:
            self._abort_all(requests)

    def add(self, prompt: Prompt, sampling: Sampling | None = None) -> list[Request]:
        """Put a prompt's requests into the queue, `n` of them; `step` moves them on."""
        requests = self.maker.make(prompt, sampling or Sampling(), 0)
        for request in requests:
            self.scheduler.add(request)
        return requests

    def abort(self, request: Request) -> None:
        """Let go of a request and of its blocks at once; nothing happens if it has ended."""
        if request.ended is None:
            request.ended = Ended.ABORT
            self._end(request)
        elif request in self.scheduler.running:  # an error came between its end and its leaving
            self._end(request)

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer to the prompt may have, by the model's context and the cache."""
        return self.maker.room_behind(prompt)

    def forget_prefixes(self) -> None:
        """Let no later text find what earlier ones left: for when the model's weights have changed."""
        self.pool.forget_all()

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.busy

    def output(self, request: Request) -> Output:
        """A request as its answer."""
        return output_of(request)

    # --- the loop ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One pass of the model for all that can be read now; what it added to which answers.

        After an error (or Ctrl-C) within, the engine can go on: every answer is where it was, or by this step's
        tokens further, whose delta is lost.
        """
        for request in [r for r in self.scheduler.running if r.ended is not None]:
            self._end(request)  # it ended in a step that an error cut short
        shares = self.scheduler.schedule()
        if not shares:
            return []
        started = time.perf_counter()
        with evaluating(self.model):
            read = self._read(shares)
            deltas, fresh = self._speak(shares, read)
            self._draft(shares, fresh, deltas, started)
        self.counts.steps += 1
        return deltas

    def _read(self, shares: Sequence[Share]) -> Reading:
        """The pass: all shares' tokens, one behind the other."""
        spans, tokens = [], []
        for share in shares:
            request = share.request
            spans.append(Span(request.blocks, 0, request.computed, share.count))
            tokens += request.known[request.computed : request.computed + share.count]
        self._look_at_weights()
        if self.few is not None and len(tokens) <= self.few.most:
            return Reading(*self.few.read(tokens, spans))
        context = lay_out(self.model, self.pages, self.pool.size, spans)
        trunk = self.model.read(torch.tensor([tokens], device=context.rotation.cos.device), context)
        return Reading(trunk.hidden[0], trunk.state[0])

    def _speak(self, shares: Sequence[Share], read: Reading) -> tuple[list[Delta], list[Fresh]]:
        """Choose tokens for those that were read to their end, and note what has been read of all."""
        hidden_ND, states_ND = read.hidden_ND, read.states_ND
        chosen = choices_of(self.model, shares, read)
        deltas, fresh, at = [], [], 0
        for share in shares:
            request, start = share.request, share.request.computed
            log_prompt(self.model, share, hidden_ND[at : at + share.count])
            if request in chosen:
                deltas.append(self._accept(request, *chosen[request]))
            elif not share.complete:
                request.computed += share.count
            elif request.drafts:  # they may be the cause: it is read again without them
                request.drafts = []
            else:
                deltas.append(fail(request))
            states = states_ND[at : at + request.computed - start]
            if len(states):
                fresh.append(Fresh(request, start, states))
            at += share.count
            self._publish(request)
            if request.ended is not None:
                self._end(request)
        return deltas, fresh

    def _accept(self, request: Request, choice: Choice, logprobs: list[Logprob]) -> Delta:
        delta, drafts, right = accept(request, choice, logprobs)
        count_places(self.counts.drafted, drafts)
        count_places(self.counts.accepted, right)
        self.counts.new_tokens += len(delta.token_ids)
        return delta

    def _draft(
        self, shares: Sequence[Share], fresh: list[Fresh], deltas: list[Delta], started: float
    ) -> None:
        """Let MTP modules follow what was read and make drafts, where that pays."""
        if self.drafter is None:
            return
        going = [f for f in fresh if f.request.ended is None]
        speaking = [f.request for f in going if f.request.decoding]
        alone, payoff = all(share.decoding for share in shares), self.payoff
        drafting = payoff is None or payoff.drafting(len(speaking), alone)
        if not drafting:
            follow = payoff is None or payoff.following(len(self.scheduler.running))
            going = [f for f in going if follow and not f.request.decoding]
        for request in speaking if drafting else ():
            self.scheduler.reserve(request, len(request.ids) + self.speculate)
        before = time.perf_counter()
        if going:
            self.drafter.follow(going, set(speaking) if drafting else set())
        if payoff is None:
            return
        now = time.perf_counter()
        if alone and {bool(share.checked) for share in shares} == {drafting}:
            tokens = sum(len(delta.token_ids) for delta in deltas)
            payoff.record(len(shares), drafting, now - started, tokens)
        else:
            payoff.spend(now - started, now - before)

    def _publish(self, request: Request) -> None:
        before = request.published
        self.scheduler.publish(request)
        if self.drafter is not None and request.published != before:
            self.drafter.published(request, before)

    def _end(self, request: Request) -> None:
        self.scheduler.remove(request)
        if self.drafter is not None:
            self.drafter.forget(request)
        self.counts.add(request)

    def _abort_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.abort(request)

    # --- making the engine -------------------------------------------------------------------------

    def _look_at_weights(self) -> None:
        """They may have moved, to another place or dtype, since the last step."""
        if self.few is None or self.few.holds():
            return
        self.few = self._few_rows()
        if self.drafter is not None:
            self.drafter.few = self.few

    def _few_rows(self) -> FewRows | None:
        if not FewRows.suits(self.model):
            return None
        return FewRows(self.model, self.pages, self.pool.size)

    def _checked_drafts(self, speculate: int | None) -> int:
        depth = self.config.num_nextn_predict_layers
        if speculate is None:
            return depth
        whole = isinstance(speculate, int) and not isinstance(speculate, bool)
        if not whole or speculate < 0:
            raise GenerationError(
                f"speculate={speculate!r} must be a whole number of drafts, 0 for none"
            )
        if speculate and not depth:
            raise GenerationError(
                f"speculate={speculate} needs a model with MTP modules, this has {depth}; leave it out or use 0"
            )
        return speculate


def _opened(
    path: str | Path, tokenizer: Tokenizer | None, weights: Storage
) -> tuple[Transformer, Tokenizer | None]:
    """An exported directory's model, on the best device there is, and its tokenizer if it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load(path, dtype).to(device).eval().requires_grad_(False)
    store_weights(model, weights)
    if tokenizer is None and (Path(path) / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer.load(path)
    return model, tokenizer
