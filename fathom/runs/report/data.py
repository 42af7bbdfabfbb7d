"""What a run folder holds, read for its report; every file may be missing and the last line of a log unfinished."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import FathomError

Line = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """The files of a run folder, parsed."""

    name: str
    metrics: list[Line]
    """One per step."""
    evals: list[Line]
    """One per held-out evaluation."""
    loads: list[Line]
    """Now and then: `load` [blocks][experts], tokens sent, and `bias`, each block's [smallest, largest] router bias."""
    samples: list[Line]
    """Texts the model wrote while training."""
    spikes: list[Line]
    """Steps that the guard skipped, rolled back or remarked on, with the data they saw."""
    positions: list[Line]
    """Held-out loss by position before and after each stage."""
    needles: list[Line]
    """Needle-in-a-haystack grids."""
    recipe: str
    """The resolved recipe, TOML text."""
    environment: Line
    manifest: Line
    """How the data was prepared."""

    @classmethod
    def read(cls, folder: str | Path) -> RunData:
        """Read a run folder. Raises `FathomError` when it is not one."""
        folder = Path(folder)
        if not (folder / "metrics.jsonl").exists() and not (folder / "recipe.toml").exists():
            raise FathomError(
                f"{folder} is not a run folder (no metrics.jsonl, no recipe.toml); "
                f"give the folder that `fathom run` wrote, for example runs/nano"
            )
        return cls(
            name=folder.resolve().name,
            metrics=read_lines(folder / "metrics.jsonl"),
            evals=read_lines(folder / "evals.jsonl"),
            loads=read_lines(folder / "load.jsonl"),
            samples=read_lines(folder / "samples.jsonl"),
            spikes=read_lines(folder / "spikes.jsonl"),
            positions=read_lines(folder / "positions.jsonl"),
            needles=read_lines(folder / "needle.jsonl"),
            recipe=_text(folder / "recipe.toml"),
            environment=_object(folder / "environment.json"),
            manifest=_object(folder / "data" / "manifest.json"),
        )

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it was recorded as a finite number."""
        return series(self.metrics, key)

    def evals_by_coverage(self) -> tuple[list[Line], list[Line]]:
        """Evaluations on the first part of the held-out text, and on all of it (as the last of a stage).

        They are different texts, so their losses do not make one curve.
        """
        # The text's first token is no target, so an evaluation of the whole counts one less.
        whole = self.manifest.get("tokens", {}).get("held_out", 1) - 1
        part = [line for line in self.evals if line.get("held_out_tokens", whole) < whole]
        return part, [line for line in self.evals if line not in part]

    def bias_range(self) -> tuple[list[int], list[float], list[float]]:
        """(steps, smallest, largest) router bias over all blocks."""
        found = [(line["step"], line["bias"]) for line in self.loads if line.get("bias")]
        lows = [min(low for low, _ in ranges) for _, ranges in found]
        highs = [max(high for _, high in ranges) for _, ranges in found]
        return [step for step, _ in found], lows, highs

    def stages(self) -> list[tuple[int, str]]:
        """(first step, name) of every stage that has begun."""
        found: list[tuple[int, str]] = []
        for line in self.metrics:
            if not found or found[-1][1] != line.get("stage", ""):
                found.append((line["step"], line.get("stage", "")))
        return found


def series(lines: list[Line], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines in which `key` is a finite number."""
    points = [(line["step"], line[key]) for line in lines if _finite(line.get(key))]
    return [step for step, _ in points], [float(value) for _, value in points]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_lines(path: Path) -> list[Line]:
    """Objects of a .jsonl file; a last line cut short by a crash is left out, a broken one before it is an error."""
    lines = _text(path).removesuffix("\n").split("\n")  # splitlines would cut at more than that
    found: list[Line] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise FathomError(
                    f"{path}:{number} is not JSON; repair or remove that line"
                ) from None
    return found


def _object(path: Path) -> Line:
    try:
        return json.loads(_text(path) or "{}")
    except ValueError as error:
        raise FathomError(f"{path} is not JSON ({error}); repair or remove it") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def even(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows made equally long with NaN, for the blocks that take no part in a stage (MTP's at weight 0)."""
    longest = max(rows, key=len)

    def blank(like: Any) -> Any:
        return [math.nan] * len(like) if isinstance(like, list) else math.nan

    return [[*row, *map(blank, longest[len(row) :])] for row in rows]


def final_mean(values: list[float], count: int = 100) -> float:
    """Mean of the last `count` values (fewer when there are fewer), which is steadier than the last one."""
    last = values[-count:]
    return sum(last) / len(last)
