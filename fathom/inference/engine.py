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

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fathom.data import Tokenizer
from fathom.data.tokenizer import TOKENIZER_FILE
from fathom.errors import GenerationError
from fathom.inference.blocks import BlockPool
from fathom.inference.choice import Choice, Logprob, choose, logprobs_of
from fathom.inference.generate import evaluating
from fathom.inference.memory import bytes_of, bytes_of_a_pass
from fathom.inference.pages import Pages, TextPages
from fathom.inference.prompts import Prompt, check_length, ids_of
from fathom.inference.request import Ended, Request, Usage
from fathom.inference.sampling import Sampling
from fathom.inference.scheduler import Limits, Scheduler, Share
from fathom.inference.speculation import Drafter, Fresh, Payoff, Span, lay_out
from fathom.inference.step import Step
from fathom.inference.stopping import Spoken
from fathom.interop import load
from fathom.model import Transformer


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer."""

    request: Request
    token_ids: list[int]
    text: str
    """Text that became certain; empty while a character or a possible stop text is incomplete."""
    logprobs: list[Logprob]
    ended: Ended | None


@dataclass(frozen=True)
class Output:
    """One answer."""

    prompt_index: int
    choice: int
    prompt_ids: list[int]
    token_ids: list[int]
    """All tokens that the model chose, the one that ended the answer too."""
    text: str | None
    """Without end and stop texts; None without a tokenizer."""
    logprobs: list[Logprob] | None
    prompt_logprobs: list[Logprob | None] | None
    finish_reason: str
    stopped_by: int | str | None
    """The token or text that ended it."""
    usage: Usage


@dataclass(frozen=True)
class Reading:
    """What a pass gave: states before the head and before MTP [N, D], and logits if it is a single token's."""

    hidden_ND: Tensor
    states_ND: Tensor
    logits_1V: Tensor | None = None


@dataclass
class Counts:
    """What the engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    close_calls: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, request: Request) -> None:
        """A request that has ended."""
        usage = request.usage
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.preemptions += usage.preemptions
        self.close_calls += usage.close_calls
        self.ended[str(request.ended)] = self.ended.get(str(request.ended), 0) + 1


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
        single: Step | None = None,
        compiled: bool = False,
    ) -> None:
        """A model with its tokenizer (None: token ids only), or an exported directory that holds both.

        max_memory: for the cache and the work of a pass, beside the weights. speculate: drafts behind each
        token, by default as many as the model has MTP modules, and 0 for none; `always_speculate` makes them even
        where they are slower. batch_tokens: tokens of a pass. single: what reads the single token of a single text
        faster, made from the same model; for a directory on a CPU it is made here, `compiled` if wanted. Raises `GenerationError` for what cannot be.
        """
        if not isinstance(model, Transformer):
            model, tokenizer = _opened(model, tokenizer)
            single = Step(model, compiled) if Step.suits(model) else None
        elif compiled:
            raise GenerationError("compiled=True is for directories; give single=Step(model, compiled=True)")
        self.single = single
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config
        self.speculate = self._checked_drafts(speculate)
        dtype = model.compute_dtype or model.lm_head.weight.dtype
        blocks = self._blocks(bytes_of(max_memory), block_size, batch_tokens, max_requests, dtype)
        self.pool = BlockPool(blocks, block_size)
        self.pages = Pages(self.config, blocks * block_size, dtype, model.lm_head.weight.device)
        self.scheduler = Scheduler(self.pool, Limits(batch_tokens, max_requests), prefix_cache)
        self.drafter = (
            Drafter(model, self.pages, block_size, self.speculate) if self.speculate else None
        )
        self.payoff = None if always_speculate else Payoff()
        self.counts = Counts()
        self._ends = self._end_tokens()
        self._number = 0

    # --- what users call ---------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Output]:
        """Answers in the prompts' order, `n` to each; every one is yielded as soon as it and those before are done.

        A prompt is a text, a list of token ids, or a list of messages. `sampling` is for all, or one for each.
        Leaving the loop early aborts what is still running.
        """
        wishes = self._wishes(prompts, sampling)
        requests = [
            request
            for index, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
            for request in self._requests(prompt, wish, index)
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
        requests = self._requests(prompt, sampling or Sampling(), 0)
        for request in requests:
            self.scheduler.add(request)
        return requests

    def abort(self, request: Request) -> None:
        """Let go of a request and of its blocks at once; nothing happens if it has ended."""
        if request.ended is None:
            request.ended = Ended.ABORT
            self._end(request)

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer to the prompt may have, by the model's context and the cache."""
        held = len(ids_of(prompt, self.tokenizer, self.config.vocab_size))
        most = min(self.config.max_position_embeddings, self.pool.count * self.pool.size)
        return max(most - held, 0)

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.busy

    def output(self, request: Request) -> Output:
        """A request as its answer."""
        wish = request.sampling
        return Output(
            request.prompt_index,
            request.choice,
            request.ids[: request.prompt_len],
            request.answer,
            None if request.spoken is None else request.spoken.shown,
            None if wish.logprobs is None else request.logprobs,
            None if wish.prompt_logprobs is None else request.prompt_logprobs,
            str(request.ended),
            request.stopped_by,
            request.usage,
        )

    # --- the loop ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One pass of the model for all that can be read now; what it added to which answers."""
        shares = self.scheduler.schedule()
        if not shares:
            return []
        started = time.perf_counter()
        with evaluating(self.model):
            self._follow_admissions(shares)
            read = self._read(shares)
            deltas, fresh = self._speak(shares, read)
            self._draft(shares, fresh, deltas, started)
        self.counts.steps += 1
        return deltas

    def _read(self, shares: Sequence[Share]) -> Reading:
        """The pass: all shares' tokens, one behind the other; a single token by the step made for it."""
        if self.single is not None and len(shares) == 1 and shares[0].count == 1:
            return self._read_one(self.single, shares[0].request)
        spans, tokens = [], []
        for share in shares:
            request = share.request
            spans.append(Span(request.blocks, 0, request.computed, share.count))
            tokens += request.known[request.computed : request.computed + share.count]
        context = lay_out(self.model, self.pages, self.pool.size, spans)
        trunk = self.model.read(torch.tensor([tokens], device=context.rotation.cos.device), context)
        return Reading(trunk.hidden[0], trunk.state[0])

    def _read_one(self, step: Step, request: Request) -> Reading:
        pages = TextPages(self.pages, request.blocks, self.pool.size, request.computed)
        raw_1D = step.hidden(request.known[request.computed], pages)
        hidden_1D = self.model.model.norm(raw_1D)
        state = hidden_1D if self.config.mtp_hidden == "post_norm" else raw_1D
        return Reading(hidden_1D, state, step.logits(raw_1D))

    def _speak(self, shares: Sequence[Share], read: Reading) -> tuple[list[Delta], list[Fresh]]:
        """Choose tokens for those that were read to their end, and note what has been read of all."""
        hidden_ND, states_ND = read.hidden_ND, read.states_ND
        chosen = self._choices(shares, read)
        deltas, fresh, at = [], [], 0
        for share in shares:
            request, start = share.request, share.request.computed
            self._log_prompt(share, hidden_ND[at : at + share.count])
            if share.complete:
                deltas.append(self._accept(request, *chosen[request]))
            else:
                request.computed += share.count
            states = states_ND[at : at + request.computed - start]
            fresh.append(Fresh(request, start, states))
            at += share.count
            self._publish(request)
            if request.ended is not None:
                self._end(request)
        return deltas, fresh

    def _choices(
        self, shares: Sequence[Share], read: Reading
    ) -> dict[Request, tuple[Choice, list[Logprob]]]:
        """For each request read to its end: choices behind its last token and behind each draft."""
        rows: list[int] = []
        draws, requests, at = [], [], 0
        for share in shares:
            at += share.count
            if share.complete:
                request, drafts = share.request, len(share.request.drafts)
                rows += range(at - drafts - 1, at)
                draws += [request.draw(number) for number in range(drafts + 1)]
                requests.append(request)
        if not rows:
            return {}
        logits_RV = read.logits_1V
        if logits_RV is None:
            wanted = torch.tensor(rows, device=read.hidden_ND.device)
            logits_RV = self.model.lm_head(read.hidden_ND[wanted])
        choice = choose(logits_RV, draws)
        found, at = {}, 0
        for request in requests:
            part = slice(at, at + len(request.drafts) + 1)
            at = part.stop
            mine = Choice(choice.tokens[part], choice.gaps[part])
            asked = request.sampling.logprobs
            logprobs = (
                []
                if asked is None
                else logprobs_of(logits_RV[part], mine.tokens, [asked] * len(mine.tokens))
            )
            found[request] = (mine, logprobs)
        return found

    def _accept(self, request: Request, choice: Choice, logprobs: list[Logprob]) -> Delta:
        """Append the choices as long as the drafts before them were right and the answer goes on."""
        before, text, right = len(request.ids), "", 0
        drafts, request.drafts = request.drafts, []
        for number, token in enumerate(choice.tokens):
            text += request.append(token, choice.gaps[number])
            if request.ended is not None or number == len(drafts) or token != drafts[number]:
                break
            right += 1
        request.computed = before + right
        request.usage.forwards += 1
        request.usage.count_drafts(len(drafts), right)
        new = request.ids[before:]
        said = logprobs[: len(new)]
        request.logprobs += said
        self.counts.new_tokens += len(new)
        return Delta(request, new, text, said, request.ended)

    def _log_prompt(self, share: Share, hidden_ND: Tensor) -> None:
        """Log-probabilities of the prompt tokens that the rows predict, if they are asked for."""
        request, most = share.request, share.request.sampling.prompt_logprobs
        have = len(request.prompt_logprobs)
        start, end = request.computed + 1, min(request.computed + share.count + 1, request.prompt_len)
        if most is None or have >= request.prompt_len or have > start:
            return
        targets = request.ids[start:end]
        for lo in range(0, len(targets), _LOGIT_ROWS):
            part = targets[lo : lo + _LOGIT_ROWS]
            logits = self.model.lm_head(hidden_ND[lo : lo + len(part)])
            request.prompt_logprobs += logprobs_of(logits, part, [most] * len(part))

    def _draft(
        self, shares: Sequence[Share], fresh: list[Fresh], deltas: list[Delta], started: float
    ) -> None:
        """Let MTP modules follow what was read and make drafts, where that pays."""
        if self.drafter is None:
            return
        going = [f for f in fresh if f.request.ended is None]
        speaking = [f.request for f in going if f.request.decoding]
        drafting = self.payoff is None or self.payoff.drafting(len(speaking))
        if not drafting:
            going = [f for f in going if not f.request.decoding]
        for request in speaking if drafting else ():
            self.scheduler.reserve(request, len(request.ids) + self.speculate)
        if going:
            self.drafter.follow(going, set(speaking) if drafting else set())
        self._measure(shares, deltas, drafting, time.perf_counter() - started)

    def _measure(
        self, shares: Sequence[Share], deltas: list[Delta], drafting: bool, seconds: float
    ) -> None:
        """Let the payoff know of a pass that only decoded, all its requests in the same way."""
        ways = {bool(share.checked) for share in shares}
        if self.payoff is not None and ways == {drafting} and all(s.decoding for s in shares):
            tokens = sum(len(delta.token_ids) for delta in deltas)
            self.payoff.record(len(shares), drafting, seconds, tokens)

    def _follow_admissions(self, shares: Sequence[Share]) -> None:
        """Requests that were just let in begin a trail; those that were put back lose theirs."""
        if self.drafter is None:
            return
        running = set(self.scheduler.running)
        for request in [r for r in self.drafter.trails if r not in running]:
            self.drafter.forget(request)
        for share in shares:
            if share.request not in self.drafter.trails:
                self.drafter.begin(share.request)

    def _publish(self, request: Request) -> None:
        before = request.published
        self.scheduler.publish(request)
        if self.drafter is not None:
            self.drafter.published(request, before)

    def _end(self, request: Request) -> None:
        self.scheduler.remove(request)
        if self.drafter is not None:
            self.drafter.forget(request)
        self.counts.add(request)

    def _abort_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.abort(request)

    # --- making requests ---------------------------------------------------------------------------

    def _wishes(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None
    ) -> list[Sampling]:
        """One for each prompt."""
        if isinstance(prompts, str):
            raise GenerationError("prompts is one text; give a list of prompts: [text]")
        if sampling is None or isinstance(sampling, Sampling):
            return [sampling or Sampling()] * len(prompts)
        if len(sampling) != len(prompts):
            raise GenerationError(
                f"{len(prompts)} prompts and {len(sampling)} samplings do not pair; give one for all or one for each"
            )
        return list(sampling)

    def _requests(self, prompt: Prompt, wish: Sampling, index: int) -> list[Request]:
        """The `n` requests of a prompt; all but the first wait until that has read it."""
        ids = ids_of(prompt, self.tokenizer, self.config.vocab_size)
        limit = self._limit(len(ids), wish)
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        ends = frozenset(wish.stop_token_ids) | (frozenset() if wish.ignore_eos else self._ends)
        if wish.stop and self.tokenizer is None:
            raise GenerationError(f"stop={wish.stop} needs a tokenizer; use stop_token_ids")
        requests: list[Request] = []
        for choice in range(wish.n):
            spoken = None if self.tokenizer is None else Spoken(self.tokenizer.stream(), wish.stop)
            request = Request(self._number, ids, wish, seed + choice, limit, ends, spoken)
            request.prompt_index, request.choice = index, choice
            request.waits_for = requests[0] if requests else None
            requests.append(request)
            self._number += 1
        return requests

    def _limit(self, prompt: int, wish: Sampling) -> int:
        """Tokens of the longest text that prompt and answer may be together; checked against all that bounds it."""
        context, new = self.config.max_position_embeddings, wish.max_new_tokens
        check_length(prompt, new, context)
        limit = context if new is None else prompt + new
        room = self.pool.count * self.pool.size
        if limit > room and new is not None:
            raise GenerationError(
                f"{prompt} tokens and max_new_tokens={new} do not fit the cache of {room} tokens; "
                f"raise max_memory or ask for fewer"
            )
        if prompt >= room:
            raise GenerationError(
                f"a prompt of {prompt} tokens does not fit the cache of {room} tokens; raise max_memory or shorten it"
            )
        return min(limit, room)

    # --- making the engine -------------------------------------------------------------------------

    def _checked_drafts(self, speculate: int | None) -> int:
        depth = self.config.num_nextn_predict_layers
        if speculate is None:
            return depth
        if speculate < 0 or (speculate and not depth):
            raise GenerationError(
                f"speculate={speculate} needs a model with MTP modules, this has {depth}; leave it out or use 0"
            )
        return speculate

    def _blocks(
        self, memory: int, size: int, tokens: int, requests: int, dtype: torch.dtype
    ) -> int:
        """How many blocks the memory has room for beside the work of a pass; no more than could ever be used."""
        if min(size, tokens, requests) < 1:
            raise GenerationError(
                f"block_size={size}, batch_tokens={tokens} and max_requests={requests} must be at least 1"
            )
        rows = requests * (1 + self.speculate)
        work = bytes_of_a_pass(self.config, tokens + rows, dtype, rows)
        block = Pages.bytes_per_token(self.config, dtype) * size
        most = requests * -(-self.config.max_position_embeddings // size)
        count = min((memory - work) // block, most)
        if count < 2:
            raise GenerationError(
                f"max_memory of {memory:,} bytes is too little: a pass takes {work:,} and a block of the cache {block:,}; "
                f"give at least {work + 2 * block:,}, or fewer batch_tokens or max_requests"
            )
        return count

    def _end_tokens(self) -> frozenset[int]:
        if self.tokenizer is None:
            return frozenset({self.config.eos_token_id})
        return frozenset({self.tokenizer.eos_id})


_LOGIT_ROWS = 128
"""Rows of a prompt whose logits exist at a time."""


def _opened(path: str | Path, tokenizer: Tokenizer | None) -> tuple[Transformer, Tokenizer | None]:
    """An exported directory's model, on the best device there is, and its tokenizer if it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load(path, dtype).to(device).eval().requires_grad_(False)
    if tokenizer is None and (Path(path) / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer.load(path)
    return model, tokenizer
