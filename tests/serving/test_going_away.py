"""Clients that go away, servers that go away, and what is counted meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import fathom
from fathom.serving import Settings
from tests.serving.live import NAME, Live, model, serving, tokenizer, wait_for

LONG = {"max_tokens": 200, "ignore_eos": True}
TALK = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_client_that_goes_away_frees_its_blocks(live: Live, path: str, stream: bool) -> None:
    live.engine.pause = 0.02
    what = {"/v1/chat/completions": {"messages": TALK, "n": 2}, "/v1/completions": {"prompt": "a"}}
    body = {"model": NAME, "stream": stream, **what.get(path, {"input": "Hello"})}
    body |= LONG if "responses" not in path else {"max_output_tokens": 200}
    port = int(live.url.rsplit(":", 1)[1])
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    aborted = live.metric("request_success_total")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: live.engine.pool.free < live.engine.pool.count)
        if stream:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    wait_for(lambda: not live.engine.busy, seconds=1)  # 200 tokens would take four
    assert live.engine.pool.free == live.engine.pool.count
    assert live.metric("request_success_total") == aborted + (2 if "chat" in path else 1)
    assert live.application.server.service.live == 0


def test_a_client_that_goes_away_from_the_queue_is_forgotten() -> None:
    with serving(max_requests=1) as live:
        live.engine.pause = 0.02
        with live.stream(**LONG):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    live.url + "/v1/chat/completions",
                    json={"model": NAME, "messages": TALK},
                    timeout=0.3,
                )
            wait_for(lambda: not live.engine.scheduler.waiting, seconds=1)
        live.wait_until_idle()


def test_others_are_not_disturbed(live: Live) -> None:
    alone = live.chat(seed=1, **LONG).json()["choices"][0]["message"]["content"]
    live.engine.pause = 0.005
    found: list[str] = []

    def ask() -> None:
        found.append(live.chat(seed=1, **LONG).json()["choices"][0]["message"]["content"])

    staying = threading.Thread(target=ask)
    staying.start()
    for _ in range(5):
        with live.stream(**LONG) as leaving:
            next(leaving.iter_bytes())
    staying.join()
    assert found == [alone]


def test_draining_lets_accepted_requests_finish() -> None:
    with serving(Settings(NAME)) as live:
        live.engine.pause = 0.01
        with live.stream(max_tokens=50, ignore_eos=True) as answer:
            lines = answer.iter_lines()
            next(lines)
            live.process.handle_exit(signal.SIGTERM, None)
            refused = live.chat()
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "draining"
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert sum('"content":"' in line for line in rest) > 20
        wait_for(lambda: live.process.should_exit)


def test_draining_ends_with_its_time() -> None:
    with serving(Settings(NAME, drain_seconds=0.3)) as live:
        live.engine.pause = 0.05
        with live.stream(**LONG) as answer:
            live.process.handle_exit(signal.SIGTERM, None)
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()  # ten seconds of tokens are left


def test_metrics(live: Live) -> None:
    names = (
        "generation_tokens_total",
        "prompt_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "prefix_cache_queries_total",
    )
    before = {name: live.metric(name) for name in names}
    usage = live.chat(max_tokens=10, ignore_eos=True, n=2).json()["usage"]
    gained = {name: live.metric(name) - before[name] for name in names}
    prompt = usage["prompt_tokens"]
    assert gained == dict(zip(names, (20, 2 * prompt, 2, 2, 18, 2, 2 * prompt), strict=True))
    assert live.metric("num_requests_running") == live.metric("num_requests_waiting") == 0
    assert live.metric("kv_cache_usage_perc") == 0
    assert live.metric("http_requests_total") > 0
    text = httpx.get(live.url + "/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_drafts_are_counted() -> None:
    names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    agreed = {"logit_bias": {"50": 100}, "max_tokens": 20, "temperature": 0}
    with serving(speculate=1, always_speculate=True) as live:
        drafted = accepted = 0
        for wish in ({"max_tokens": 20, "ignore_eos": True, "seed": 1}, agreed):
            details = live.chat(**wish).json()["usage"]["completion_tokens_details"]
            accepted += details["accepted_prediction_tokens"]
            drafted += details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
            found = [live.metric(f"spec_decode_num_{name}_total") for name in names]
            assert found == [drafted, drafted, accepted, accepted]
        assert details["rejected_prediction_tokens"] == 0 < accepted < drafted


def test_the_page_runs_nothing_but_itself(live: Live) -> None:
    page = httpx.get(live.url + "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`fathom serve` as a user starts it, slowed down."""
    fathom.save(model(), tmp_path / "tiny", tokenizer())
    slow = "import time, sys; from fathom.inference import Engine; step = Engine.step\n"
    slow += "Engine.step = lambda self: (time.sleep(0.01), step(self))[1]\n"
    slow += "from fathom.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", slow, "serve", str(tmp_path / "tiny"), "--port", "0"]
    more = ["--max-memory", "256MiB", "--max-requests", "4", "--device", "cpu"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "FATHOM_API_KEYS": "k"}
    process = subprocess.Popen([*line, *more], stderr=subprocess.PIPE, text=True, env=variables)
    yield process
    process.kill()
    process.wait()


def test_sigterm_loses_no_accepted_request(command: subprocess.Popen[str]) -> None:
    assert command.stderr is not None
    url = ""
    for line in command.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            url = found[0]
            break
    assert url, "the server did not say where it listens"
    body = {"model": NAME, "messages": TALK, "max_tokens": 100, "ignore_eos": True}
    with httpx.Client(headers={"Authorization": "Bearer k"}, timeout=30) as client:
        wait_for(lambda: _answers(client, url))
        with client.stream(
            "POST", url + "/v1/chat/completions", json={**body, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            command.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get(url + "/health").status_code == 503)
            rest = list(lines)
        assert "data: [DONE]" in rest and sum('"content"' in line for line in rest) > 20
    assert command.wait(20) == 0


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False
