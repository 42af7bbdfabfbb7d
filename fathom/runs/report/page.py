"""The report's page: headline figures, figures with captions, samples, tables. All text from the run is escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path

from fathom import __version__
from fathom.planning.describe import duration, human
from fathom.runs.report import curves, load
from fathom.runs.report.data import RunData, final_mean, series
from fathom.runs.report.html import details, facts_table, framed
from fathom.runs.report.sections import SKIPPED, context, data_seen, schedules, spikes

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page may fetch nothing and run nothing, whatever stands in the model's samples."""

Card = tuple[str, str, str]


def document(run: RunData) -> str:
    """The whole document."""
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    body = "\n".join(
        (
            _header(run),
            _cards(run),
            _curves(run),
            spikes(run),
            schedules(run),
            data_seen(run),
            context(run),
            _load(run),
            _texts(run),
            _facts(run),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(run.name)} · fathom</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Written by fathom {escape(__version__)} from the files of the run folder <b>{escape(run.name)}</b>; make it
again with <code>fathom report</code>. This page loads nothing from elsewhere.</footer>
</main>
</body>
</html>
"""


def _header(run: RunData) -> str:
    if run.metrics:
        last = run.metrics[-1]
        stage = f", in stage {last['stage']}" if last.get("stage") else ""
        state = f"after step {last['step']:,}{stage}"
    else:
        state = "no step has been finished yet"
    return (
        f'<header><div class="eyebrow">fathom · training run</div>'
        f"<h1>{escape(run.name)}</h1><p>{escape(state)}</p></header>"
    )


def _cards(run: RunData) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in headline(run)
    )
    return f'<dl class="cards">{items}</dl>' if items else ""


def headline(run: RunData) -> list[Card]:
    """(what, value, remark) of what a reader wants to know first; only what was recorded."""
    held_out, per_byte = series(run.evals, "loss")[1], series(run.evals, "bits_per_byte")[1]
    cards: list[Card] = []
    if held_out:
        cards.append(("held-out loss", f"{held_out[-1]:.3f}", "nats per token, never trained on"))
    averaged = series(run.evals, "ema_loss")[1]
    if averaged:
        cards.append(
            (
                "held-out loss, averaged",
                f"{averaged[-1]:.3f}",
                "nats per token, of the average of the weights",
            )
        )
    if per_byte:
        cards.append(
            ("held-out bits per byte", f"{per_byte[-1]:.3f}", "comparable across tokenizers")
        )
    for key in ("loss", "max_load"):
        cards += _recent(run, key)
    cards += _amounts(run)
    skipped = [line for line in run.spikes if line.get("action") in SKIPPED]
    if skipped:
        cards.append(("steps not learnt from", f"{len(skipped):,}", "skipped or rolled back"))
    for key in ("tokens_per_second", "mfu"):
        cards += _recent(run, key)
    return cards


_RECENT = {
    "loss": ("training loss", "{:.3f}", "nats per token"),
    "max_load": ("worst expert load", "{:.2f}", "times the mean load"),
    "tokens_per_second": ("tokens per second", "{:,.0f}", "in training"),
    "mfu": ("MFU", "{:.1%}", "of the machine's matmul peak"),
}


def _recent(run: RunData, key: str) -> list[Card]:
    """A metric's mean over the last steps."""
    values = run.series(key)[1]
    if not values:
        return []
    name, form, remark = _RECENT[key]
    count = min(100, len(values))
    return [
        (name, form.format(final_mean(values, count)), f"{remark}, mean of the last {count} steps")
    ]


def _amounts(run: RunData) -> list[Card]:
    if not run.metrics:
        return []
    amounts = []
    if run.metrics[-1].get("tokens") is not None:
        tokens = run.metrics[-1]["tokens"]
        amounts.append(("tokens trained on", human(tokens), f"{tokens:,}"))
    seconds = sum(run.series("seconds")[1])
    return [*amounts, ("time in steps", duration(seconds), f"{len(run.metrics):,} steps")]


def _curves(run: RunData) -> str:
    if not run.metrics:
        return '<p class="note">There is nothing to draw before the first step.</p>'
    figures = [
        framed(
            curves.grad_norm(run),
            "Norm of the whole gradient before it is clipped, logarithmic axis. Single spikes are clipped away; a "
            "steady climb is a warning.",
        ),
    ]
    if run.series("tokens_per_second")[0]:
        figures.append(
            framed(
                curves.speed(run),
                "Time of the training steps alone. Longer sequences are slower; other dips mean that the machine did "
                "other work beside them.",
            )
        )
    loss = framed(curves.loss(run), _loss_caption(run), wide=True)
    return f'<h2>Learning</h2>{loss}<div class="row">{"".join(figures)}</div>'


def _loss_caption(run: RunData) -> str:
    """Says of each kind of mark what it is, and of those alone that are drawn."""
    part, whole = run.evals_by_coverage()
    caption = ["Pale: every step; strong: mean over the steps around it."]
    if run.evals:
        text = "one part of the text" if part else "the text"
        caption.append(
            f"Dots: loss on {text} that is never trained on; when they part upwards from the training curve, the "
            f"model is memorising."
        )
    if part and whole:
        caption.append("Diamonds: on all of that text, so they may lie elsewhere.")
    if series(run.evals, "ema_loss")[0]:
        caption.append("Hollow marks: on the same text, with the average of the weights.")
    if run.spikes:
        caption.append("Marks above: steps that the guard acted on or remarked on, listed below.")
    if run.series("mtp_loss")[0]:
        caption.append("MTP predicts one token further ahead (report §2.2).")
    return " ".join(caption)


def _load(run: RunData) -> str:
    parts = [_balance(run)] if run.series("max_load")[0] else []
    if any(line.get("expert_load") for line in run.metrics):
        parts.append(
            framed(
                load.block_heat_map(run),
                "The same for every MoE block (rows, the last being MTP's where there is one). Pale is balanced; a "
                "dark row is a block whose router has collapsed.",
                wide=True,
            )
        )
    if run.loads and run.loads[-1]["load"]:  # a dense model has no such block
        parts.append(framed(load.expert_heat_maps(run), _experts_caption(run), wide=True))
    if not parts:
        return ""
    return (
        "<h2>Load of the experts</h2><p>Biases on the router keep the experts equally busy (report §2.1.2): after "
        f"each step an expert that got too few tokens becomes a little easier to choose.</p>{''.join(parts)}"
    )


def _balance(run: RunData) -> str:
    """Balance violation, beside the range of the biases where the run recorded it."""
    both = bool(run.bias_range()[0])
    violation = framed(
        load.balance(run, wide=not both),
        "Balance violation: tokens of the busiest expert over the mean, in the worst block at each step. 1 is "
        "perfect; it should come down early and stay low without an auxiliary loss that pulls on the weights.",
    )
    if not both:
        return violation
    biases = framed(
        load.bias_range(run),
        "Smallest and largest router bias of all blocks. The range should level off.",
    )
    return f'<div class="row">{violation}{biases}</div>'


def _experts_caption(run: RunData) -> str:
    blocks = len(run.loads[-1]["load"])
    shown = len(load.chosen_blocks(blocks))
    some = "" if shown == blocks else f" {shown} of the {blocks} blocks are shown, evenly spread."
    return (
        "Each expert's share of its block's tokens: a row is an expert, a column a moment. Pale is the mean, red "
        "twice to four times it, blue half to a quarter. Colours should fade to pale; a row that stays blue is an "
        f"expert that is hardly used.{some}"
    )


def _texts(run: RunData) -> str:
    if not run.samples:
        return ""
    entries = [
        f"<details{'' if age else ' open'}><summary>step {line.get('step', 0):,}"
        f"</summary><pre><b>{escape(str(line.get('prompt', '')))}</b>"
        f"{escape(str(line.get('text', '')))}</pre></details>"
        for age, line in enumerate(reversed(run.samples))
    ]
    return (
        "<h2>Samples</h2><p>What the model wrote on its way, the last first. Coloured: the prompt it was given.</p>"
        + "".join(entries)
    )


def _facts(run: RunData) -> str:
    parts = []
    if run.manifest:
        parts.append(
            details("Data", "what was trained on, and its fingerprint", facts_table(run.manifest))
        )
    if run.recipe:
        recipe = f"<pre>{escape(run.recipe)}</pre>"
        parts.append(details("Recipe", "every setting, as resolved", recipe))
    if run.environment:
        parts.append(details("Environment", "where it ran", facts_table(run.environment)))
    return f"<h2>How it was made</h2>{''.join(parts)}" if parts else ""
