"""`fathom quickstart`, which is what `make quickstart` does once everything is installed."""

from __future__ import annotations

from pathlib import Path

RECIPE, FOLDER = "nano", Path("runs/nano")


def quickstart() -> None:
    """Train the recipe nano on real text into runs/nano, show what it learned, say what to type next.

    The text is the source code of this Python's standard library, so nothing is downloaded. About ten minutes on two
    CPU cores; stopped, it goes on when the command is given again.
    """
    from fathom.cli.console import RunConsole
    from fathom.cli.options import choose_device
    from fathom.runs.execute import run
    from fathom.runs.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    print(
        f"Training the recipe {RECIPE}: {recipe.steps} steps on this Python's own standard library, into {FOLDER}.\n"
        f"Ctrl-C saves and stops; the same command goes on from there.\n"
    )
    with RunConsole(recipe) as console:
        run(recipe, FOLDER, choose_device("auto"), console.show, console.say)
    print(next_steps())


def next_steps() -> str:
    """The last sample, the figures, and what can be typed now."""
    from fathom.runs.report.data import RunData
    from fathom.runs.report.page import headline

    data = RunData.read(FOLDER)
    lines = [""]
    if data.samples:
        written = data.samples[-1]["prompt"] + data.samples[-1]["text"]
        lines += ["What it writes now:", "", *(f"    {row}" for row in written.splitlines()), ""]
    lines += [f"{name:24} {value:>10}  {remark}" for name, value, remark in headline(data)]
    lines += [
        "",
        "Next:",
        f'  fathom generate {FOLDER} --prompt "def read_json(path):"',
        f"  fathom chat {FOLDER}",
        f"  fathom run {RECIPE} --set stages.pretrain.lr=1e-3 --out runs/other-rate",
    ]
    report = (FOLDER / "report.html").resolve()
    if report.exists():
        lines.append(f"  and open {report.as_uri()} in a browser")
    return "\n".join(lines)
