"""A guard against loss spikes. The report's abstract tells of a run without one, and names no method;
all of this is our choice.

A step is judged before it touches anything, by two numbers: the loss of its batch and the logarithm of its
gradient's norm. Each is compared with the last accepted steps by a robust z-score,

    z = (x - median) / max(1.4826 * MAD, floor),

where MAD is the median distance from the median; 1.4826 makes it the standard deviation of a normal distribution.
Mean and deviation would not do: one spike in the window widens them so far that the next one passes. The floor keeps
a window without noise from calling every ripple a spike. Only upward counts, since a step that is easier than the
others harms nothing.

The norm is taken as a logarithm because it varies by factors. A gradient spike that clipping has cut to `clip_norm`
has lost its force and is only recorded, unless [guard] says otherwise.

A window of the whole falling curve is wide, so the guard is dull while the loss falls fast, and sharp later. That is
wanted: in `nano`'s clean run the highest loss z is 1.5 and the highest gradient z 4.2. A stage begins with an empty
window, because another sequence length or mixture has another loss.

Nothing but the numbers decides, and the window is part of the checkpoint: a run
that was killed decides again as it did.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from fathom.errors import FathomError, RecipeError
from fathom.train.schedule import Moment

LOSS_FLOOR = 0.02
"""Smallest deviation of the loss that a z-score divides by, nats per token."""
NORM_FLOOR = 0.2
"""The same for the logarithm of the gradient norm; at z = 6 that is a factor of 3.3."""
TO_DEVIATION = 1.4826
ACTIONS = ("skip", "rollback", "record", "off")


@dataclass(frozen=True)
class GuardConfig:
    """Table [guard]: what is done about a step whose loss or gradient is out of line (our choice throughout)."""

    action: str = "skip"
    """"skip" the step; "rollback" to the last checkpoint and pass over the data since; only "record" it; "off".
    With the last two a step that is not finite ends the run."""
    threshold_z: float = 6.0
    """Robust z-score above which a step is a spike."""
    window: int = 128
    """How many of the last accepted steps a step is compared with."""
    warmup: int = 64
    """Accepted steps of a stage before z-scores decide; what is not finite is caught from the first."""
    clipped_gradients: str = "record"
    """What is done about a gradient spike that clipping has cut down: "record", or "act" as on any other."""
    max_skipped: int = 10
    """So many steps skipped in a row, and the next one ends the run."""
    max_rollbacks: int = 10
    """So many roll-backs to one checkpoint, and the next one ends the run."""

    def __post_init__(self) -> None:
        choices = {"action": ACTIONS, "clipped_gradients": ("record", "act")}
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                raise RecipeError(
                    f"guard.{key} = {value!r} must be one of {', '.join(allowed)}; choose one"
                )
        for key in ("window", "warmup", "max_skipped", "max_rollbacks"):
            if getattr(self, key) < 1:
                raise RecipeError(
                    f"guard.{key} = {getattr(self, key)} must be at least 1; raise it"
                )
        if not self.threshold_z > 0:
            raise RecipeError(f"guard.threshold_z = {self.threshold_z} must be positive; 6 is ours")
        if self.warmup > self.window:
            raise RecipeError(
                f"guard.warmup = {self.warmup} exceeds window = {self.window}; lower it or widen the window"
            )


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step, and why."""

    action: str = "accept"
    """"accept", "record" (accepted, but remarkable), "skip" or "rollback"."""
    reason: str | None = None
    """In words; None for an ordinary step."""
    loss_z: float | None = None
    grad_norm_z: float | None = None
    """None as long as the window is too short to tell, and for what is not finite."""

    @property
    def learns(self) -> bool:
        """Whether the step changes the weights."""
        return self.action in ("accept", "record")


@dataclass
class Tally:
    """What a roll-back does not undo."""

    spikes: int = 0
    """Lines of spikes.jsonl so far."""
    rolled_back_to: int = -1
    """Step of the checkpoint that was gone back to last."""
    rollbacks: int = 0
    """How often in a row it was that one."""


def robust_z(value: float, window: list[float], floor: float) -> float:
    """Distance of `value` from the window's median in robust deviations, at least `floor` each."""
    middle = statistics.median(window)
    spread = statistics.median(abs(other - middle) for other in window)
    return (value - middle) / max(TO_DEVIATION * spread, floor)


@dataclass
class Guard:
    """Judges steps one after the other; its state belongs to the checkpoint."""

    config: GuardConfig
    clip_norm: float
    """Norm above which the gradient was clipped."""
    place: list[Any] = field(default_factory=list)
    """Stage and sequence length of the window."""
    losses: list[float] = field(default_factory=list)
    log_norms: list[float] = field(default_factory=list)
    """Of the last accepted steps, at most `window`."""
    skipped_in_a_row: int = 0
    tally: Tally = field(default_factory=Tally)

    def judge(self, moment: Moment, loss: float, total: float, grad_norm: float) -> Verdict:
        """What becomes of a step whose next-token loss is `loss`, and `total` all that was differentiated.

        Raises `FathomError` when a step that is not finite may not be skipped, or too many were skipped already.
        """
        self._enter(moment)
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        scores = self._scores(loss, grad_norm) if finite else (None, None)
        reason, harmful = self._problem(loss, total, grad_norm, *scores)
        if not finite and self.config.action in ("record", "off"):
            raise FathomError(
                f"{reason} at step {moment.step}; the last checkpoint is unharmed. Lower the learning "
                f"rate (--set stages.NAME.lr=…) or set guard.action to skip, in a new run folder"
            )
        action = self.config.action if harmful else "record" if reason else "accept"
        self._count(action, reason, moment.step, loss, grad_norm)
        return Verdict(action, reason, *scores)

    def _enter(self, moment: Moment) -> None:
        place = [moment.stage, moment.seq_len]
        if place != self.place:
            self.place, self.losses, self.log_norms = place, [], []

    def _scores(self, loss: float, grad_norm: float) -> tuple[float | None, float | None]:
        """z of loss and gradient norm, once there is something to compare with."""
        if self.config.action == "off" or len(self.losses) < self.config.warmup:
            return None, None
        norm_z = robust_z(_log(grad_norm), self.log_norms, NORM_FLOOR)
        return robust_z(loss, self.losses, LOSS_FLOOR), norm_z

    def _problem(
        self, loss: float, total: float, norm: float, loss_z: float | None, norm_z: float | None
    ) -> tuple[str | None, bool]:
        """What is wrong with a step, in words, and whether it must not be learnt from."""
        threshold = self.config.threshold_z
        if not (math.isfinite(total) and math.isfinite(norm)):
            return f"loss {total:.4g} and gradient norm {norm:.4g} are not finite", True
        if loss_z is not None and loss_z > threshold:
            return (
                f"loss {loss:.3f} lies {loss_z:.1f} deviations above the last steps' median",
                True,
            )
        if norm_z is not None and norm_z > threshold:
            clipped = norm > self.clip_norm
            after = f", and was clipped to {self.clip_norm:g}" if clipped else ""
            reason = f"gradient norm {norm:.3g} lies {norm_z:.1f} deviations above the last steps' median"
            return reason + after, not clipped or self.config.clipped_gradients == "act"
        return None, False

    def _count(
        self, action: str, reason: str | None, step: int, loss: float, grad_norm: float
    ) -> None:
        """Take the step into the window or into the tally."""
        self.tally.spikes += reason is not None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if action == "skip" else 0
        if self.skipped_in_a_row > self.config.max_skipped:
            raise FathomError(
                f"step {step} would be number {self.skipped_in_a_row} skipped in a row (the last: {reason}); the run "
                f"does not recover by itself. Look at the data in spikes.jsonl, then lower the learning rate or set "
                f"guard.action = 'rollback', in a new run folder"
            )
        if action in ("accept", "record") and self.config.action != "off":
            last = self.config.window
            self.losses = [*self.losses, loss][-last:]
            self.log_norms = [*self.log_norms, _log(grad_norm)][-last:]

    def rolled_back(self, tally: Tally, step: int) -> None:
        """Go on from the checkpoint of `step` with the tally from before. Raises `FathomError` at the limit."""
        again = tally.rollbacks + 1 if tally.rolled_back_to == step else 1
        if again > self.config.max_rollbacks:
            raise FathomError(
                f"{again - 1} roll-backs to step {step} did not lead past the spike (guard.max_rollbacks), so its "
                f"weights may be spoilt. Remove checkpoints/step-{step} and give the same command again to go on from "
                f"the one before it, or lower the learning rate in a new run folder"
            )
        self.tally = Tally(tally.spikes, step, again)

    def state(self) -> dict[str, Any]:
        """All that later decisions depend on, for JSON, which keeps every bit of a float."""
        of_the_recipe = ("config", "clip_norm")
        return {key: value for key, value in asdict(self).items() if key not in of_the_recipe}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; with nothing (an earlier version's checkpoint) begin anew."""
        fresh = Guard(self.config, self.clip_norm).state() | state
        self.tally = Tally(**fresh.pop("tally"))
        for key, value in fresh.items():
            setattr(self, key, value)


def _log(norm: float) -> float:
    return math.log(max(norm, sys.float_info.min))
