"""Answers with a guide are in its form, whatever goes on beside them, and in the model's own proportions."""

from __future__ import annotations

import json
import random
import re
import sys
from functools import cache
from typing import Any, ClassVar

import llguidance
import pytest
import torch

import fathom
from fathom.data import Tokenizer
from fathom.errors import GenerationError
from fathom.inference import Engine, Guide, Output, Request, Sampling
from fathom.inference.guided import Grammars, Guided
from tests.inference.chi_square import fits
from tests.inference.test_engine import nothing_is_left, small_engine
from tests.model.tiny import tiny_model

TEXTS = [
    '{"name":"ada","age":36,"tags":["x","yz"],"ok":true} {"name": "bob", "age": 7}',
    "<think> alpha, then beta </think> yes no abc ccc alter gamma",
] * 20
WORDS, ROWS = 320, 340
"""Tokens of the tokenizer and rows of the model, which has some that the tokenizer does not know."""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ada", "bob", "日本"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
CHOICE = "alpha|alter|beta|gamma"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, WORDS)


@cache
def model(seed: int = 0) -> fathom.Transformer:
    return tiny_model(seed, vocab_size=ROWS, num_nextn_predict_layers=2).eval()


def engine(seed: int = 0, **settings: Any) -> Engine:
    return Engine(model(seed), tokenizer(), always_speculate=True, **settings)


def ask(guide: Guide, prompt: Any = "yes", seed: int = 1, **wishes: Any) -> Output:
    wish = Sampling(**{"temperature": 1.0, "max_new_tokens": 60, **wishes}, seed=seed, guide=guide)
    return next(engine().generate([prompt], wish))


def is_person(text: str | None) -> bool:
    found = json.loads(text or "")
    tags = found["tags"]
    return (
        list(found) == ["name", "age", "tags", "ok"]
        and found["name"] in ("ada", "bob", "日本")
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 150
        and len(tags) <= 2
        and all(isinstance(tag, str) and len(tag) <= 3 for tag in tags)
        and isinstance(found["ok"], bool)
    )


@pytest.mark.parametrize("seed", range(3))
def test_answers_have_the_form_whatever_goes_on_beside(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, WORDS) for _ in range(rng.randint(1, 12))] for _ in range(7)]
    guides = [Guide("json_schema", PERSON)] * 5 + [Guide("regex", f"({CHOICE}){{1,9}}"), None]
    heats = [0.0, 0.3, 1.0, 1.0, 3.0, 1.0, 1.0]
    wishes = [
        Sampling(heat, seed=rng.randrange(999), max_new_tokens=100, guide=guide)
        for heat, guide in zip(heats, guides, strict=True)
    ]
    plain = list(engine(seed, speculate=0).generate(prompts, wishes))
    for output in plain[:5]:
        assert output.finish_reason == "stop" and is_person(output.text)
        assert tokenizer().eos_id not in output.token_ids[:-1]
    assert re.fullmatch(f"({CHOICE}){{1,9}}", plain[5].text or "")
    for drafts in (0, 1, 3):
        tight = small_engine(
            model(seed), 124, tokenizer=tokenizer(), speculate=drafts, block_size=4, batch_tokens=24
        )
        outputs = list(tight.generate(prompts, wishes))
        assert sum(output.usage.preemptions for output in outputs) > 0
        assert not drafts or sum(sum(output.usage.accepted) for output in outputs) > 20
        for a, b in zip(plain, outputs, strict=True):
            assert a.token_ids == b.token_ids or a.usage.close_calls + b.usage.close_calls
        nothing_is_left(tight)


def answers(guide: Guide, count: int, **wishes: Any) -> list[Output]:
    wish = Sampling(**{"seed": 0, "max_new_tokens": 60, **wishes}, n=count, guide=guide)
    return list(engine().generate(["yes"], wish))


def test_any_json_object() -> None:
    outputs = answers(Guide("json_object"), 8, max_new_tokens=80, logit_bias={_id("}"): 3.0})
    assert all((output.text or "{").startswith("{") for output in outputs)
    whole = [output.text or "" for output in outputs if output.finish_reason == "stop"]
    assert len(whole) > 3 and all(isinstance(json.loads(text), dict) for text in whole)


def _id(text: str) -> int:
    (token,) = tokenizer().encode(text)
    return token


def test_a_grammar() -> None:
    grammar = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9]/'
    outputs = answers(Guide("lark", grammar), 10, max_new_tokens=30)
    assert all(set(output.text or "") <= set("123456789+()") for output in outputs)
    whole = [output.text or "" for output in outputs if output.finish_reason == "stop"]
    assert len(whole) > 4 and all(eval(text) > 0 for text in whole)


def test_blanks_between_the_parts_of_json_are_possible_and_come_to_an_end() -> None:
    only_a = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    guide = Guide("json_schema", json.dumps(only_a | {"additionalProperties": False}))
    blank = {_id(" "): 50.0, _id("\n"): 50.0}
    output = ask(guide, logit_bias=blank, max_new_tokens=120, temperature=0.0)
    assert json.loads(output.text or "") == {"a": 1}
    assert max(map(len, re.findall(r"\s+", output.text or ""))) == 40


# --- what is masked, by a grammar and by drafts ----------------------------------------------------------------------


def continues(text: str, words: list[str]) -> bool:
    return any(word.startswith(text) for word in words)


def guided(guide: Guide, prompt: str = "yes", ends: tuple[int, ...] = (1,)) -> Guided:
    grammars = Grammars(tokenizer(), ROWS)
    return grammars.begin(guide, tokenizer().encode(prompt), frozenset(ends))[0]


def allowed(state: Guided, drafts: list[int] | None = None) -> set[int]:
    mask = state.allowed(drafts or [])
    assert mask is not None and mask.shape == (ROWS,)
    return set(mask.nonzero()[:, 0].tolist())


def spelled(prefix: str, words: list[str]) -> set[int]:
    """Tokens that continue the prefix towards one of the words, found by trying all."""
    texts = {token: tokenizer().decode([token]) for token in range(WORDS)}
    return {token for token, text in texts.items() if continues(prefix + text, words)}


@pytest.mark.parametrize(
    "words", [["a", "b", "cc"], ["yes", "no"], ["1", "12", "123"], ["日", "日本", "x"]]
)
def test_exactly_the_tokens_that_continue_a_valid_text_are_allowed(words: list[str]) -> None:
    state = guided(Guide("regex", "|".join(words)))
    found = allowed(state)
    whole = {token for token in found if "\ufffd" not in tokenizer().decode([token])}
    assert whole == spelled("", words)
    assert all(tokenizer().decode([token]) == "\ufffd" for token in found - whole)


def test_rows_that_the_tokenizer_does_not_have_are_never_allowed() -> None:
    state = guided(Guide("regex", "(?s:.*)"))
    assert allowed(state) & set(range(WORDS, ROWS)) == set()
    assert tokenizer().eos_id in allowed(state)
    huge = dict.fromkeys(range(WORDS, ROWS), 90.0)
    output = ask(Guide("regex", "(?s:.{5,9})"), logit_bias=huge)
    assert max(output.token_ids) < WORDS


def test_masks_behind_drafts_are_those_of_the_text_with_them() -> None:
    state, ids = guided(Guide("regex", CHOICE)), [_id(letter) for letter in "alter"]
    for place in range(len(ids)):
        for count in range(len(ids) - place):
            fresh = guided(Guide("regex", CHOICE))
            for token in ids[: place + count]:
                fresh.advance(token)
            assert allowed(state, ids[place : place + count]) == allowed(fresh)
        assert state.allowed(ids[place:]) is None  # nothing follows
        state.advance(ids[place])
        assert state.complete == (place == len(ids) - 1)
    assert state.failure is None


def test_nothing_matters_behind_drafts_that_end_or_leave_the_form() -> None:
    state = guided(Guide("regex", "a+"))
    assert state.allowed([_id("a"), tokenizer().eos_id]) is None
    assert state.allowed([_id("b")]) is None
    assert tokenizer().eos_id in allowed(state, [_id("a")])
    assert tokenizer().eos_id not in allowed(state)
    state.advance(_id("a"))
    assert state.failure is None and not state.complete


def test_drafts_that_the_form_forbids_are_not_proposed() -> None:
    server = engine(speculate=4)
    words = CHOICE.split("|")
    wish = Sampling(1.0, n=6, seed=3, guide=Guide("regex", CHOICE), max_new_tokens=20)
    requests, proposed = server.add("yes", wish), 0
    while server.busy:
        server.step()
        for request in requests:
            if request.ended is None and request.drafts:
                assert continues(tokenizer().decode(without_end(request)), words)
                proposed += 1
    assert proposed > 3 and all(text_of(server, request) in words for request in requests)


def without_end(request: Request) -> list[int]:
    """Answer and drafts up to the first that would end it; behind that, drafts are of no use."""
    ids = request.answer + request.drafts
    guided = request.guided
    assert guided is not None
    for count in range(1, len(request.drafts) + 1):
        if guided.allowed(request.drafts[:count]) is None:
            return request.answer + request.drafts[:count]
    return ids


def text_of(server: Engine, request: Request) -> str:
    return server.output(request).text or ""


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_distribution_is_the_models_renormalised_one(drafts: int) -> None:
    words, prompt = ["a", "b", "cc"], tokenizer().encode("yes no")
    guide = Guide("regex", "a|b|cc")
    wish = Sampling(1.0, n=600, seed=7, max_new_tokens=4, guide=guide)
    server = engine(max_requests=100, batch_tokens=1000, speculate=drafts)
    outputs = list(server.generate([prompt], wish))
    assert {output.text for output in outputs} <= set(words)
    counts = torch.bincount(torch.tensor([o.token_ids[0] for o in outputs]), minlength=ROWS)
    with torch.no_grad():
        logits = model()(torch.tensor([prompt]), mtp=False).logits[0, -1].double()
    within = torch.tensor([token in spelled("", words) for token in range(ROWS)])
    assert fits(counts, torch.where(within, logits.exp(), 0) / logits[within].exp().sum())


# --- how answers end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_ends_with_its_form(ignore_eos: bool) -> None:
    output = ask(Guide("regex", "alpha"), ignore_eos=ignore_eos)
    assert output.text == "alpha" == tokenizer().decode(output.token_ids)
    assert (output.finish_reason, output.stopped_by) == ("stop", None)


def test_an_answer_that_could_go_on_ends_with_an_end_token() -> None:
    end = tokenizer().eos_id
    output = ask(Guide("regex", "a+"), logit_bias={end: 50.0})
    assert re.fullmatch("a+", output.text or "") and output.token_ids[-1] == end
    assert (output.finish_reason, output.stopped_by) == ("stop", end)
    endless = ask(Guide("regex", "a+"), logit_bias={end: 50.0}, ignore_eos=True, max_new_tokens=30)
    assert end not in endless.token_ids and endless.finish_reason == "length"
    other = ask(
        Guide("regex", "a+"),
        ignore_eos=True,
        stop_token_ids=(_id("b"),),
        logit_bias={_id("b"): 9.0},
    )
    assert other.token_ids[-1] == _id("b") == other.stopped_by
    assert re.fullmatch("a+", other.text or "")


def test_a_form_is_stronger_than_any_bias() -> None:
    never = {token: float("-inf") for token in range(ROWS)}
    guide = Guide("regex", "alpha")
    wishes = [
        Sampling(heat, seed=1, guide=guide, logit_bias=bias, max_new_tokens=20)
        for heat, bias in ((0.0, {}), (0.0, never), (1.0, never), (1.0, {}))
    ]
    outputs = list(engine().generate(["yes"] * 4, wishes))
    assert [output.finish_reason for output in outputs] == ["stop"] * 4
    assert [output.text for output in outputs] == ["alpha"] * 4


class Weak:
    """The library's matcher with next to no patience."""

    limits: ClassVar[dict[str, int]] = {}

    grammar_from_lark = staticmethod(llguidance.LLMatcher.grammar_from_lark)

    def __new__(cls, tokens: Any, grammar: str, **settings: Any) -> Any:
        limits = llguidance.LLParserLimits(**cls.limits)
        return _Matcher(tokens, grammar, limits=limits, **settings)


_Matcher = llguidance.LLMatcher


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"step_max_items": 20}, "Too many items"), ({"step_lexer_fuel": 10}, "too many expressions")],
)
def test_a_grammar_that_outgrows_the_limits_ends_its_own_answer_only(
    drafts: int, limits: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = " | ".join(f'"x{i}" "y"' for i in range(30))
    guide = Guide("lark", f'start: "a" many\nmany: {many}')
    wish = Sampling(0.0, guide=guide, max_new_tokens=20)
    free = Sampling(0.0, max_new_tokens=20, ignore_eos=True)
    server = engine(speculate=drafts)
    monkeypatch.setattr(Weak, "limits", limits)
    monkeypatch.setattr(llguidance, "LLMatcher", Weak)
    broken, other = server.generate(["yes", "yes"], [wish, free])
    assert broken.finish_reason == "error" and reason in str(broken.stopped_by)
    assert re.fullmatch("ax?", broken.text or "") and other.finish_reason == "length"
    monkeypatch.setattr(llguidance, "LLMatcher", _Matcher)
    (whole,) = server.generate(["yes"], wish)
    assert whole.finish_reason == "stop" and re.fullmatch(r"ax\d+y", whole.text or "")
    nothing_is_left(server)


@pytest.mark.parametrize("text", ["<｜User｜>", "a<|EOT|>b", "<｜end▁of▁sentence｜>x"])
def test_text_that_spells_a_control_token_is_text(text: str) -> None:
    output = ask(Guide("json_schema", {"const": text}))
    assert json.loads(output.text or "") == text and output.finish_reason == "stop"
    control = {tokenizer().control_id(name) for name in ("<｜User｜>", "<|EOT|>")} | {1}
    assert control.isdisjoint(output.token_ids)


def test_a_grammar_may_name_control_tokens() -> None:
    output = ask(Guide("lark", 'start: "a" <|EOT|> "b"'))
    assert output.token_ids == [_id("a"), tokenizer().control_id("<|EOT|>"), _id("b")]


def test_other_wishes_go_along() -> None:
    guide = Guide("regex", f"({CHOICE} ){{3,6}}")
    server = engine()
    wish = Sampling(
        1.0,
        n=3,
        seed=2,
        guide=guide,
        frequency_penalty=1.0,
        repetition_penalty=1.2,
        logprobs=2,
        max_new_tokens=80,
    )
    outputs = list(server.generate([[{"role": "user", "content": "yes or no?"}]], wish))
    assert len(outputs) == 3
    for output in outputs:
        assert output.finish_reason == "length" or re.fullmatch(str(guide.value), output.text or "")
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    stopped = next(
        server.generate(["no"], Sampling(1.0, seed=2, guide=guide, stop=("a ",), max_new_tokens=80))
    )
    assert stopped.stopped_by == "a " and "a " not in (stopped.text or "")
    nothing_is_left(server)


# --- behind a text ---------------------------------------------------------------------------------------------------

YES = Guide("regex", "yes|no", after="</think>")


def test_the_end_of_the_prompt_begins_the_form() -> None:
    for prompt in ("<think> alpha </think>", "</think>\n\n", [{"role": "user", "content": "x"}]):
        chat = not isinstance(prompt, str)
        output = ask(
            Guide("regex", "yes|no", after="<｜Assistant｜>" if chat else "</think>"), prompt
        )
        assert output.text in ("yes", "no")


@pytest.mark.parametrize("prompt", ["yes", "</think> yes", "<think>"])
def test_nothing_is_masked_while_the_reasoning_goes_on(prompt: str) -> None:
    wish = {"seed": 5, "max_new_tokens": 40, "ignore_eos": True}
    free = next(engine().generate([prompt], Sampling(1.0, **wish)))
    held = ask(YES, prompt, **wish)
    assert held.token_ids == free.token_ids and "</think>" not in (free.text or "")


def said_in(*pieces: str) -> list[int]:
    """Each piece letter by letter if it is no token of its own."""
    ids: list[int] = []
    for piece in pieces:
        found = tokenizer().encode(piece)
        ids += found if len(found) == 1 else [_id(letter) for letter in piece]
    return ids


@pytest.mark.parametrize(
    "pieces", [("</think>",), ("<", "/", "t", "hink", ">"), ("x<", "</", "think", ">")]
)
def test_the_form_begins_behind_the_text_in_whatever_tokens_it_comes(
    pieces: tuple[str, ...],
) -> None:
    ids = said_in(*pieces)
    state = guided(YES)
    for place, token in enumerate(ids):
        mask = state.allowed()
        assert mask is None or bool(mask[token])
        assert set(allowed(state, ids[place:])) == spelled("", ["yes", "no"])
        state.advance(token)
    assert allowed(state) == spelled("", ["yes", "no"])
    for token in tokenizer().encode("no"):
        state.advance(token)
    assert state.complete


def test_a_text_begun_by_the_prompt_is_ended_by_the_answer() -> None:
    state = guided(YES, "alpha </thi")
    for token in said_in("nk", ">"):
        assert state.seen is not None
        state.advance(token)
    assert state.seen is None and allowed(state) == spelled("", ["yes", "no"])


def test_no_token_says_the_end_of_the_text_and_more_at_once() -> None:
    mark = 'e"'  # `":` and others go on behind it
    state = guided(Guide("regex", "yes|no", after=mark))
    state.advance(_id("e"))
    mask = state.allowed()
    assert mask is not None
    longer = {t for t in range(WORDS) if re.match('".', tokenizer().decode([t]), re.DOTALL)}
    inside = {t for t in range(WORDS) if re.search('e".', tokenizer().decode([t]), re.DOTALL)}
    assert longer and set((~mask).nonzero()[:, 0].tolist()) == longer | inside


def test_the_answer_says_the_text_itself() -> None:
    """What the model says of its own accord is taken for the text; the form begins behind it."""
    wish = {"max_new_tokens": 40, "ignore_eos": True}
    begun = 0
    for seed in range(6):
        free = next(engine().generate(["yes"], Sampling(1.0, seed=seed, **wish)))
        place, mark = own_words(free.token_ids)
        if not mark:
            continue
        held = ask(Guide("regex", CHOICE, after=mark), seed=seed, **wish)
        assert held.token_ids[:place] == free.token_ids[:place]
        assert tokenizer().decode(held.token_ids[place:]) in CHOICE.split("|")
        assert held.finish_reason == "stop"
        begun += 1
    assert begun > 2


def own_words(ids: list[int]) -> tuple[int, str]:
    """A text of two tokens that the answer says, where it ends, and that it has not said before."""
    for place in range(5, 15):
        mark = tokenizer().decode(ids[place - 2 : place])
        before = tokenizer().decode(ids[: place - 1])
        if mark.isascii() and mark.isprintable() and len(mark) > 1 and mark not in before:
            return place, mark
    return 0, ""


def test_a_control_token_can_be_the_text() -> None:
    definition = json.loads(tokenizer().definition)
    definition["added_tokens"].append(
        {**definition["added_tokens"][0], "id": WORDS, "content": "</think>", "special": False}
    )
    known = Tokenizer(json.dumps(definition), tokenizer().settings)
    grammars = Grammars(known, ROWS)
    (state,) = grammars.begin(YES, known.encode("yes"), frozenset({1}))
    state.advance(known.control_id("</think>"))
    assert allowed(state) == spelled("", ["yes", "no"])
    prompt = [*known.encode("yes"), known.control_id("</think>")]
    (begun,) = grammars.begin(YES, prompt, frozenset({1}))
    assert allowed(begun) == spelled("", ["yes", "no"])
    (anything,) = grammars.begin(Guide("regex", "(?s:.*)"), [5], frozenset({1}))
    assert known.control_id("</think>") not in allowed(anything)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("xml", None, "'xml' is not known; use one of json_schema"),
        ("json_schema", None, "must be a JSON object"),
        ("json_schema", "{", "schema is not JSON: Expecting property name"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_object", {}, "takes no value"),
        ("regex", "", "needs a text"),
        ("lark", {"a": 1}, "needs a text"),
    ],
)
def test_values_that_are_no_guide(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(GenerationError, match=re.escape(message)):
        Guide(kind, value)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Guide("json_schema", {"type": "strin"}), "strin"),
        (Guide("json_schema", {"properties": {"a": {"minimum": "x"}}}), "minimum"),
        (Guide("json_schema", {"type": "object", "properties": {"a": {"not": {}}}}), "not"),
        (Guide("json_schema", {"$ref": "#/$defs/missing"}), "missing"),
        (Guide("regex", "(a"), "regex"),
        (Guide("lark", "start: missing"), "missing"),
        (Guide("regex", "a{0}"), "permits no answer: only the empty text"),
    ],
)
def test_forms_that_cannot_be(guide: Guide, message: str) -> None:
    server = engine()
    with pytest.raises(GenerationError, match=message) as error:
        server.add("yes", Sampling(guide=guide, ignore_eos=True, max_new_tokens=9))
    assert len(str(error.value)) < 400 and guide.kind in str(error.value)
    assert not server.busy


def test_guides_need_a_tokenizer_and_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = Sampling(guide=Guide("json_object"), max_new_tokens=9)
    with pytest.raises(GenerationError, match="needs a tokenizer"):
        Engine(model()).add([5], wish)
    letters = Tokenizer.train(["abc"], None, kind="char")
    with pytest.raises(GenerationError, match="byte-level"):
        Engine(model(), letters).add([3], wish)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GenerationError, match=re.escape("pip install 'fathom[guide]'")):
        engine().add("yes", wish)
    with pytest.raises(GenerationError, match="must be a Guide"):
        Sampling(guide={"type": "object"})  # type: ignore[arg-type]


def test_the_plain_loop_has_no_guides() -> None:
    with pytest.raises(GenerationError, match=re.escape("ask a fathom.Engine")):
        fathom.inference.generate(model(), [5], 3, Sampling(guide=Guide("json_object")))
