"""A whole training step of ours against `transformers`, in each of its experts and attention back
ends.

Pairs of workers run in turn: ours and one back end, several rounds; the loss of the first batch
must agree. Tokens per second, peak memory, the share of the machine's float32 matrix rate that was
reached (model FLOPs, nothing counted that is computed twice), and where our step's time goes.
`python benchmarks/train_vs_transformers.py --help`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders import FathomTraining, TransformersTraining
from harness import (
    Contender,
    Times,
    WorkerDiedError,
    alternate,
    available_memory,
    describe,
    environment,
    ratios,
    spread,
    table,
    write_json,
)
from roofs import Machine
from shapes import CASES, Case, fathom_config

from fathom.planning.flops import flops_per_token

BACK_ENDS = [
    ("grouped_mm", "sdpa"),
    ("grouped_mm", "eager"),
    ("eager", "sdpa"),
    ("batched_mm", "sdpa"),
]
AGREEMENT = 1e-4
OURS = "fathom"


def compare(case: Case, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """All back ends of one case at one number of threads."""
    print(f"\n{case.name}, {threads} thread(s)", flush=True)
    arguments = {"fields": case.fields, "batch": case.batch, "seq_len": case.seq_len}
    ours = {**arguments, "compiled": options.compile}
    with (
        Contender("machine", Machine, {}, threads) as machine,
        Contender(OURS, FathomTraining, ours, threads) as fathom,
    ):
        rows = [
            _pair(case, fathom, machine, back_end, helped, options)
            for back_end, helped in _opponents(options)
        ]
        shares = fathom.call("profile")
    result = {"case": case.name, "threads": threads, "pairs": rows, "profile": shares}
    _print(result)
    return result


def _opponents(options: argparse.Namespace) -> list[tuple[tuple[str, str], bool]]:
    plain = [(b, False) for b in BACK_ENDS if "+".join(b) in options.back_ends.split(",")]
    return [*plain, (BACK_ENDS[0], True)] if options.helped else plain


def _pair(
    case: Case,
    fathom: Contender,
    machine: Contender,
    back_end: tuple[str, str],
    helped: bool,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Ours and one back end in turn."""
    experts, attention = back_end
    name = f"{experts} + {attention}" + (" helped" if helped else "")
    needed = _memory_needed(case, experts, attention)
    if needed > 0.6 * available_memory():
        return {"name": name, "left_out": f"needs about {needed / 2**30:.0f} GiB"}
    arguments = {
        "fields": case.fields,
        "batch": case.batch,
        "seq_len": case.seq_len,
        "experts": experts,
        "attention": attention,
        "helped": helped,
    }
    try:
        with Contender(name, TransformersTraining, arguments, fathom.threads) as theirs:
            losses = _same_start(fathom, theirs)
            rates = [machine.call("matmul")]
            first = {}
            for contender in (fathom, theirs):  # the optimiser's moments exist from here on
                _, first[contender.name], _ = contender.timed("step")
                contender.reset_peak()
            rounds = options.rounds if first[name] < options.patience else 2
            times = alternate((fathom, theirs), "step", rounds, say=options.say)
            rates.append(machine.call("matmul"))
            return _figures(case, fathom, theirs, times, rates, losses)
    except WorkerDiedError as problem:
        return {"name": name, "left_out": str(problem)}


def _memory_needed(case: Case, experts: str, attention: str) -> float:
    """A rough number of bytes of the back ends that do not fit everywhere."""
    f, tokens = case.fields, case.batch * case.seq_len
    if experts == "batched_mm":  # a copy of each expert per token, and its gradient
        per_expert = 3 * f["hidden_size"] * f["moe_intermediate_size"]
        return 2 * 4 * tokens * f["num_experts_per_tok"] * per_expert * f["num_hidden_layers"]
    if attention == "eager":  # scores and probabilities of each layer
        scores = case.batch * f["num_attention_heads"] * case.seq_len**2
        return 3 * 4 * scores * f["num_hidden_layers"]
    return 0.0


def _same_start(fathom: Contender, theirs: Contender) -> tuple[float, float]:
    """Give both the same weights and check that they find the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.pt")
        theirs.call("save", path)
        fathom.call("load", path)
        losses = (fathom.call("loss"), theirs.call("loss"))
    if abs(losses[0] - losses[1]) > AGREEMENT * losses[1]:
        raise SystemExit(f"{theirs.name}: loss {losses[1]} but ours is {losses[0]}; no comparison")
    return losses


def _figures(
    case: Case,
    fathom: Contender,
    theirs: Contender,
    times: dict[str, Times],
    rates: list[dict[str, float]],
    losses: tuple[float, float],
) -> dict[str, Any]:
    tokens = case.batch * case.seq_len
    flops = flops_per_token(fathom_config(case.fields), case.seq_len, mtp=False) * tokens
    roof = max(max(rate.values()) for rate in rates)
    sides = {}
    for contender in (fathom, theirs):
        t = times[contender.name]
        sides["ours" if contender is fathom else "theirs"] = {
            **t.summary(),
            "tokens_per_second": tokens / t.median,
            "peak_bytes": contender.peak(),
            "imports_bytes": contender.resident_before,
            "share_of_roof": flops / t.median / roof,
        }
    return {
        "name": theirs.name,
        **sides,
        "ratios": ratios(times[theirs.name], times[fathom.name]),
        "losses": losses,
        "matmul_flops": rates,
        "roof": roof,
    }


def _print(result: dict[str, Any]) -> None:
    headers = [
        "transformers back end",
        "s/step theirs",
        "s/step ours",
        "tok/s",
        "ratio",
        "peak GiB",
        "memory",
        "of roof",
    ]
    print(table(headers, [_row(pair) for pair in result["pairs"]]))
    measured = [p for p in result["pairs"] if "ratios" in p]
    if measured:
        pair = measured[0]
        rates = {k: max(r[k] for r in pair["matmul_flops"]) for k in pair["matmul_flops"][0]}
        text = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        print(f"float32 products of 1024^3: {text}; the roof is the better of them")
    shown = list(result["profile"].items())[:12]
    print("our step: " + ", ".join(f"{name} {share:.1%}" for name, share in shown), flush=True)


def _row(pair: dict[str, Any]) -> list[str]:
    if "left_out" in pair:
        return [pair["name"], pair["left_out"], "", "", "", "", "", ""]
    ours, theirs = pair["ours"], pair["theirs"]
    gib = [side["peak_bytes"] / 2**30 for side in (theirs, ours)]
    return [
        pair["name"],
        spread(theirs["wall_s"]),
        spread(ours["wall_s"]),
        f"{theirs['tokens_per_second']:.0f} → {ours['tokens_per_second']:.0f}",
        spread(pair["ratios"]),
        f"{gib[0]:.2f} → {gib[1]:.2f}",
        f"{gib[1] / gib[0]:.2f}",
        f"{theirs['share_of_roof']:.0%} → {ours['share_of_roof']:.0%}",
    ]


def best_back_end(pairs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of theirs as users have it (without our process settings)."""
    plain = [p for p in pairs if "ratios" in p and not p["name"].endswith("helped")]
    return min(plain, key=lambda p: p["theirs"]["median_s"], default=None)


def summary(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        best = best_back_end(result["pairs"])
        if best is None:
            continue
        memory = best["ours"]["peak_bytes"] / best["theirs"]["peak_bytes"]
        other = 1 - sum(result["profile"].get(k, 0) for k in ("matrix products", "attention"))
        rows.append(
            [
                result["case"],
                str(result["threads"]),
                best["name"],
                spread(best["ratios"]),
                f"{memory:.2f}",
                f"{best['ours']['share_of_roof']:.0%}",
                f"{other:.0%}",
            ]
        )
    headers = ["case", "threads", "their best", "times as fast", "memory", "of roof", "other work"]
    return table(headers, rows)


def main() -> None:
    options = _options()
    facts = environment()
    print(describe(facts), flush=True)
    chosen = [case for name in options.cases.split(",") for case in CASES[name]]
    if options.quick:
        chosen = [replace(case, batch=1) for case in chosen]
    results = [
        compare(case, int(threads), options)
        for threads in options.threads.split(",")
        for case in chosen
    ]
    print("\nAgainst the best back end of each case\n" + summary(results))
    write_json(options.json, {"environment": facts, "results": results})
    everything = [r for result in results for p in result["pairs"] for r in p.get("ratios", [])]
    print(f"median of all ratios: {statistics.median(everything):.2f}" if everything else "")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--cases", default="nano,mini,nano-2048,nano-4096,experts")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by commas")
    parser.add_argument("--back-ends", default=",".join("+".join(b) for b in BACK_ENDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--patience", type=float, default=30, help="a slower first step than this: two rounds only"
    )
    parser.add_argument("--quick", action="store_true", help="batches of one, two rounds")
    parser.add_argument(
        "--compile", action="store_true", help="ours with compiled elementwise functions"
    )
    parser.add_argument(
        "--helped", action="store_true", help="also give theirs our process settings"
    )
    parser.add_argument("--verbose", action="store_true", help="print every round")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    options.say = print if options.verbose else None
    return options


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
