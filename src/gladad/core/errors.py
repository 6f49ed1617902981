"""Errors meant for the user: one sentence that names what is wrong and says what to do."""

from __future__ import annotations


class GladError(Exception):
    """Base of every error that is the input's fault, not the program's. The CLI prints it in one line."""


class DataError(GladError):
    """An image, folder or data set cannot be used as given."""


class NotFiniteError(GladError):
    """A number that a decision hangs on is NaN or infinite."""


class ConfigError(GladError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class ModelFormatError(GladError):
    """A folder is not a model, or its files do not fit together."""


class NotFittedError(GladError):
    """The detector has to be fitted (or loaded) first."""


class TrainingError(GladError):
    """A training cannot go on: its loss is no number any more."""


class Interrupted(GladError):
    """Work was asked to stop; a training has saved where it is."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal  # number of the one that asked; 0 if a program did, or nobody and the work is done as far as it can be


class MissingExtraError(GladError):
    """A feature needs a package that is not installed."""

    def __init__(self, feature: str, requirement: str):
        super().__init__(f"{feature} needs a package that is not installed; run: pip install {requirement}")
