"""Milliseconds per decoded token at batch 1 on growing contexts: ours, plain and compiled, against
`transformers`.

All contenders have the same weights and agree on a short real prompt. One round: each decodes some
tokens behind the same length of context. Bytes that one token has to touch (active weights and
cache) over the time, as a share of the memory rate measured in the same run, says how far from the
limit a step is. `python benchmarks/decode_vs_transformers.py --help`.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from decoding import FathomDecoding, TransformersDecoding
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
from shapes import MINI, NANO, fathom_config

from fathom.planning.parameters import count_parameters

SHAPES = {"nano": NANO, "mini": MINI}
BACK_ENDS = ("grouped_mm", "eager", "batched_mm")
AGREEMENT = 1e-4
OURS = ("fathom", "fathom compiled")


def compare(name: str, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One shape at all contexts."""
    fields, contexts = SHAPES[name], [int(c) for c in options.contexts.split(",")]
    with ExitStack() as stack:
        machine = stack.enter_context(Contender("machine", Machine, {}, threads))
        contenders = []
        for name_of_ours in OURS:
            ours = {"fields": fields, "max_len": max(contexts) + options.tokens}
            ours["compiled"] = name_of_ours != OURS[0]
            contender = Contender(name_of_ours, FathomDecoding, ours, threads)
            contenders.append(stack.enter_context(contender))
        for experts in BACK_ENDS:
            theirs = {"fields": fields, "experts": experts}
            contender = Contender(experts, TransformersDecoding, theirs, threads)
            contenders.append(stack.enter_context(contender))
        differences = _same_answers(contenders)
        results = []
        for context in contexts:
            read = [machine.call("read")]
            for contender in contenders:
                contender.call("fill", context)
            times = alternate(contenders, "decode", options.rounds, options.tokens)
            read.append(machine.call("read"))
            results.append(_figures(name, context, threads, times, max(read), options.tokens))
            results[-1]["logit_differences"] = differences
            print(_lines(results[-1]), flush=True)
    return results


def _same_answers(contenders: list[Contender]) -> dict[str, float]:
    """The same weights everywhere; logits after a short prompt must agree with theirs."""
    first = next(c for c in contenders if c.name not in OURS)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.pt")
        first.call("save", path)
        for contender in contenders:
            contender.call("load", path)
    expected = first.call("logits", 48, 4)
    differences = {
        c.name: float((c.call("logits", 48, 4) - expected).abs().max()) for c in contenders
    }
    if max(differences.values()) > AGREEMENT * float(expected.abs().max()):
        raise SystemExit(f"logits differ from {first.name}'s by {differences}; no comparison")
    return differences


def _figures(
    shape: str, context: int, threads: int, times: dict[str, Times], read: float, tokens: int
) -> dict[str, Any]:
    config = fathom_config(SHAPES[shape])
    weights = 4 * count_parameters(config).active_with_head
    cache = 4 * context * config.num_hidden_layers * config.cache_dim
    best = min((n for n in times if n not in OURS), key=lambda n: times[n].median)
    per_token = {name: t.median / tokens for name, t in times.items()}
    return {
        "shape": shape,
        "context": context,
        "threads": threads,
        "tokens_per_round": tokens,
        "times": {name: t.summary() for name, t in times.items()},
        "ms_per_token": {name: 1e3 * seconds for name, seconds in per_token.items()},
        "ms_text": {name: t.text(per=tokens / 1e3) for name, t in times.items()},
        "best_of_theirs": best,
        "ratios": {name: ratios(times[best], times[name]) for name in OURS},
        "bytes_per_token": {"weights": weights, "cache": cache},
        "read_bytes_per_second": read,
        "share_of_read_rate": {n: (weights + cache) / per_token[n] / read for n in OURS},
    }


def _lines(result: dict[str, Any]) -> str:
    ours = ", ".join(f"{name} {spread(result['ratios'][name])}" for name in OURS)
    return (
        f"{result['shape']} context {result['context']} threads {result['threads']}: "
        f"{ours} times as fast as {result['best_of_theirs']}"
    )


def report(results: list[dict[str, Any]]) -> str:
    names = (*OURS, *BACK_ENDS)
    headers = ["shape", "threads", "context", *(f"{name} ms" for name in names), "MB/token"]
    for name in OURS:
        headers += [f"{name}: times as fast", "of read rate"]
    rows = []
    for r in results:
        row = [r["shape"], str(r["threads"]), str(r["context"]), *(r["ms_text"][n] for n in names)]
        row.append(f"{sum(r['bytes_per_token'].values()) / 1e6:.1f}")
        for name in OURS:
            row += [spread(r["ratios"][name]), f"{r['share_of_read_rate'][name]:.0%}"]
        rows.append(row)
    return table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="nano,mini")
    parser.add_argument("--contexts", default="128,2048,8192")
    parser.add_argument("--threads", default="1", help="numbers of threads, by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="decoded per contender and round")
    parser.add_argument("--quick", action="store_true", help="two rounds of two tokens")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 2, 2
    facts = environment()
    print(describe(facts), flush=True)
    results = [
        result
        for threads in options.threads.split(",")
        for shape in options.shapes.split(",")
        for result in compare(shape, int(threads), options)
    ]
    print(report(results))
    print(f"read rate: {max(r['read_bytes_per_second'] for r in results) / 1e9:.1f} GB/s")
    write_json(options.json, {"environment": facts, "results": results})


if __name__ == "__main__":
    main()
