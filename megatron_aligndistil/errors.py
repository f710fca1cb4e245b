"""Errors whose cause is the user's input or environment: the CLI prints one line and exits with code 2.

Everything else is a bug and keeps its traceback.
"""

REASON_CHARACTERS = 300


class UserError(Exception):
    """What went wrong, where (file:row or config key), the value, and the remedy, in one line."""


def reason(error: BaseException) -> str:
    """What a library's error says, in one line of bounded length; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[:REASON_CHARACTERS] + "…"


class ConfigError(UserError, ValueError):
    """A config key or a combination of keys that cannot be run."""


class DataError(UserError, ValueError):
    """A data file, row or tokenizer that cannot be used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model folder that is missing, damaged, incompatible or cannot be written."""


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on: a non-finite loss or gradient."""


class RolloutError(UserError, RuntimeError):
    """A generation engine or a reward that cannot be used."""


class Preempted(Exception):
    """Not an error: a signal asked the run to stop, and it did between two steps, with its state saved."""
