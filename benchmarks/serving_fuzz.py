"""Requests that nobody would write, made from the server's own OpenAPI document: none may end with a 5xx.

Needs `pip install schemathesis`, which nothing else here uses. The server runs as a process, with a small
random model unless a directory is given; schemathesis makes valid and invalid bodies for every route,
hangs none of them up, and calls whatever answers with 500 or above a failure. Our own fuzz comes after it: valid
bodies of which parts are replaced by other values.
`python benchmarks/serving_fuzz.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from serving_process import NAME, Served, served

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALID: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": NAME,
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "b"}]},
            ],
            "max_tokens": 2,
            "temperature": 0.5,
            "stop": ["x"],
            "tools": [TOOL],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "stream_options": {"include_usage": True},
            "logit_bias": {"5": 1.0},
        },
    ),
    ("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}),
    (
        "/v1/responses",
        {
            "model": NAME,
            "input": [{"role": "user", "content": "a"}],
            "max_output_tokens": 2,
            "tools": [{"type": "function", "name": "f"}],
        },
    ),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 300]}),
]  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 16, 100, 1000, 2**31, 2**63, -(2**63), 2**200, 0.5, -0.0, 1e308,
    "", "a", "\x00", "\ud800", "é" * 100, "<｜tool▁calls▁begin｜>", "<｜end▁of▁sentence｜>", "none", "required",
    [], {}, [[]], [None], [1], ["a"], [[1]], list(range(300)), {"a": 1}, {"type": "text"}, {"type": "json_object"},
    {"type": "function", "function": {"name": "f"}}, [TOOL], [TOOL, TOOL],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all parts of a body."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


def mutated(body: dict[str, Any], rng: random.Random) -> Any:
    """A body with one to three parts replaced or taken away."""
    found: Any = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(found))
        if not path:
            continue
        parent = found
        for key in path[:-1]:
            parent = parent[key]
        if rng.random() < 0.2 and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(STRANGE))
    return found


def own_fuzz(server: Served, seconds: float, seed: int) -> tuple[Counter[int], list[str]]:
    """Statuses of mutated requests, and those that must not be."""
    rng, statuses, faults = random.Random(seed), Counter[int](), list[str]()
    until = time.monotonic() + seconds
    with httpx.Client(base_url=server.url, timeout=60) as http:
        while time.monotonic() < until:
            path, valid = rng.choice(VALID)
            body = mutated(valid, rng)
            if isinstance(body, dict) and rng.random() < 0.3:
                body["stream"] = True
            content = json.dumps(body).encode()
            answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
            statuses[answer.status_code] += 1
            broken = answer.status_code >= 500 or '"type":"server_error"' in answer.text
            if broken and len(faults) < 10:
                faults.append(f"{path} {content[:500]!r}: {answer.status_code} {answer.text[:300]}")
    return statuses, faults


def schemathesis(server: Served, seconds: float, seed: int, examples: int) -> int:
    """Exit status of the tool; it prints its own report."""
    program = shutil.which("schemathesis") or str(Path(sys.executable).with_name("schemathesis"))
    line = [program, "run", server.url + "/openapi.json", "--checks", "not_a_server_error"]
    more = ["--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "60"]
    try:
        with tempfile.TemporaryDirectory() as folder:  # it leaves a cache where it runs
            return subprocess.run(
                [*line, *more], cwd=folder, timeout=seconds, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        print(f"schemathesis was stopped after {seconds:g} seconds")
        return -1
    except FileNotFoundError:
        raise SystemExit("this needs schemathesis; run: pip install schemathesis") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", nargs="?", help="exported model (default: a small random one)")
    parser.add_argument("--seconds", type=float, default=600, help="for schemathesis, at most")
    parser.add_argument("--own-seconds", type=float, default=60, help="for our own fuzz")
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis, for each route")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with served(chosen.directory, "--answer-seconds", 20) as server:
        status = schemathesis(server, chosen.seconds, chosen.seed, chosen.examples)
        statuses, faults = own_fuzz(server, chosen.own_seconds, chosen.seed)
        left = server.metrics()
    print(f"schemathesis: exit status {status}")
    print(f"own fuzz: {statuses.total()} requests, by status {dict(sorted(statuses.items()))}")
    print(
        f"afterwards: {left['num_requests_running']:g} running, {left['kv_cache_usage_perc']:.0%} of the cache in use"
    )
    for fault in faults:
        print("FAULT", fault)
    raise SystemExit(1 if faults or status > 0 or left["kv_cache_usage_perc"] else 0)


if __name__ == "__main__":
    main()
