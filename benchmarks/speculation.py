"""What drafts by MTP modules are worth on a trained model: how many are right, and what that does to the clock.

For each number of drafts and temperature a set of held-out texts is continued, by batches of some size: drafting
always, never, and as the engine decides. Acceptance by place and tokens per pass are counts; the clock is
compared in turn within rounds.

    python benchmarks/speculation.py RUN --prompts TEXT.txt --drafts 1,2,3 --temperatures 0,0.7,1 --batches 1,4,16
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import describe, environment, limit_threads, table, write_json

from fathom.cli.opening import Speaker, open_speaker
from fathom.inference import Engine, Output, Sampling

WAYS = ("never", "always", "as it pays")


def engine_for(speaker: Speaker, way: str, drafts: int, batch: int) -> Engine:
    return Engine(
        speaker.model,
        speaker.tokenizer,
        max_memory="2GiB",
        speculate=0 if way == "never" else drafts,
        always_speculate=way == "always",
        max_requests=batch,
        prefix_cache=False,
    )


def beginnings(speaker: Speaker, path: Path, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` stretches of a text, evenly spaced."""
    ids = speaker.tokenizer.encode(path.read_text(encoding="utf-8"))
    if len(ids) < count * length:
        raise SystemExit(f"{path} has {len(ids)} tokens, {count * length} are needed")
    stride = (len(ids) - length) // max(count - 1, 1)
    return [ids[k * stride : k * stride + length] for k in range(count)]


def measure(
    speaker: Speaker, prompts: list[list[int]], drafts: int, temperature: float, options: Any
) -> list[dict[str, Any]]:
    """One row for each batch size."""
    wishes = [
        Sampling(temperature, seed=k, max_new_tokens=options.tokens, ignore_eos=True)
        for k in range(len(prompts))
    ]
    rows = []
    for batch in options.batches:
        engines = {way: engine_for(speaker, way, drafts, batch) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, list[Output]] = {}
        for number in range(options.rounds + 1):
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                started = time.perf_counter()
                answers[way] = list(engines[way].generate(prompts, wishes))
                if number:  # the first round warms up
                    seconds[way].append(time.perf_counter() - started)
        rows.append(_row(batch, drafts, temperature, seconds, answers))
        print(_line(rows[-1]), flush=True)
    return rows


def _row(
    batch: int,
    drafts: int,
    temperature: float,
    seconds: dict[str, list[float]],
    answers: dict[str, list[Output]],
) -> dict[str, Any]:
    usages = [output.usage for output in answers["always"]]
    drafted = [
        sum(u.drafted[place] for u in usages if place < len(u.drafted)) for place in range(drafts)
    ]
    right = [
        sum(u.accepted[place] for u in usages if place < len(u.accepted)) for place in range(drafts)
    ]
    tokens = sum(u.completion_tokens for u in usages)
    plain = [output.token_ids for output in answers["never"]]
    differing = sum(
        output.token_ids != plain[k] for way in WAYS for k, output in enumerate(answers[way])
    )
    return {
        "batch": batch,
        "drafts": drafts,
        "temperature": temperature,
        "acceptance": [a / d if d else 0.0 for a, d in zip(right, drafted, strict=True)],
        "tokens_per_pass": tokens / sum(u.forwards for u in usages),
        "seconds": seconds,
        "times_as_fast": {
            way: [a / b for a, b in zip(seconds["never"], seconds[way], strict=True)]
            for way in WAYS[1:]
        },
        "answers_that_differ": differing,
        "close_calls": sum(output.usage.close_calls for way in WAYS for output in answers[way]),
    }


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["drafts"]),
        str(row["temperature"]),
        str(row["batch"]),
        " / ".join(f"{share:.0%}" for share in row["acceptance"]),
        f"{row['tokens_per_pass']:.2f}",
        *(_spread(row["times_as_fast"][way]) for way in WAYS[1:]),
        f"{row['answers_that_differ']} ({row['close_calls']})",
    ]


def _line(row: dict[str, Any]) -> str:
    return " · ".join(_cells(row))


HEADERS = (
    "drafts",
    "temperature",
    "batch",
    "right, by place",
    "tokens per pass",
    "always: times as fast",
    "as it pays: times as fast",
    "answers that differ (close calls)",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="run folder or exported directory with MTP modules")
    parser.add_argument("--prompts", type=Path, required=True, help="a text the model did not see")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens to each")
    parser.add_argument("--drafts", default="1,2,3")
    parser.add_argument("--temperatures", default="0,0.7,1")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.batches = [int(word) for word in options.batches.split(",")]
    limit_threads(options.threads)
    torch.manual_seed(0)
    facts = environment()
    print(describe(facts), flush=True)
    speaker = open_speaker(options.run, "cpu")
    prompts = beginnings(speaker, options.prompts, options.count, options.length)
    rows = [
        row
        for drafts in map(int, options.drafts.split(","))
        for temperature in map(float, options.temperatures.split(","))
        for row in measure(speaker, prompts, drafts, temperature, options)
    ]
    print(table(HEADERS, [_cells(row) for row in rows]))
    write_json(options.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
