"""Keys, sizes, times and queues: who is let in, with how much, and what the others hear."""

from __future__ import annotations

import logging
import socket
import threading
import time

import httpx
import pytest

from fathom.errors import ServingError
from fathom.serving import Settings
from tests.serving.live import NAME, Live, serving, wait_for

LONG = {"max_tokens": 100, "ignore_eos": True}


def test_only_who_has_a_key_is_let_in() -> None:
    with serving(Settings(model_name=NAME, api_keys=("first key", "second"))) as live:
        for header in (
            None,
            "Bearer third",
            "Basic second",
            "second",
            "Bearer",
            "Bearer second é",
        ):
            headers = {} if header is None else {"Authorization": header.encode()}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                refused = httpx.get(live.url + path, headers=headers)
                assert (
                    refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                )
                assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("first key", "second"):
            shown = {"Authorization": f"Bearer {key}"}
            assert httpx.get(live.url + "/v1/models", headers=shown).status_code == 200
        assert httpx.get(live.url + "/health").status_code == 200
        assert httpx.get(live.url + "/").status_code == 200


def test_other_pages_may_not_call_unless_they_are_named(live: Live) -> None:
    origin = {"Origin": "https://page.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST"}
    url = live.url + "/v1/chat/completions"
    assert "access-control-allow-origin" not in httpx.options(url, headers=ask).headers
    assert (
        "access-control-allow-origin"
        not in httpx.get(live.url + "/v1/models", headers=origin).headers
    )
    settings = Settings(NAME, api_keys=("key",), cors_origins=("https://page.example",))
    with serving(settings) as open_to_one:
        url = open_to_one.url + "/v1/models"
        assert httpx.options(url, headers=ask).status_code == 200
        refused = httpx.get(url, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.get(url, headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_bodies_are_bounded_in_size_and_time() -> None:
    settings = Settings(NAME, max_body_bytes=1000, body_seconds=0.3)
    with serving(settings) as live:
        assert live.chat("x" * 2000).status_code == 413
        chunks = httpx.post(live.url + "/v1/completions", content=iter([b"x" * 600] * 2))
        assert chunks.status_code == 413 and "1,000 bytes" in chunks.json()["error"]["message"]
        with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1]))) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
            )
            slow.settimeout(5)
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        assert live.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "body"),
        (b"{", "body is not valid JSON"),
        (b"[]", "body"),
        (b'"x"', "body"),
        (b"\xff\xfe", "body"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 100_000, "body"),
        (b'{"model": "tiny", "prompt": [[1], "a"]}', "prompt"),
        (b'{"model": "tiny", "prompt": []}', "prompt"),
    ],
)
def test_bodies_that_are_no_requests(live: Live, content: bytes, word: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused = httpx.post(live.url + "/v1/completions", content=content, headers=headers)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and word in error["message"]


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(live: Live) -> None:
    for found, status in [
        (httpx.get(live.url + "/nowhere"), 404),
        (httpx.get(live.url + "/v1/completions"), 405),
    ]:
        assert found.status_code == status and found.json()["error"]["message"]
        assert found.headers["x-content-type-options"] == "nosniff"


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    settings = Settings(NAME, max_waiting=1)
    with serving(settings, max_requests=1) as live:
        live.engine.pause = 0.02
        replies: list[httpx.Response] = []

        def ask() -> None:
            replies.append(live.chat(seed=1, **LONG))

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        wait_for(lambda: live.application.server.service.live == 2)
        wait_for(lambda: live.metric("num_requests_waiting") == 1)
        refused = live.chat()
        assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        live.engine.pause = 0.0
        for client in clients:
            client.join()
        assert [reply.status_code for reply in replies] == [200, 200]
        assert live.chat(max_tokens=1).status_code == 200


def test_answers_end_with_their_time() -> None:
    with serving(Settings(NAME, answer_seconds=0.5), max_requests=1) as live:
        live.engine.pause = 0.02
        cut = live.chat(**LONG).json()
        assert cut["choices"][0]["finish_reason"] == "length"
        assert 1 < cut["usage"]["completion_tokens"] < 100
        live.wait_until_idle()
        live.engine.pause = 1.0
        late = live.chat(**LONG)
        assert late.status_code == 503 and late.json()["error"]["code"] == "time_limit"


def test_prompts_are_bounded() -> None:
    with serving(Settings(NAME, max_prompt_tokens=20)) as live:
        refused = live.chat("words " * 20).json()["error"]
        assert refused["param"] == "messages" and refused["code"] == "context_length_exceeded"
        assert live.chat("a", max_tokens=1).status_code == 200


def test_the_log_holds_no_text_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="fathom.serving")
    for asked in (False, True):
        caplog.clear()
        with serving(Settings(NAME, log_requests=asked)) as live:
            live.engine.say("the answer is sea")
            live.chat("secret question")
            live.chat("secret question", temperature="secret")
            live.post("/v1/completions", prompt="secret question")
            httpx.get(live.url + "/secret")
        assert ("secret" in caplog.text) == ("answer is" in caplog.text) == asked
        assert "POST /v1/chat/completions 200" in caplog.text


def test_settings_that_cannot_be() -> None:
    for wrong in (
        {"max_waiting": -1},
        {"max_body_bytes": 0},
        {"answer_seconds": 0},
        {"max_prompt_tokens": 0},
        {"api_keys": ("",)},
        {"api_keys": ("schlüssel",)},
    ):
        with pytest.raises(ServingError):
            Settings(**wrong)  # type: ignore[arg-type]


def test_one_bad_request_does_not_disturb_another(live: Live) -> None:
    alone = live.chat(seed=1, **LONG).json()["choices"][0]["message"]["content"]
    live.engine.pause = 0.002
    found: list[str] = []

    def ask() -> None:
        found.append(live.chat(seed=1, **LONG).json()["choices"][0]["message"]["content"])

    client = threading.Thread(target=ask)
    client.start()
    wait_for(lambda: live.engine.busy)
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        assert live.chat("x " * 1500).status_code == 400
        assert live.chat(temperature=-1).status_code == 400
        assert live.chat(max_tokens=1, logit_bias={"5": 100}).status_code == 200
    client.join()
    assert found == [alone]
