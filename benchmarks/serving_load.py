"""`fathom serve` under load: many clients that come, go and break off; and SIGTERM in the middle of it.

First, for `--seconds`, `--clients` clients send conversations and texts of random length, streamed or
not, and half of them hang up at a random moment. Afterwards nothing may be left: no request running
or waiting, all blocks free, no client that waited in vain, memory as it was. Then the clients go on,
SIGTERM comes, and every request that was accepted must be answered to its end.
`python benchmarks/serving_load.py --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from harness import environment, table, write_json
from serving_process import NAME, Served, served

WORDS = [
    "sea",
    "sand",
    "stone",
    "river",
    "field",
    "wind",
    "light",
    "word",
    "name",
    "house",
    "road",
    "tree",
    "day",
    "night",
]
PATIENCE = 120.0
"""Seconds without a sign of life after which a request counts as stuck."""


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    stop: bool = False

    def note(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def wonder(self, what: str) -> None:
        """Something that must not be."""
        self.note("surprise")
        if len(self.surprises) < 20:
            self.surprises.append(what)


def request(rng: random.Random, stream: bool) -> tuple[str, dict[str, Any]]:
    """A random path and body."""
    text = " ".join(rng.choices(WORDS, k=rng.choice((3, 10, 40, 150))))
    body = {
        "model": NAME,
        "stream": stream,
        "max_tokens": rng.randint(1, 60),
        "n": rng.choice((1, 1, 2)),
    }
    if rng.random() < 0.5:
        body |= {"temperature": 0, "stop": "zzz"}
    if rng.random() < 0.3:
        return "/v1/completions", {**body, "prompt": text, "logprobs": 2}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


async def visit(http: httpx.AsyncClient, rng: random.Random, tally: Tally) -> None:
    """One request, read to its end or left at some point."""
    stream, leaving = rng.random() < 0.7, rng.random() < 0.5
    path, body = request(rng, stream)
    if leaving and not stream:
        try:
            await asyncio.wait_for(http.post(path, json=body), rng.uniform(0.01, 0.5))
            tally.note("answered")
        except TimeoutError:
            tally.note("left")
        return
    async with http.stream("POST", path, json=body) as answer:
        if answer.status_code == 429:
            tally.note("429")
            await answer.aread()
            await asyncio.sleep(float(answer.headers["Retry-After"]) * rng.random())
            return
        if answer.status_code != 200:
            tally.note(str(answer.status_code))
            if answer.status_code != 503:
                tally.wonder(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            return
        patience = rng.randint(0, 20) if leaving else None
        last = ""
        async for line in answer.aiter_lines():
            last = line or last
            if patience is not None:
                patience -= 1
                if patience < 0:
                    tally.note("left")
                    return
        whole = last == "data: [DONE]" if stream else last.endswith("}")
        tally.note("answered") if whole else tally.wonder(f"ended with {last[-80:]!r}")


async def client(url: str, number: int, tally: Tally) -> None:
    """Requests one after the other until it is told to stop."""
    rng = random.Random(number)
    timeout = httpx.Timeout(PATIENCE, connect=PATIENCE)
    async with httpx.AsyncClient(base_url=url, timeout=timeout) as http:
        while not tally.stop:
            try:
                await visit(http, rng, tally)
            except httpx.TimeoutException as error:
                tally.note("stuck")
                tally.wonder(f"stuck: {error!r}")


async def load(server: Served, clients: int, seconds: float) -> dict[str, Any]:
    """The first part."""
    tally, began = Tally(), time.monotonic()
    tasks = [asyncio.create_task(client(server.url, n, tally)) for n in range(clients)]
    memory: list[int] = []
    while time.monotonic() - began < seconds:
        await asyncio.sleep(min(2.0, seconds / 20))
        memory.append(server.resident())
    tally.stop = True
    await asyncio.gather(*tasks)
    await asyncio.sleep(1)
    left = await asyncio.to_thread(server.metrics)
    third = max(1, len(memory) // 3)
    return {
        "seconds": seconds,
        "clients": clients,
        "outcomes": dict(tally.outcomes),
        "surprises": tally.surprises,
        "running_after": left["num_requests_running"],
        "waiting_after": left["num_requests_waiting"],
        "cache_usage_after": left["kv_cache_usage_perc"],
        "generated_tokens": left["generation_tokens_total"],
        "preemptions": left["num_preemptions_total"],
        "memory_MiB": [round(bytes_ / 2**20, 1) for bytes_ in memory],
        "memory_first_third_peak_MiB": round(max(memory[:third]) / 2**20, 1),
        "memory_last_third_peak_MiB": round(max(memory[-third:]) / 2**20, 1),
        "memory_after_MiB": round(server.resident() / 2**20, 1),
    }


async def last_visit(http: httpx.AsyncClient, rng: random.Random, outcomes: Counter[str]) -> bool:
    """A request that stays to its end; whether there may be another."""
    path, body = request(rng, stream=True)
    accepted = False
    try:
        async with http.stream("POST", path, json=body) as answer:
            accepted, last = answer.status_code == 200, ""
            async for line in answer.aiter_lines():
                last = line or last
            if answer.status_code in (429, 503):
                outcomes[str(answer.status_code)] += 1
                await asyncio.sleep(0.2 * rng.random())
                return True
            outcomes["answered" if last == "data: [DONE]" else "lost"] += 1
            return True
    except httpx.ConnectError:
        outcomes["nobody listens any more"] += 1
        return False
    except httpx.TransportError:
        outcomes["lost" if accepted else "closed before it was accepted"] += 1
        return False


async def drain(server: Served, clients: int) -> dict[str, Any]:
    """The second part: SIGTERM when all clients have begun again and the first were answered."""
    outcomes: Counter[str] = Counter()

    async def stay(number: int) -> None:
        rng = random.Random(-number)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
            while await last_visit(http, rng, outcomes):
                pass

    tasks = [asyncio.create_task(stay(n)) for n in range(clients)]
    live = {"num_requests_running": 0.0}
    while live["num_requests_running"] < 2 or not outcomes["answered"]:
        await asyncio.sleep(0.5)
        live = await asyncio.to_thread(server.metrics)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    await asyncio.gather(*tasks)
    status = await asyncio.to_thread(server.process.wait, 60)
    return {
        "running_at_sigterm": live["num_requests_running"],
        "waiting_at_sigterm": live["num_requests_waiting"],
        "outcomes": dict(outcomes),
        "seconds_until_the_end": round(time.monotonic() - began, 2),
        "exit_status": status,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", nargs="?", help="exported model (default: a small random one)")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-requests", type=int, default=32)
    parser.add_argument("--max-waiting", type=int, default=150)
    parser.add_argument("--max-memory", default="201MiB", help="so small that blocks run short")
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args()
    options = ("--max-requests", chosen.max_requests, "--max-waiting", chosen.max_waiting)
    with served(chosen.directory, *options, "--max-memory", chosen.max_memory) as server:
        loaded = asyncio.run(load(server, chosen.clients, chosen.seconds))
        drained = asyncio.run(drain(server, chosen.clients))
    found = {"load": loaded, "drain": drained}
    for name, part in found.items():
        rows = [[key, str(value)] for key, value in part.items() if key != "memory_MiB"]
        print(table([name, ""], rows))
    if chosen.json:
        write_json(chosen.json, {"environment": environment(), **found})
    idle = not (loaded["running_after"] or loaded["waiting_after"] or loaded["cache_usage_after"])
    good = idle and not loaded["surprises"] and not drained["outcomes"].get("lost")
    raise SystemExit(0 if good and drained["exit_status"] == 0 else 1)


if __name__ == "__main__":
    main()
