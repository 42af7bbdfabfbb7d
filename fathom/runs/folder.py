"""The run folder (DESIGN §2): one place that tells everything about a run, and that a run goes on from.

Logs are lines of JSON, each a step's. A run that resumes at step N first drops the lines behind N and a last line cut
short, so that every step stands there once, however often the run was killed.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from fathom.errors import FathomError, RecipeError
from fathom.runs.recipe import Recipe, recipe_from_dict
from fathom.runs.tables import differences

LOGS = ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "load.jsonl")


class RunFolder:
    """Paths and logs of one run. Opening checks that the folder is this recipe's, or new."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.toml"
        self.checkpoints = self.path / "checkpoints"
        self.data = self.path / "data"
        self.model = self.path / "model"
        self._open: dict[str, Any] = {}

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's. Raises `RecipeError` with the differences if it is another's."""
        if self.recipe_file.exists():
            self._check_same(recipe)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FathomError(
                f"{self.path} exists and is not a run folder; choose another with --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("recipe.toml", recipe.to_toml())

    def _check_same(self, recipe: Recipe) -> None:
        old = self.read_recipe()
        found = differences(old.to_dict(), recipe.to_dict())
        if found:
            raise RecipeError(
                f"{self.path} holds another run ({'; '.join(found)}); choose another folder with "
                f"--out, or give the command it was made with"
            )

    def read_recipe(self) -> Recipe:
        """The recipe that the folder was made with."""
        try:
            return recipe_from_dict(tomllib.loads(self.recipe_file.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(
                f"{self.recipe_file} cannot be read ({error}); choose another folder with --out"
            ) from error

    def write(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        unfinished = self.path / f".{name}.writing"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps beyond `step` and torn last lines."""
        for name in LOGS:
            if (self.path / name).exists():
                kept = [line for line in self._lines(name) if json.loads(line)["step"] <= step]
                self.write(name, "".join(line + "\n" for line in kept))

    def _lines(self, name: str) -> list[str]:
        lines = (self.path / name).read_text(encoding="utf-8", errors="replace").split("\n")
        return [line for line in lines if _is_whole(line)]

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Add one line to a log, written out at once."""
        if log not in self._open:
            self._open[log] = (self.path / log).open("a", encoding="utf-8")
        try:
            self._open[log].write(json.dumps(line, ensure_ascii=False) + "\n")
            self._open[log].flush()
        except OSError as error:
            raise FathomError(
                f"{self.path / log} could not be written: {error.strerror}; nothing is lost but "
                f"steps since the last checkpoint. Make room and give the same command again"
            ) from error

    def close(self) -> None:
        """Close the logs."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _is_whole(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError):
        return False
