"""Errors that raylora raises on purpose: each says the rule, the value found, then the cure.

All take one string, so that they pickle across Ray processes.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class RayloraError(Exception):
    """Root of every error that a user can mend."""


class ConfigError(RayloraError, ValueError):
    """A search space file or a command line value breaks a rule."""


class DataError(RayloraError, ValueError):
    """The data set cannot be read, split or tokenised."""


class BaseModelError(RayloraError, OSError):
    """The base model or its tokenizer cannot be found or loaded."""


class DeviceError(RayloraError, RuntimeError):
    """The machine or cluster lacks what the settings demand."""


class RunDirectoryError(RayloraError, OSError):
    """A run directory is missing something, is in use, or belongs to other settings."""


class TrialError(RayloraError, RuntimeError):
    """One trial failed; the search goes on."""


class PackingError(RayloraError, RuntimeError):
    """Trials of this search cannot train together on one base."""


class SearchError(RayloraError, RuntimeError):
    """The search cannot go on."""


class TrackerError(RayloraError, RuntimeError):
    """A tracker did not take what it was sent."""


class MergeError(RayloraError, RuntimeError):
    """An adapter cannot be merged into its base."""
