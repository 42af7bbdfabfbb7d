"""The run folder: one place that tells everything about a run, and that a run goes on from.

Logs are lines of JSON, each a step's. A run that resumes at step N first drops the lines behind N and a last line cut
short, so that every step stands there once, however often the run was killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from fathom.errors import FathomError, RecipeError
from fathom.files import UNFINISHED, lock, write_whole
from fathom.runs.recipe import Recipe, recipe_from_dict
from fathom.runs.tables import differences

LOCK = ".lock"
SPIKES = "spikes.jsonl"
MAY_CHANGE = ("checkpoint.", "monitor.", "parallel.")
"""Tables of a recipe that a run may go on with other values of."""
LOGS = (
    "metrics.jsonl",
    "evals.jsonl",
    "samples.jsonl",
    "load.jsonl",
    "positions.jsonl",
    "needle.jsonl",
)


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
        begun = self.recipe_file.exists() and self._has_begun()
        if begun:
            self._check_same(recipe)
        elif not self.recipe_file.exists() and self._is_other_work():
            raise FathomError(
                f"{self.path} exists and is not a run folder; choose another with --out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise self._failed(self.path, error) from error
        if not begun:
            self._forget_other_data(recipe)
        if not begun or (self.read_recipe() != recipe and self._is_our_own_recipe()):
            self.write("recipe.toml", recipe.to_toml())

    def _has_begun(self) -> bool:
        """Whether there is anything that another recipe would spoil; a mistyped --data leaves nothing.

        A recipe.toml without our lock file beside it is the user's own.
        """
        ours = (self.path / LOCK).exists()
        return not ours or any((self.path / n).exists() for n in ("checkpoints", *LOGS))

    def _forget_other_data(self, recipe: Recipe) -> None:
        """Clear what was prepared for a recipe that could not begin with it."""
        if not (self.recipe_file.exists() and self.data.exists()):
            return
        old = self.read_recipe()
        if (old.data, old.seed, old.model.vocab_size) != (
            recipe.data,
            recipe.seed,
            recipe.model.vocab_size,
        ):
            shutil.rmtree(self.data)

    def _is_other_work(self) -> bool:
        if not self.path.exists():
            return False
        # All that a run which was killed in its first moment leaves:
        ours = {LOCK, f".recipe.toml{UNFINISHED}"}
        return not self.path.is_dir() or any(p.name not in ours for p in self.path.iterdir())

    def _lock(self) -> None:
        """Keep other processes out until this one ends, however it ends."""
        try:
            self._open[LOCK] = lock(self.path / LOCK)
        except BlockingIOError:
            raise FathomError(
                f"{self.path} is in use by another process; wait for its end, stop it, or choose "
                f"another folder with --out"
            ) from None

    def _check_same(self, recipe: Recipe) -> None:
        """Nothing may have changed but what decides no number: how often is saved, and what is looked at."""
        old = self.read_recipe()
        found = [
            difference
            for difference in differences(old.to_dict(), recipe.to_dict())
            if not difference.startswith(MAY_CHANGE)
        ]
        if found:
            raise RecipeError(
                f"{self.path} holds another run ({'; '.join(found)}); choose another folder with "
                f"--out, or give the command it was made with"
            )

    def _is_our_own_recipe(self) -> bool:
        """Whether recipe.toml is as we write it, and not a person's with remarks in it."""
        return self.recipe_file.read_text(encoding="utf-8") == self.read_recipe().to_toml()

    def read_recipe(self) -> Recipe:
        """The recipe that the folder was made with."""
        try:
            return recipe_from_dict(tomllib.loads(self.recipe_file.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{self.recipe_file} cannot be read ({error}); choose another folder with --out"
            ) from error

    def write(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        try:
            write_whole(self.path / name, text.encode())
        except OSError as error:
            raise self._failed(self.path / name, error) from error

    def forget_after(self, step: int, spikes: int = 0) -> None:
        """Drop log lines of steps beyond `step`, all but the first `spikes` of spikes.jsonl, and torn last lines.

        That log counts its lines, because a roll-back stands there though the step that it happened at is undone.
        """
        for name in LOGS:
            lines = [line for line in self._lines(name) if json.loads(line)["step"] <= step]
            self._rewrite(name, lines)
        self._rewrite(SPIKES, self._lines(SPIKES)[:spikes])

    def _rewrite(self, name: str, lines: list[str]) -> None:
        if (self.path / name).exists():
            self._close(name)
            self.write(name, "".join(line + "\n" for line in lines))

    def _lines(self, name: str) -> list[str]:
        if not (self.path / name).exists():
            return []
        lines = (self.path / name).read_text(encoding="utf-8", errors="replace").split("\n")
        return [line for line in lines if _is_whole(line)]

    def line_with(self, log: str, values: dict[str, Any]) -> dict[str, Any] | None:
        """The first line of a log that has these values, among others; None where there is none."""
        lines = (json.loads(line) for line in self._lines(log))
        return next((line for line in lines if values.items() <= line.items()), None)

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Add one line to a log, written out at once; null for numbers that are not finite, which JSON cannot say."""
        try:
            if log not in self._open:
                self._open[log] = (self.path / log).open("a", encoding="utf-8")
            self._open[log].write(json.dumps(_sayable(line), ensure_ascii=False) + "\n")
            self._open[log].flush()
        except OSError as error:
            raise self._failed(self.path / log, error) from error

    def close(self) -> None:
        """Close the logs and let other processes in."""
        for name in list(self._open):
            self._close(name)

    def _close(self, name: str) -> None:
        if name in self._open:
            with suppress(OSError):  # of a full disk, which has been told when it was met
                self._open.pop(name).close()

    def sync(self) -> None:
        """Have the logs on the disk, so that even after a power cut none lacks a step that a checkpoint has."""
        for file in self._open.values():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise self._failed(Path(file.name), error) from error

    def read_environment(self) -> dict[str, Any]:
        """environment.json, or nothing."""
        try:
            return json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    @staticmethod
    def _failed(path: Path, error: OSError) -> FathomError:
        return FathomError(
            f"{path} could not be written: {error.strerror or error}; at most the steps since the last "
            f"checkpoint are lost. Make room, or choose another folder with --out, and give the command again"
        )


class SilentFolder(RunFolder):
    """The run folder for the ranks that only read in it: what another rank writes is not written twice."""

    def claim(self, recipe: Recipe) -> None:
        """The first rank has it."""

    def write(self, name: str, text: str) -> None:
        """Left to the first rank, like all below."""

    def append(self, log: str, line: dict[str, Any]) -> None:
        """Left to the first rank."""

    def forget_after(self, step: int, spikes: int = 0) -> None:
        """Left to the first rank."""


def _sayable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sayable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_sayable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_whole(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError):
        return False
