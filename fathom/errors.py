"""The errors a user of fathom can meet. Each message says the value, the constraint and the remedy."""

from __future__ import annotations


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
