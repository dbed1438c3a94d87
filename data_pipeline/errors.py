"""The error types of the whole project, and the exit code each one means."""

from __future__ import annotations


class RddmError(Exception):
    """Something went wrong that a person can be told in one line (the message)."""

    exit_code = 1
    is_shared = False  # raised on every worker of a group, so that one of them may tell it for all


class UserError(RddmError):
    """Bad input: the message says what was given, what is allowed and which key or flag to change."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or command-line flag does not fit."""


class DataError(UserError):
    """A dataset, or an image on its way into one, is not usable."""


class ModelError(UserError):
    """A model, checkpoint or registered version is absent, damaged or of another kind."""


class EnvironmentFault(UserError):
    """The machine or a server is not fit: no compiler, no space, a tracking server out of reach."""


class BadSample(RddmError):
    """One sample of a packed dataset cannot be read."""


class AlteredSample(BadSample):
    """The bytes of a sample are not those that were packed."""


class TrainingFault(RddmError):
    """A run cannot go on: the loss is not finite, workers died."""


def kind_of(error: RddmError) -> str:
    """The name of the nearest class of this module that an error is one of: what another process can raise again."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == __name__)
