"""Answers with a guide are in its form, whatever goes on beside them, and end as it does."""

from __future__ import annotations

import json
import random
import re
import sys
from typing import Any, ClassVar

import llguidance
import pytest

import fathom
from fathom.data import Tokenizer
from fathom.errors import GenerationError
from fathom.inference import Engine, Guide, Output, Sampling
from tests.inference.engines import nothing_is_left, small_engine
from tests.inference.guides import (
    CHOICE,
    PERSON,
    ROWS,
    WORDS,
    ask,
    engine,
    id_of,
    is_person,
    model,
    tokenizer,
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
    outputs = answers(Guide("json_object"), 8, max_new_tokens=80, logit_bias={id_of("}"): 3.0})
    assert all((output.text or "{").startswith("{") for output in outputs)
    whole = [output.text or "" for output in outputs if output.finish_reason == "stop"]
    assert len(whole) > 3 and all(isinstance(json.loads(text), dict) for text in whole)


def test_a_grammar() -> None:
    grammar = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[1-9]/'
    outputs = answers(Guide("lark", grammar), 10, max_new_tokens=30)
    assert all(set(output.text or "") <= set("123456789+()") for output in outputs)
    whole = [output.text or "" for output in outputs if output.finish_reason == "stop"]
    assert len(whole) > 4 and all(eval(text) > 0 for text in whole)


def test_blanks_between_the_parts_of_json_are_possible_and_come_to_an_end() -> None:
    only_a = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    guide = Guide("json_schema", json.dumps(only_a | {"additionalProperties": False}))
    blank = {id_of(" "): 50.0, id_of("\n"): 50.0}
    output = ask(guide, logit_bias=blank, max_new_tokens=120, temperature=0.0)
    assert json.loads(output.text or "") == {"a": 1}
    assert max(map(len, re.findall(r"\s+", output.text or ""))) == 40


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
        stop_token_ids=(id_of("b"),),
        logit_bias={id_of("b"): 9.0},
    )
    assert other.token_ids[-1] == id_of("b") == other.stopped_by
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
    assert output.token_ids == [id_of("a"), tokenizer().control_id("<|EOT|>"), id_of("b")]


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
