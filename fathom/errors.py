"""The errors a user of fathom can meet. Each message says the value, the constraint and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FathomError(Exception):
    """Anything fathom refuses to do; the command line prints it as one line, without a traceback."""


class ConfigError(FathomError, ValueError):
    """A model configuration that is not a model of this family, or contradicts itself."""


class CheckpointError(FathomError):
    """Weights on disk that are missing, left over, misshapen or damaged."""


class DataError(FathomError):
    """Text or tokens that cannot be used: nothing there, not decodable, made with other settings."""


class RecipeError(FathomError, ValueError):
    """A recipe with an unknown key, a wrong type or an impossible combination."""


class GenerationError(FathomError, ValueError):
    """A request the model cannot answer, for example one longer than its context."""


class ServingError(FathomError):
    """A server that cannot be started with these settings, or a request that it refuses."""


class ParallelError(FathomError, ValueError):
    """A layout over several devices that is impossible."""


class ScheduleError(ParallelError):
    """A pipeline schedule that cannot be made with these numbers, or that would not run."""


class PlanError(FathomError, ValueError):
    """A cluster or a layout that cannot be planned with: unknown, contradicting itself, too small for the model."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "known are") -> str:
    """The remedy for a name that there is not: the nearest one that there is, or `otherwise` and all of them.

    >>> did_you_mean("nanno", ["mini", "nano"])
    "did you mean 'nano'?"
    """
    names = list(known)
    alike = [one for one in names if one.lower() == name.lower()]
    near = alike or get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(names)}"
