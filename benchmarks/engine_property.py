"""The engine's greedy answers against `transformers` generate, under random traffic, on random tiny models.

Each round makes a model (the shapes of V3 and V2, with and without YaRN, with and without a query latent, with up to
three MTP modules), an engine with random sizes of cache, blocks, passes and drafts, and requests that arrive while
others run, share beginnings, push each other out of the cache and are sometimes broken off. `transformers` answers
the same prompts first. Answers must be equal wherever the gap between the reference's two best logits was above 1e-4;
after every pass the account of blocks must be right. `python benchmarks/engine_property.py --help`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import describe, environment, table, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))

import fathom
from fathom.inference import Engine, Sampling
from tests.inference.engines import with_blocks
from tests.inference.traffic import Expected, Traffic
from tests.model.tiny import random_fields, scramble, tiny_config, v2_twin, v3_twin

VOCABULARY, LONGEST_ANSWER, END = 101, 24, 1


@dataclass(frozen=True)
class Question:
    """A prompt, how many tokens it may be answered with, and what must come."""

    prompt: list[int]
    most: int
    expected: Expected


def models(rng: random.Random) -> tuple[str, torch.nn.Module, fathom.Transformer]:
    """A shape's name, the twin in `transformers`, and ours with its weights and MTP modules of its own."""
    fields = random_fields(rng)
    v2 = rng.random() < 0.4
    if v2:
        method = rng.choice(("greedy", "group_limited_greedy"))
        fields |= {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False}
    twin = (v2_twin if v2 else v3_twin)(fields)
    depth = rng.choice((0, 1, 2, 3))
    ours = fathom.Transformer(tiny_config(**fields | {"num_nextn_predict_layers": depth})).eval()
    scramble(ours)
    left = ours.load_state_dict(twin.state_dict(), strict=False)
    if left.unexpected_keys or any("mtp" not in name for name in left.missing_keys):
        raise SystemExit(f"the weights do not fit: {left}")
    parts = ["V2" if v2 else "V3"]
    parts += ["YaRN"] if fields["rope_scaling"] else []
    parts += ["no query latent"] if fields["q_lora_rank"] is None else []
    return ", ".join(parts), twin, ours


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Some begin alike, some are alike behind another beginning; all are short or all may be long."""
    longest = rng.choice((8, 8, 30, 100))
    shared = [rng.randrange(2, VOCABULARY) for _ in range(longest - 5)]
    found = []
    for _ in range(count):
        begin = rng.choice((0, rng.randint(0, len(shared)), len(shared)))
        own = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest - begin))]
        front = [rng.randrange(2, VOCABULARY) for _ in range(rng.choice((0, 0, 0, 4)))]
        found.append((front + shared[:begin] + own)[:longest])
    return found


@torch.no_grad()
def questions(twin: Any, rng: random.Random, count: int) -> list[Question]:
    """What `transformers` answers, all prompts at once behind padding on the left."""
    asked = prompts(rng, count)
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    found = twin.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits, dim=1).topk(2).values
    gaps = (best[..., 0] - best[..., 1]).tolist()
    answers = found.sequences[:, width:].tolist()
    return [_question(rng, *each) for each in zip(asked, answers, gaps, strict=True)]


def _question(
    rng: random.Random, prompt: list[int], answer: list[int], gaps: list[float]
) -> Question:
    most = rng.randint(1, LONGEST_ANSWER)
    answer = answer[:most]
    if END in answer:
        answer = answer[: answer.index(END) + 1]
    return Question(prompt, most, Expected(answer, gaps))


def random_engine(model: fathom.Transformer, longest: int, rng: random.Random) -> Engine:
    """Room for at least one of the longest texts, often for little more, so that requests push each other out."""
    depth = model.config.num_nextn_predict_layers
    engine = Engine(
        model,
        max_memory="1GiB",
        always_speculate=True,
        block_size=rng.choice((1, 2, 4, 7, 16, 32)),
        batch_tokens=rng.choice((1, 5, 24, 64, 500)),
        max_requests=rng.choice((1, 3, 8, 20)),
        speculate=rng.choice((0, depth, rng.randint(1, 5))) if depth else 0,
        prefix_cache=rng.random() < 0.7,
    )
    room = longest + rng.choice((0, 0, 5, 20, 60, 2000))
    return with_blocks(engine, min(-(-room // engine.pool.size), engine.pool.count))


def serve(traffic: Traffic, asked: Sequence[Question], rng: random.Random, aborts: float) -> None:
    """Let the questions arrive one by one while passes go on; some are pushed out or taken back."""
    for question in asked:
        wish = Sampling(0.0, max_new_tokens=question.most)
        traffic.come(question.prompt, wish, question.expected)
        for _ in range(rng.choice((0, 0, 0, 1, 3, 10))):
            traffic.step()
        if rng.random() < 0.1:
            traffic.push_out()
        running = traffic.running()
        if running and rng.random() < aborts:
            traffic.abort(rng.choice(running))
    traffic.finish()


def one_round(seed: int, count: int, aborts: float) -> tuple[str, Counter[str], Counter[str]]:
    """A model's shape, the verdicts on its answers, and what happened."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, twin, ours = models(rng)
    asked = questions(twin, rng, count)
    longest = max(len(question.prompt) + question.most for question in asked)
    traffic = Traffic(random_engine(ours, longest, rng), rng)
    serve(traffic, asked, rng, aborts)
    verdicts = traffic.verdicts()
    if verdicts["different"]:
        print(
            f"seed {seed} ({name}): {verdicts['different']} of {count} answers differ", flush=True
        )
    return name, verdicts, traffic.usage()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--per-model", type=int, default=20, help="requests to each model")
    parser.add_argument("--aborts", type=float, default=0.1, help="how often one is broken off")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first model; the next has the next"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    facts = environment() | {"threads": options.threads}
    print(describe(facts) + f"; {options.threads} thread(s)", flush=True)
    shapes: dict[str, Counter[str]] = {}
    usage: Counter[str] = Counter()
    rounds, started = -(-options.requests // options.per_model), time.perf_counter()
    for seed in range(options.seed, options.seed + rounds):
        try:
            name, verdicts, used = one_round(seed, options.per_model, options.aborts)
        except Exception:
            print(f"seed {seed}:", flush=True)
            raise
        shapes.setdefault(name, Counter()).update(verdicts | Counter(models=1))
        usage.update(used)
    report(shapes, usage, time.perf_counter() - started)
    asked = {name: str(value) for name, value in vars(options).items()}
    write_json(
        options.json, {"environment": facts, "options": asked, "shapes": shapes, "usage": usage}
    )
    if sum(counts["different"] for counts in shapes.values()):
        raise SystemExit("answers differ")


def report(shapes: dict[str, Counter[str]], usage: Counter[str], seconds: float) -> None:
    """Counts by shape, and what happened on the way."""
    shapes = dict(sorted(shapes.items()))
    total = sum(shapes.values(), Counter())
    rows = []
    for name, counts in (*shapes.items(), ("all", total)):
        kinds = [counts[kind] for kind in ("equal", "close", "different")]
        rows.append([name, *map(str, (counts["models"], sum(kinds), *kinds))])
    print(table(("shape", "models", "requests", "equal", "close calls", "different"), rows))
    print(", ".join(f"{count:,} {what}" for what, count in usage.items()) + f"; {seconds:.0f} s")


if __name__ == "__main__":
    main()
