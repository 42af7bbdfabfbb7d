"""Tokens per second of the engine, at batch 1 and more, on growing contexts, against `transformers` and llama.cpp.

All contenders have the same weights, and those in float32 give the same greedy answers to short real prompts.
One round: each decodes some tokens behind the same contexts, in turn. Also prefill, time to the first token, and bytes
of cache for each token. Bytes that a step has to touch at least (each weight once that any of its tokens
needs, and the caches) over its time, as a share of the memory rate measured in the same run, says how far
from the limit it is.

    python benchmarks/serve.py --shapes nano,mini --batches 1,16 --contexts 128,2048,8192 --json FILE
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import (
    Contender,
    Times,
    alternate,
    describe,
    environment,
    ratios,
    spread,
    table,
    write_json,
)
from roofs import Machine
from serving import EngineServing, TransformersServing
from serving_llama_cpp import LlamaServing
from shapes import MINI, NANO, WIDE, fathom_config

from fathom.planning.parameters import count_parameters

SHAPES = {"nano": NANO, "mini": MINI, "wide": WIDE}
OURS = "fathom"
STORED = ("fathom bfloat16", "fathom int8")
BACK_ENDS = ("grouped_mm", "eager", "batched_mm")
SLOW_WITH_PROMPTS = "batched_mm"
"""It gathers a copy of the experts for each token: a minute for 1,024 tokens of `mini`."""
MOST_OF_THEIRS = 16 * 2048
"""Cached tokens of all texts up to which `transformers` is asked: it expands all of them in every layer."""


def contenders(
    stack: ExitStack, options: argparse.Namespace, fields: dict[str, Any]
) -> list[Contender]:
    """Ours in each storage, each back end of theirs, llama.cpp in each type asked for; the same weights."""
    threads, asked = options.threads, []
    stored = [f"{OURS} {kind}" for kind in _words(options.stored)]
    for name in (OURS, *stored):
        storage = name.removeprefix(OURS).strip() or "float32"
        asked.append((name, EngineServing, {"memory": options.memory, "weights": storage}))
    for experts in _words(options.back_ends):
        asked.append((experts, TransformersServing, {"experts": experts}))
    for kind in _words(options.llama_cpp):
        asked.append((f"llama.cpp {kind}", LlamaServing, {"kind": kind, "threads": threads}))
    found = [
        stack.enter_context(Contender(name, build, {"fields": fields, **more}, threads))
        for name, build, more in asked
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.pt")
        found[0].call("save", path)
        for contender in found:
            contender.call("load", path)
    refuse_if_different(
        [c for c in found if c.name not in STORED and c.name[-5:-1] not in (" q8_", " q4_")]
    )
    return found


CLOSE = 1e-3
"""A lead in nats below which float32 may choose otherwise; llama.cpp is ten times as far from us as `transformers`."""


def refuse_if_different(exact: list[Contender]) -> None:
    """No comparison of speed where the greedy answers differ before the first choice that was close."""
    answers = {contender.name: contender.call("says", 3, 40, 12) for contender in exact}
    ours, leads = answers[OURS], exact[0].call("margins", 3, 40, 12)
    for name, theirs in answers.items():
        for mine, other, lead in zip(ours, theirs, leads, strict=True):
            apart = [i for i in range(len(mine)) if mine[i] != other[i]]
            if apart and lead[apart[0]] > CLOSE:
                raise SystemExit(
                    f"{name} answers otherwise than {OURS}, by {lead[apart[0]]:.4f} nats; no comparison"
                )
            if apart:
                print(
                    f"{name}: token {apart[0] + 1} of an answer differs, by {lead[apart[0]]:.1e} nats"
                )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def compare(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One shape: decoding at all batches and contexts, and prefill."""
    fields, results = SHAPES[shape], []
    with ExitStack() as stack:
        machine = stack.enter_context(Contender("machine", Machine, {}, options.threads))
        found = contenders(stack, options, fields)
        for batch in numbers(options.batches):
            for context in numbers(options.contexts):
                small = batch * context <= MOST_OF_THEIRS
                asked = [c for c in found if small or c.name not in BACK_ENDS]
                for contender in asked:
                    contender.call("fill", batch, context)
                read = machine.call("read")
                times = alternate(asked, "decode", options.rounds, options.tokens)
                read = max(read, machine.call("read"))
                cached = {c.name: c.call("bytes_per_token") for c in asked}
                results.append(decoding(shape, batch, context, times, read, cached, options.tokens))
                print(line(results[-1]), flush=True)
        for length in numbers(options.prompts):
            asked = [c for c in found if c.name != SLOW_WITH_PROMPTS]
            times = alternate(asked, "prefill", options.rounds, length)
            results.append(prefill(shape, length, times))
            print(line(results[-1]), flush=True)
    return results


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",") if word]


def least_bytes(shape: str, batch: int, context: int) -> dict[str, float]:
    """Bytes of weights that a step of `batch` tokens needs at least, and of their caches.

    Experts: how many of E are hit by `batch` tokens with K independent even choices each.
    """
    config = fathom_config(SHAPES[shape])
    E, K = config.n_routed_experts, config.num_experts_per_tok
    one = 3 * config.hidden_size * config.moe_intermediate_size
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    hit = E * (1 - (1 - K / E) ** batch)
    weights = count_parameters(config).active_with_head + layers * (hit - K) * one
    cache = batch * context * config.num_hidden_layers * config.cache_dim
    return {"weights": 4 * weights, "cache": 4 * cache}


def decoding(
    shape: str,
    batch: int,
    context: int,
    times: dict[str, Times],
    read: float,
    cached: dict[str, int],
    tokens: int,
) -> dict[str, Any]:
    touched = least_bytes(shape, batch, context)
    per_step = {name: t.median / tokens for name, t in times.items()}
    return {
        **common(shape, times),
        "what": f"decode, batch {batch}, context {context:,}",
        "batch": batch,
        "context": context,
        "ms_text": {name: t.text(per=tokens / 1e3) for name, t in times.items()},
        "tokens_per_second": {name: batch / seconds for name, seconds in per_step.items()},
        "bytes": touched,
        "read_bytes_per_second": read,
        "share_of_read_rate": {
            name: sum(touched.values()) / seconds / read for name, seconds in per_step.items()
        },
        "cache_bytes_per_token": cached,
    }


def prefill(shape: str, length: int, times: dict[str, Times]) -> dict[str, Any]:
    return {
        **common(shape, times),
        "what": f"prompt of {length:,} to its first token",
        "ms_text": {name: t.text(per=1e-3, digits=0) for name, t in times.items()},
        "tokens_per_second": {name: length / t.median for name, t in times.items()},
    }


def common(shape: str, times: dict[str, Times]) -> dict[str, Any]:
    """Times, and how many times as fast ours are as the best of `transformers` and as llama.cpp."""
    theirs = [name for name in times if name in BACK_ENDS]
    best = [min(theirs, key=lambda name: times[name].median)] if theirs else []
    others = [*best, *(name for name in times if name.startswith("llama.cpp"))]
    return {
        "shape": shape,
        "times": {name: t.summary() for name, t in times.items()},
        "best_of_theirs": best[0] if best else None,
        "times_as_fast_as": {name: ratios(times[name], times[OURS]) for name in others},
        "stored": {n: ratios(times[OURS], times[n]) for n in STORED if n in times},
    }


def line(result: dict[str, Any]) -> str:
    speeds = ", ".join(f"{name} {value:.1f}" for name, value in result["tokens_per_second"].items())
    against = ", ".join(f"{n} {spread(r)}" for n, r in result["times_as_fast_as"].items())
    return f"{result['shape']}, {result['what']}: tokens/s {speeds}; times as fast as {against}"


def report(results: list[dict[str, Any]]) -> str:
    """One row for each measurement."""
    names = list(results[0]["tokens_per_second"])
    headers = ["shape", "what", *(f"{n}, tokens/s" for n in names), "of read rate"]
    against = [name for name in names if name not in (OURS, *STORED)]
    headers += [f"times as fast as {name}" for name in against]
    headers += [f"{name}: times float32" for name in STORED]
    rows = []
    for r in results:
        row = [r["shape"], r["what"]]
        row += [
            f"{r['tokens_per_second'][n]:.1f}" if n in r["tokens_per_second"] else "" for n in names
        ]
        row.append(f"{r['share_of_read_rate'][OURS]:.0%}" if "bytes" in r else "")
        row += [
            spread(r["times_as_fast_as"][n]) if n in r["times_as_fast_as"] else "" for n in against
        ]
        row += [spread(r["stored"][n]) if n in r["stored"] else "" for n in STORED]
        rows.append(row)
    return table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default="nano,mini")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--prompts", default="128,1024", help="lengths for prefill")
    parser.add_argument(
        "--stored", default="bfloat16,int8", help="ours in fewer bits beside float32"
    )
    parser.add_argument("--back-ends", default="grouped_mm,eager,batched_mm")
    parser.add_argument(
        "--llama-cpp", default="", help="types to compare with, such as f32,q8_0,q4_0"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6, help="decoded per contender and round")
    parser.add_argument("--memory", default="3GiB", help="the engine's max_memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = environment()
    print(describe(facts), flush=True)
    results = [result for shape in options.shapes.split(",") for result in compare(shape, options)]
    print(report(results))
    cached = {r["shape"]: r["cache_bytes_per_token"] for r in results if "bytes" in r}
    print(f"bytes of cache per token: {cached}")
    write_json(options.json, {"environment": facts, "results": results})


if __name__ == "__main__":
    main()
