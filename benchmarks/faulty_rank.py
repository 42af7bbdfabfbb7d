"""`fathom` on one rank of several, with a fault in it: what `faults.py` has torchrun start in place of `-m fathom`.

The environment says which (`FAULT`, JSON: kind, rank, step, and what the kind needs). A fault strikes in the first
attempt only, on its rank, and is real: the process is killed or stopped by a signal at an instant that does not know
what the process is doing, or in the middle of a save at one of its file operations; the disk is full because something
else has filled it; a gradient or the loss is not a number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from fathom.cli import main
from fathom.train import loop

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
BALLAST = "ballast"
"""File that fills the disk."""


def before_step(step: int, strike: Any) -> None:
    """Call `strike` when the step begins."""
    real = loop.train_step

    def watched(trainer: Any, plan: Any, reader: Any, at: int) -> Any:
        if at == step:
            strike()
        return real(trainer, plan, reader, at)

    loop.train_step = watched


def die(fault: dict[str, Any]) -> None:
    """A signal to this process, `after` seconds into the step, or at a file operation of the save that follows it."""
    number = signal.Signals[fault["signal"]]

    def now() -> None:
        os.kill(os.getpid(), number)

    if "after" in fault:
        before_step(fault["step"], lambda: threading.Timer(fault["after"], now).start())
        return
    saving, seen = threading.Event(), [0]
    before_step(fault["step"], saving.set)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if saving.is_set() and event in FILE_OPERATIONS and "/checkpoints" in str(arguments[0]):
            seen[0] += 1
            if seen[0] == fault["operation"]:
                now()

    sys.addaudithook(watch)


def fill_disk(fault: dict[str, Any]) -> None:
    """Leave only `free` bytes of the disk that the run's folder is on, from the beginning of a step."""
    ballast = Path(fault["disk"]) / BALLAST

    def fill() -> None:
        there = os.statvfs(fault["disk"])
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - fault["free"])

    before_step(fault["step"], fill)


def spoil(fault: dict[str, Any]) -> None:
    """Something of this rank's backward pass, or of what it found, is not a number in one step."""
    real, at = loop.accumulate_gradients, [0]
    before_step(fault["step"], lambda: at.__setitem__(0, 1))

    def spoilt(model: Any, *others: Any) -> Any:
        found = real(model, *others)
        if at[0]:
            at[0] = 0
            if fault["of"] == "loss":
                found.main.fill_(torch.nan)
            else:
                parts = [p.grad for p in model.parameters() if p.grad is not None]
                parts[fault["parameter"] % len(parts)].view(-1)[0] = torch.nan
        return found

    loop.accumulate_gradients = spoilt


KINDS = {"signal": die, "disk": fill_disk, "nan": spoil}

if __name__ == "__main__":
    asked = json.loads(os.environ["FAULT"])
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if asked and int(os.environ["RANK"]) == asked["rank"] and first_attempt:
        KINDS[asked["kind"]](asked)
    if asked.get("disk") and not first_attempt:
        (Path(asked["disk"]) / BALLAST).unlink(missing_ok=True)  # somebody has made room
    main()
